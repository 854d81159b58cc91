"""The machine reports the schema in service, and the stack reads the report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pytest

from mlflow_host.boot import publish_schema
from mlflow_host.contract import in_service, launch
from mlflow_host.machine import aws, config
from tests.support.moto_server import moto_server

NAME = "/mlflow-ami/dev/in-service"
FACTS = {
    "image_version": "20261122T101500Z",
    "mlflow_version": "3.17.2",
    "migration_head": "dc11669786a5",
    "migration_count": 67,
    "postgresql_major": 15,
    "git_commit": "0" * 40,
}


@pytest.fixture(scope="module")
def ssm() -> Iterator[str]:
    with moto_server() as address:
        yield address


def on_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, endpoint: str, parameter: str = NAME) -> None:
    document = launch.LaunchDocument(
        launch.Stack("dev", "eu-central-1"),
        launch.Buckets("a-bucket", "m-bucket", "b-bucket"),
        launch.CredentialsParameter("/mlflow-ami/dev/credentials"),
        launch.DataVolume("vol-0123456789abcdef0", parameter),
        launch.Web(("52.1.2.3",)),
        endpoints=launch.Endpoints(ssm=endpoint),
    )
    sized: Any = None
    host = config.HostConfig(document, sized, "https://52.1.2.3")
    monkeypatch.setattr(config, "load", lambda: host)
    monkeypatch.setattr(config, "IMAGE_FACTS", tmp_path / "image.json")
    config.IMAGE_FACTS.write_text(json.dumps(FACTS))
    monkeypatch.setattr(aws, "role_keys", lambda: aws.Keys("access", "secret", "token"))


def test_stack_reads_the_machines_report(
    ssm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_machine(monkeypatch, tmp_path, ssm)
    client = boto3.client(
        "ssm", region_name="eu-central-1", endpoint_url=ssm, aws_access_key_id="x", aws_secret_access_key="x"
    )
    client.put_parameter(Name=NAME, Type="String", Value="not reported yet")
    assert in_service.parse(client.get_parameter(Name=NAME)["Parameter"]["Value"]) is None
    before = datetime.now(UTC).replace(microsecond=0)
    assert publish_schema.main() == 0
    found = in_service.parse(client.get_parameter(Name=NAME)["Parameter"]["Value"])
    assert found and dataclasses.replace(found, at="") == in_service.InService(
        "vol-0123456789abcdef0", "20261122T101500Z", "3.17.2", "dc11669786a5", 67, 15, ""
    )
    assert before <= datetime.fromisoformat(found.at) <= datetime.now(UTC)


def test_a_stack_that_names_no_parameter_gets_no_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_machine(monkeypatch, tmp_path, "http://127.0.0.1:9", parameter="")
    assert publish_schema.main() == 0
    assert capsys.readouterr().err == ""


def test_a_report_that_cannot_be_written_is_tried_again_by_systemd(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_machine(monkeypatch, tmp_path, "http://127.0.0.1:9")
    assert publish_schema.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mlflow-host: {NAME} could not be written: ") and "ssm:PutParameter" in line
    unit = Path(__file__).parents[2] / "provisioning/rootfs/usr/lib/systemd/system/mlflow-host-in-service.service"
    assert "Restart=on-failure\n" in unit.read_text() and "Requires=mlflow-host-database.service\n" in unit.read_text()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not reported yet",
        "[]",
        "7",
        "null",
        "{}",
        json.dumps({"format": 1, "volume": "vol-1", "migration_count": "x"}),
    ],
)
def test_invalid_report_is_ignored(text: str) -> None:
    assert in_service.parse(text) is None


def test_a_report_of_a_later_format_is_read() -> None:
    report = in_service.InService("vol-1", "v", "3.18.0", "f4a9b2c7d1e6", 68, 15, "2026-11-29T10:00:00Z")
    later = {**json.loads(in_service.dump(report)), "format": 2, "served_since": "2026"}
    assert in_service.parse(json.dumps(later)) == report
