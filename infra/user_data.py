"""User-data: the launch document in a cloud-config, checked by the rules of the machine that will read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pulumi
import yaml
from credentials import Parameters
from host import launch
from settings import Settings
from storage import Storage
from survey import Facts

TEMPLATE = Path(__file__).with_name("user_data.yaml.j2")
LIMIT_BYTES = 16384
"""EC2's limit on user-data before it is encoded."""
SAMPLE: dict[str, Any] = {
    "hostnames": ["203.0.113.1"],
    "artifacts": "mlflow-artifacts-0000000",
    "models": "mlflow-models-0000000",
    "backups": "mlflow-backups-0000000",
    "volume": "vol-0123456789abcdef0",
    "parameter": "/mlflow-ami/stack/credentials",
    "authority": "/mlflow-ami/stack/certificate-authority",
    "reader": "/mlflow-ami/stack/postgres-reader",
}
"""Names of the form that AWS gives, for a look at the user-data before there are any."""


def written(
    config: Settings, image: Facts, hostnames: pulumi.Output[list[str]], kept: Storage, parameters: Parameters
) -> pulumi.Output[str]:
    """The stack's user-data for a machine of that image, once AWS has named what it refers to."""
    named = pulumi.Output.all(
        hostnames=hostnames,
        **{name: bucket.bucket for name, bucket in kept.buckets.items()},
        volume=kept.volume.id,
        authority=parameters.authority.name if parameters.authority else "",
        reader=parameters.reader.name if parameters.reader else "",
        parameter=parameters.credentials.name,
    )
    return named.apply(lambda names: render(document(config, names), image.launch_revision))


def problems(config: Settings, image: Facts) -> list[str]:
    """What would be wrong with the user-data, whatever the names turn out to be."""
    try:
        render(_sample(config), image.launch_revision)
    except pulumi.RunError as error:
        return [str(error)]
    return []


def cautions(config: Settings, image: Facts) -> list[str]:
    """What is set and means nothing to an image that is older than the setting."""
    _, left_out = launch.known_to(image.launch_revision, _sample(config))
    if not left_out:
        return []
    return [
        f"{image.described} is older than {' and '.join(left_out)} of the launch document: it is not told, and does "
        "without until a newer image is pinned again."
    ]


def _sample(config: Settings) -> dict[str, Any]:
    hostnames = [name for name in (config.domain_name, *SAMPLE["hostnames"]) if name]
    return document(config, {**SAMPLE, "hostnames": hostnames})


def document(config: Settings, names: Mapping[str, Any]) -> dict[str, Any]:
    """The launch document's content from the settings and the names that AWS gave; what is not set is empty."""
    return {
        "stack": {"name": config.stack, "region": config.region},
        "buckets": {bucket: names[bucket] for bucket in ("artifacts", "models", "backups")},
        "credentials": {"parameter": names["parameter"]},
        "data_volume": {"id": names["volume"]},
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
        },
        "backups": {
            "retention_days": config.backup_retention_days,
            "restore_from": config.restore_from,
            "endpoint": config.backups_endpoint,
            "authority": config.backups_authority,
        },
        "endpoints": {"s3": config.s3_endpoint, "ssm": config.ssm_endpoint, "monitoring": config.monitoring_endpoint},
    }


def render(content: Mapping[str, Any], revision: int = launch.REVISION) -> str:
    """The cloud-config as text, for an image of that revision of the launch document. Raises pulumi.RunError if the
    machine would refuse it or EC2 would not take it."""
    tables, _ = launch.known_to(revision, content)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    # JSON's strings, booleans and lists of strings are TOML's too, all but one control character.
    environment.filters["toml"] = lambda value: json.dumps(value).replace("\x7f", "\\u007f")
    text = environment.from_string(TEMPLATE.read_text()).render(format=launch.FORMAT, tables=tables)
    size = len(text.encode())
    if size > LIMIT_BYTES:
        raise pulumi.RunError(f"The user-data has {size} bytes, more than the {LIMIT_BYTES} that EC2 takes.")
    (file,) = yaml.safe_load(text)["write_files"]
    try:
        launch.parse(file["content"])
    except launch.LaunchError as error:
        raise pulumi.RunError(f"The machine would refuse its launch document: {'; '.join(error.problems)}.") from None
    return text
