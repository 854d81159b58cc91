"""User-data: a cloud-config with the launch document. This module checks the launch document with the code that reads
it on the machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pulumi
import yaml

from contract import alarms, launch
from credentials import Parameters
from preflight import Facts
from settings import Settings
from storage import Storage

TEMPLATE = Path(__file__).with_name("user_data.yaml.j2")
LIMIT_BYTES = 16384
"""EC2's limit for the size of user-data, before base64 encoding."""
SAMPLE: dict[str, Any] = {
    "hostnames": ["203.0.113.1"],
    "artifacts": "mlflow-artifacts-0000000",
    "models": "mlflow-models-0000000",
    "backups": "mlflow-backups-0000000",
    "volume": "vol-0123456789abcdef0",
    "report": "",
    "parameter": "/mlflow-ami/stack/credentials",
    "authority": "/mlflow-ami/stack/certificate-authority",
    "reader": "/mlflow-ami/stack/postgres-reader",
    "role": "",
}
"""Sample names in AWS's format, used to check the user-data before the resources exist."""


def written(
    config: Settings,
    image: Facts,
    hostnames: pulumi.Output[list[str]],
    kept: Storage,
    parameters: Parameters,
    role: pulumi.Output[str],
) -> pulumi.Output[str]:
    """The stack's user-data for a machine of `image`, as an output. Pulumi resolves the output after AWS has returned
    the names that the user-data contains."""
    named = pulumi.Output.all(
        hostnames=hostnames,
        **{name: bucket.bucket for name, bucket in kept.buckets.items()},
        volume=kept.volume.id,
        restore_from=kept.restore_from,
        report=parameters.in_service.name,
        authority=parameters.authority.name if parameters.authority else "",
        reader=parameters.reader.name if parameters.reader else "",
        parameter=parameters.credentials.name,
        role=role,
    )
    return named.apply(lambda names: render(document(config, names), image.launch_revision))


def problems(config: Settings, image: Facts) -> list[str]:
    """The mistakes in the user-data that can be found before AWS returns the names of the resources."""
    try:
        render(_sample(config), image.launch_revision)
    except pulumi.RunError as error:
        return [str(error)]
    return []


def cautions(config: Settings, image: Facts) -> list[str]:
    """Warnings about settings that an older image ignores, and about alarms whose metrics the image does not send."""
    _, left_out = launch.known_to(image.launch_revision, _sample(config))
    ignored = [key for key in left_out if key != "monitoring.alarms"]
    found = []
    if ignored:
        found.append(
            f"{image.described} is older than {' and '.join(ignored)} of the launch document: these keys have no "
            "effect until a newer image is pinned."
        )
    fed = (*alarms.fed_by(image.launch_revision), alarms.STATUS_CHECK)
    if unfed := [name for name in config.alarms if name not in fed]:
        found.append(
            f"{image.described} does not send the metrics of these alarms: {', '.join(unfed)}. The alarms are left "
            f"out until an image that sends these metrics is pinned."
        )
    return found


def _sample(config: Settings) -> dict[str, Any]:
    hostnames = [name for name in (config.domain_name, *SAMPLE["hostnames"]) if name]
    return document(config, {**SAMPLE, "hostnames": hostnames, "restore_from": config.restore_from})


def document(config: Settings, names: Mapping[str, Any]) -> dict[str, Any]:
    """The launch document's content, made from the settings and the names that AWS returned. Unset keys are empty."""
    return {
        "stack": {"name": config.stack, "region": config.region},
        "buckets": {bucket: names[bucket] for bucket in ("artifacts", "models", "backups")},
        "credentials": {"parameter": names["parameter"]},
        "data_volume": {"id": names["volume"], "report_parameter": names["report"]},
        "web": {
            "hostnames": names["hostnames"],
            "tls": config.tls,
            "authority_parameter": names["authority"],
            "acme_email": config.acme_email,
            "acme_directory": config.acme_directory,
        },
        "postgres": {"cidrs": list(config.postgres_cidrs), "parameter": names["reader"]},
        "mlflow": {
            "job_execution": config.job_execution,
            "artifact_transfer": config.artifact_transfer,
            "deleted_retention_days": config.deleted_retention_days,
            "role": names["role"],
        },
        "backups": {
            "retention_days": config.backup_retention_days,
            "restore_from": names["restore_from"],
            "endpoint": config.backups_endpoint,
            "authority": config.backups_authority,
        },
        "monitoring": {
            "alarms": [name for name in config.alarms if name in alarms.NAMES],
            "dashboard": config.dashboard,
            "log_group": config.log_group,
        },
        "endpoints": {
            "s3": config.s3_endpoint,
            "ssm": config.ssm_endpoint,
            "sts": config.sts_endpoint,
            "monitoring": config.monitoring_endpoint,
            "logs": config.logs_endpoint,
        },
    }


def render(content: Mapping[str, Any], revision: int = launch.REVISION) -> str:
    """The cloud-config as text, for an image that reads this revision of the launch document. Raises pulumi.RunError if
    the machine would refuse the document, or if the text exceeds EC2's size limit."""
    tables, _ = launch.known_to(revision, content)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    # JSON strings, booleans and lists of strings are valid TOML, if one control character is escaped.
    environment.filters["toml"] = lambda value: json.dumps(value).replace("\x7f", "\\u007f")
    text = environment.from_string(TEMPLATE.read_text()).render(format=launch.FORMAT, tables=tables)
    size = len(text.encode())
    if size > LIMIT_BYTES:
        raise pulumi.RunError(f"The user-data has {size} bytes, more than the {LIMIT_BYTES} that EC2 allows.")
    (file,) = yaml.safe_load(text)["write_files"]
    try:
        launch.parse(file["content"])
    except launch.LaunchError as error:
        raise pulumi.RunError(f"The machine would refuse its launch document: {'; '.join(error.problems)}.") from None
    return text
