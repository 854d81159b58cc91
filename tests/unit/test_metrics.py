"""CloudWatch is told how full the data volume is, as moto reads it, and where it is not, a sentence says why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pytest
from mlflow_host import aws, config, launch, metrics
from moto.server import ThreadedMotoServer

KEYS = aws.Keys("access", "secret", "token")


def document(endpoint: str) -> launch.LaunchDocument:
    return launch.LaunchDocument(
        launch.Stack("dev", "eu-central-1"),
        launch.Buckets("a-bucket", "m-bucket", "b-bucket"),
        launch.Credentials("/mlflow-ami/dev/credentials"),
        launch.DataVolume("vol-0123456789abcdef0"),
        launch.Web(("52.1.2.3",)),
        endpoints=launch.Endpoints(monitoring=endpoint),
    )


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the room check has found goes here; CloudWatch is out of reach."""
    (tmp_path / "web").mkdir()
    monkeypatch.setattr(config, "RUN", tmp_path)
    sized: Any = None
    host = config.HostConfig(document("http://127.0.0.1:9"), sized, "https://52.1.2.3")
    monkeypatch.setattr(config, "load", lambda: host)
    monkeypatch.setattr(aws, "role_keys", lambda: KEYS)
    return tmp_path / "web" / "room.json"


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def test_the_metric_arrives(endpoint: str) -> None:
    metrics.put(document(endpoint), 91.5, KEYS, datetime.now(UTC))
    client: Any = boto3.client(
        "cloudwatch",
        endpoint_url=endpoint,
        region_name="eu-central-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    (found,) = client.list_metrics()["Metrics"]
    assert (found["Namespace"], found["MetricName"]) == ("mlflow-ami/dev", "DiskUsedPercent")
    assert found["Dimensions"] == [{"Name": "VolumeId", "Value": "vol-0123456789abcdef0"}]


def test_a_cloudwatch_out_of_reach_is_told_in_a_sentence(told: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told.write_text(json.dumps({"used_percent": 12.5}))
    assert metrics.main() == 2
    assert "cloudwatch:PutMetricData" in capsys.readouterr().err


def test_before_the_first_look_there_is_nothing_to_tell(told: Path) -> None:
    assert not told.exists() and metrics.main() == 0


def test_the_address_is_the_regions_own_where_none_is_set() -> None:
    assert aws.regional_address("eu-central-1", "monitoring") == "https://monitoring.eu-central-1.amazonaws.com"
    assert aws.regional_address("cn-north-1", "monitoring").endswith(".amazonaws.com.cn")
