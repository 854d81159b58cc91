"""MLflow gets AWS credentials of the server role, which botocore's process provider can read and renew."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import boto3
import botocore.session
import pytest

from mlflow_host.contract import launch
from mlflow_host.machine import aws
from mlflow_host.upkeep import server_credentials
from tests.support.moto_server import moto_server

ROLE = "arn:aws:iam::123456789012:role/server-0a1b2c3"
MACHINE = aws.Keys("ASIAMACHINE", "secret of the machine", "token of the machine", "2026-11-29T18:00:00Z")


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """Run moto in place of AWS STS, and yield its address."""
    with moto_server() as address:
        yield address


def document(sts: str, role: str) -> launch.LaunchDocument:
    return launch.LaunchDocument(
        stack=launch.Stack("dev", "eu-central-1"),
        buckets=launch.Buckets("aaa", "mmm", "bbb"),
        credentials=launch.CredentialsParameter("/mlflow-ami/dev/credentials"),
        data_volume=launch.DataVolume("vol-01234567"),
        web=launch.Web(("127.0.0.1",)),
        mlflow=launch.Mlflow(role=role),
        endpoints=launch.Endpoints(sts=sts),
    )


def test_credentials_are_of_the_server_role_for_an_hour(moto: str) -> None:
    now = datetime.now(UTC)
    keys = server_credentials.current(document(moto, ROLE), MACHINE, now)
    caller = boto3.client(
        "sts",
        endpoint_url=moto,
        region_name="eu-central-1",
        aws_access_key_id=keys.access,
        aws_secret_access_key=keys.secret,
        aws_session_token=keys.token,
    ).get_caller_identity()
    assert caller["Arn"] == "arn:aws:sts::123456789012:assumed-role/server-0a1b2c3/mlflow-server"
    left = datetime.fromisoformat(keys.expires) - now
    assert timedelta(minutes=59) < left <= timedelta(minutes=60, seconds=5)


def test_a_stack_that_names_no_role_keeps_the_machine_s() -> None:
    assert server_credentials.current(document("", ""), MACHINE, datetime.now(UTC)) == MACHINE


def test_invalid_sts_endpoint_is_unreachable(moto: str) -> None:
    with pytest.raises(aws.ServiceUnreachable, match="refused"):
        aws.assume_role(document("http://127.0.0.1:9", ROLE), ROLE, MACHINE, datetime.now(UTC))


def test_botocore_reads_the_file_and_renews_from_it_before_the_credentials_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test uses the shipped AWS configuration with another path for the credentials file."""
    file, configuration = tmp_path / "server-credentials.json", tmp_path / "aws-config"
    shipped = Path(__file__).parents[2] / "provisioning/rootfs/usr/share/mlflow-host/aws-config"
    configuration.write_text(shipped.read_text().replace(str(server_credentials.FILE), str(file)))
    assert str(file) in configuration.read_text()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(configuration))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    soon = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
    later = (datetime.now(UTC) + timedelta(minutes=59)).isoformat()
    file.write_text(server_credentials.as_json(replace(MACHINE, access="ASIAFIRST", expires=soon)))
    credentials = botocore.session.get_session().get_credentials()
    file.write_text(server_credentials.as_json(replace(MACHINE, access="ASIASECOND", expires=later)))
    assert credentials is not None
    assert credentials.get_frozen_credentials().access_key == "ASIASECOND"
    assert json.loads(file.read_text())["Version"] == 1
