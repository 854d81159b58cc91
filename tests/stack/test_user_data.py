"""User-data is a cloud-config that contains only a launch document, which the machine accepts."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pulumi
import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import user_data
from mlflow_host.contract import alarms, launch
from tests.stack.program import ADDRESS, NEW, VOLUME, Account, Image, Run, data_volume, image_tags, run

CONTENT: dict[str, Any] = {
    "stack": {"name": "dev", "region": "eu-central-1"},
    "buckets": {"artifacts": "aaa", "models": "mmm", "backups": "bbb"},
    "credentials": {"parameter": "/mlflow-ami/dev/credentials"},
    "data_volume": {"id": VOLUME},
    "web": {"hostnames": [ADDRESS], "tls": "off", "authority_parameter": "", "acme_email": ""},
    "postgres": {"cidrs": [], "parameter": ""},
    "mlflow": {
        "job_execution": False,
        "artifact_transfer": "direct",
        "role": "arn:aws:iam::123456789012:role/mlflow-1a2b3c4",
    },
    "backups": {"retention_days": 30},
    "endpoints": {},
}

AUTHORITY = "-----BEGIN CERTIFICATE-----\nMIIBszCCAVmgAwIBAgIUQ==\n-----END CERTIFICATE-----"


def read(text: str) -> launch.LaunchDocument:
    """Return the launch document that cloud-init writes and the machine reads."""
    assert text.startswith("#cloud-config\n")
    config = yaml.safe_load(text)
    assert list(config) == ["write_files"]
    (file,) = config["write_files"]
    assert (file["path"], file["owner"], file["permissions"]) == ("/etc/mlflow-host/launch.toml", "root:root", "0644")
    return launch.parse(file["content"])


def document(found: Run) -> launch.LaunchDocument:
    return read(found.one("ec2.Instance").inputs["userData"])


def test_launch_document_names_the_resources_of_the_stack() -> None:
    assert document(run()) == launch.LaunchDocument(
        stack=launch.Stack("dev", "eu-central-1"),
        buckets=launch.Buckets("mlflow-artifacts-1a2b3c4", "mlflow-models-1a2b3c4", "mlflow-backups-1a2b3c4"),
        credentials=launch.CredentialsParameter("/mlflow-ami/dev/credentials"),
        data_volume=launch.DataVolume(VOLUME, "/mlflow-ami/dev/in-service"),
        web=launch.Web((ADDRESS,), "private", authority_parameter="/mlflow-ami/dev/certificate-authority"),
        mlflow=launch.Mlflow(False, "direct", role="arn:aws:iam::123456789012:role/mlflow-1a2b3c4"),
        backups=launch.Backups(retention_days=30),
        monitoring=launch.Monitoring(alarms.NAMES),
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"domainName": "mlflow.example.com"}, {"web": {"hostnames": ("mlflow.example.com", ADDRESS)}}),
        ({"tls": "off"}, {"web": {"tls": "off", "authority_parameter": ""}}),
        (
            {"tls": "acme", "domainName": "mlflow.example.com", "acmeEmail": "ops@example.com"},
            {"web": {"tls": "acme", "acme_email": "ops@example.com", "authority_parameter": ""}},
        ),
        (
            {"tls": "acme", "domainName": "mlflow.example.com", "acmeDirectory": "https://a.example.com/directory"},
            {"web": {"tls": "acme", "acme_directory": "https://a.example.com/directory"}},
        ),
        ({"jobExecution": "true"}, {"mlflow": {"job_execution": True}}),
        (
            {"postgresCidrs": '["192.0.2.0/24"]'},
            {"postgres": {"cidrs": ("192.0.2.0/24",), "parameter": "/mlflow-ami/dev/postgres-reader"}},
        ),
        ({"deletedRetentionDays": "0"}, {"mlflow": {"deleted_retention_days": 0}}),
        ({"monitoringEndpoint": "https://cw.example.com"}, {"endpoints": {"monitoring": "https://cw.example.com"}}),
        ({"logsEndpoint": "https://logs.example.com"}, {"endpoints": {"logs": "https://logs.example.com"}}),
        ({"logRetentionDays": "14"}, {"monitoring": {"log_group": "/mlflow-ami/dev", "dashboard": False}}),
        ({"dashboard": "true"}, {"monitoring": {"log_group": "", "dashboard": True}}),
        ({"artifactTransfer": "proxied"}, {"mlflow": {"artifact_transfer": "proxied"}}),
        ({"backupRetentionDays": "7"}, {"backups": {"retention_days": 7}}),
        ({"s3Endpoint": "https://127.0.0.1:8333"}, {"endpoints": {"s3": "https://127.0.0.1:8333", "ssm": ""}}),
        (
            {"s3Endpoint": "http://10.0.0.1:80", "backupsEndpoint": "https://10.0.0.1", "backupsAuthority": AUTHORITY},
            {"backups": {"endpoint": "https://10.0.0.1", "authority": AUTHORITY}},
        ),
        ({"restoreFrom": "latest"}, {"backups": {"restore_from": "latest"}}),
        ({"restoreFrom": "2026-11-22T14:15:00Z"}, {"backups": {"restore_from": "2026-11-22T14:15:00Z"}}),
        ({"ssmEndpoint": "https://vpce-1.example.com"}, {"endpoints": {"s3": "", "ssm": "https://vpce-1.example.com"}}),
        ({"stack_name": "Prod_2.eu-x"}, {"stack": {"name": "Prod_2.eu-x"}}),
    ],
)
def test_settings_reach_the_machine(config: dict[str, Any], expected: dict[str, dict[str, Any]]) -> None:
    backed_up = Account(volumes=data_volume(), objects=("pgbackrest/backup/pg15/20261101-010000F/x",))
    found = document(run(backed_up if "restoreFrom" in config else None, **config))
    for table, values in expected.items():
        for key, value in values.items():
            assert getattr(getattr(found, table), key) == value


def test_url_is_the_address_for_clients() -> None:
    assert run(domainName="mlflow.example.com").outputs["url"] == "https://mlflow.example.com"
    assert run(tls="off").outputs["url"] == f"http://{ADDRESS}"


def test_user_data_is_well_below_ec2s_limit() -> None:
    assert len(run(domainName=f"{'m' * 60}.{'x' * 60}.example.com").one("ec2.Instance").inputs["userData"]) < 4096


def test_user_data_that_ec2_would_not_take_is_refused_without_printing_it() -> None:
    content = copy.deepcopy(CONTENT)
    content["web"]["hostnames"] = [f"host-{n}.example.com" for n in range(1000)]
    with pytest.raises(pulumi.RunError) as refused:
        user_data.render(content)
    assert "bytes, more than the 16384 that EC2 allows" in str(refused.value)
    assert len(str(refused.value)) < 200


def test_the_limit_is_exact() -> None:
    content = copy.deepcopy(CONTENT)
    content["web"]["hostnames"] = [f"h{n}.example.com" for n in range(770)]
    content["stack"]["name"] = "s"
    room = user_data.LIMIT_BYTES - len(user_data.render(content).encode())
    content["credentials"]["parameter"] += "p" * room
    assert len(user_data.render(content).encode()) == user_data.LIMIT_BYTES
    content["credentials"]["parameter"] += "p"
    with pytest.raises(pulumi.RunError, match="16385 bytes"):
        user_data.render(content)


@pytest.mark.parametrize(
    ("table", "key", "value", "problem"),
    [
        ("buckets", "models", "Models!", 'buckets.models is "Models!"'),
        ("data_volume", "id", "vol-1", 'data_volume.id is "vol-1"'),
        ("web", "hostnames", [], "must name at least one host"),
        ("web", "tls", "none", 'web.tls is "none"'),
    ],
)
def test_preview_refuses_invalid_launch_documents(table: str, key: str, value: Any, problem: str) -> None:
    content = copy.deepcopy(CONTENT)
    content[table][key] = value
    with pytest.raises(pulumi.RunError, match="The machine would refuse its launch document") as refused:
        user_data.render(content)
    assert problem in str(refused.value)


def test_undefined_name_in_the_template_is_an_error() -> None:
    content = copy.deepcopy(CONTENT)
    del content["stack"]["region"]
    with pytest.raises(pulumi.RunError, match=r"stack\.region is missing"):
        user_data.render(content)


@hypothesis_settings(max_examples=100)
@given(st.text(max_size=200))
def test_any_text_is_quoted_correctly(text: str) -> None:
    """A text is either refused, or the machine reads the same text from the launch document."""
    content = copy.deepcopy(CONTENT)
    content["endpoints"] = {"s3": text}
    try:
        found = read(user_data.render(content))
    except pulumi.RunError as refused:
        assert "endpoints.s3" in str(refused) or "launch document is not TOML" in str(refused)
        return
    assert launch.to_mapping(found)["endpoints"]["s3"] == text


def test_an_older_image_gets_no_key_that_it_would_refuse() -> None:
    configured = partial(run, backupsEndpoint="https://10.0.0.1", backupsAuthority=AUTHORITY, backupRetentionDays="7")
    older = configured(Account(images={NEW: Image(tags=image_tags(launch_revision=""))}))
    assert document(older).backups == launch.Backups(retention_days=7)
    assert [line for _, line in older.log if "older" in line] == [
        f"{NEW} (MLflow 3.17.2, image 20261122T101500Z) is older than backups.endpoint and backups.authority of the "
        "launch document: these keys have no effect until a newer image is pinned."
    ]
    newer = configured()
    assert document(newer).backups.endpoint == "https://10.0.0.1"
    assert not [line for _, line in newer.log if "older" in line]


def test_image_of_revision_5_gets_no_log_group_and_the_preview_says_so() -> None:
    image = Account(images={NEW: Image(tags=image_tags(launch_revision="5"))})
    older = run(image, logRetentionDays="14", dashboard="true")
    assert document(older).monitoring == launch.Monitoring(alarms.NAMES)
    (told,) = [line for _, line in older.log if "older" in line]
    assert "is older than monitoring.dashboard and monitoring.log_group of the launch document" in told
    assert not [line for _, line in run(image).log if "older" in line]


def test_older_image_without_newer_settings_causes_no_warning() -> None:
    older = run(Account(images={NEW: Image(tags=image_tags(launch_revision="1"))}))
    assert not [line for _, line in older.log if "older" in line]
