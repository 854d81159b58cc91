"""The timer `mlflow-host-metrics` measures the metrics of the stack's alarms and sends them to CloudWatch (moto). If a
measurement or the upload fails, one sentence states the reason."""

from __future__ import annotations

import http.server
import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest

from mlflow_host.contract import alarms, launch
from mlflow_host.machine import aws, config
from mlflow_host.monitor import history, request_log
from mlflow_host.upkeep import cloudwatch, metrics
from tests.support.moto_server import moto_server

KEYS = aws.Keys("access", "secret", "token")
NOW = datetime(2026, 11, 29, 12, 0, tzinfo=UTC)


def document(
    endpoint: str, *, tls: str = "private", names: tuple[str, ...] = alarms.NAMES, dashboard: bool = False
) -> launch.LaunchDocument:
    return launch.LaunchDocument(
        launch.Stack("dev", "eu-central-1"),
        launch.Buckets("a-bucket", "m-bucket", "b-bucket"),
        launch.CredentialsParameter("/mlflow-ami/dev/credentials"),
        launch.DataVolume("vol-0123456789abcdef0"),
        launch.Web(("52.1.2.3",), tls=tls),
        monitoring=launch.Monitoring(names, dashboard),
        endpoints=launch.Endpoints(monitoring=endpoint),
    )


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Configure an unreachable CloudWatch endpoint, and return the folder with the reports of the other timers."""
    (tmp_path / "web").mkdir()
    monkeypatch.setattr(config, "RUN", tmp_path)
    launched(monkeypatch, document("http://127.0.0.1:9", names=("data-volume-full",)))
    monkeypatch.setattr(aws, "role_keys", lambda: KEYS)
    return tmp_path / "web"


def launched(monkeypatch: pytest.MonkeyPatch, given: launch.LaunchDocument) -> None:
    sized: Any = None
    monkeypatch.setattr(config, "load", lambda: config.HostConfig(given, sized, "https://52.1.2.3"))


@pytest.fixture
def endpoint() -> Iterator[str]:
    with moto_server() as address:
        yield address


def test_metrics_reach_cloudwatch_in_one_call(endpoint: str) -> None:
    cloudwatch.put(document(endpoint), {"DiskUsedPercent": 91.5, "ServerAnswers": 1}, KEYS, datetime.now(UTC))
    client: Any = boto3.client(
        "cloudwatch",
        endpoint_url=endpoint,
        region_name="eu-central-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    found = {each["MetricName"]: each for each in client.list_metrics(Namespace="mlflow-ami/dev")["Metrics"]}
    assert {name: each["Dimensions"] for name, each in found.items()} == {
        "DiskUsedPercent": [{"Name": "VolumeId", "Value": "vol-0123456789abcdef0"}],
        "ServerAnswers": [],
    }


def test_unreachable_cloudwatch_is_one_error_sentence(web: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (web / "room.json").write_text(json.dumps({"used_percent": 12.5}))
    assert cloudwatch.main() == 2
    assert "DiskUsedPercent were not sent" in (said := capsys.readouterr().err) and "cloudwatch:PutMetricData" in said


def test_no_metric_before_the_first_measurement(web: Path) -> None:
    assert not (web / "room.json").exists() and cloudwatch.main() == 0


def test_stack_without_alarms_measures_nothing(web: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, document("http://127.0.0.1:9", names=()))
    monkeypatch.setattr(metrics, "measured", lambda wanted: pytest.fail("measured"))
    assert cloudwatch.main() == 0


def test_only_metrics_of_the_stacks_alarms_are_measured(web: Path) -> None:
    (web / "room.json").write_text(json.dumps({"used_percent": 12.5}))
    (web / "backups.json").write_text(json.dumps({"problems": ["late", "later"]}))
    assert metrics.measured({"DiskUsedPercent", "BackupProblems"}) == {"DiskUsedPercent": 12.5, "BackupProblems": 2}
    assert metrics.measured({"BackupProblems"}) == {"BackupProblems": 2}


def test_dashboard_without_alarms_has_its_own_metrics(web: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, document("http://127.0.0.1:9", names=(), dashboard=True))
    asked: list[set[str]] = []
    monkeypatch.setattr(metrics, "measured", asked.append)
    assert cloudwatch.main() == 0
    assert asked == [{alarms.REQUESTS, alarms.MEDIAN, alarms.SLOW, "ServerErrorPercent", "DiskUsedPercent"}]


def test_metrics_of_the_dashboard_are_those_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = history.History(tmp_path / "history.json")
    request = request_log.Request(
        "", "", "", "GET", "/api/2.0/mlflow/runs/get", 200, 0, 0, 0.02, True, False, True, "", "", ()
    )
    kept.add([request._replace(seconds=each / 1000) for each in range(1, 121)])
    minute = int(NOW.timestamp() // 60)
    kept.end_minute(minute - 1, 12.5)
    monkeypatch.setattr(metrics, "HISTORY", kept.file)
    assert metrics.measured({alarms.REQUESTS, alarms.MEDIAN, alarms.SLOW}, NOW) == {
        alarms.REQUESTS: 2.0,
        alarms.MEDIAN: 61.0,
        alarms.SLOW: 115.0,
    }
    assert metrics.measured({alarms.REQUESTS}, NOW + timedelta(minutes=2)) == {}, "the page's service does not run"
    kept.file.unlink()
    assert metrics.measured({alarms.REQUESTS}, NOW) == {}


def test_every_metric_has_a_unit_and_a_measurement(web: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (web / "room.json").write_text(json.dumps({"used_percent": 1}))
    (web / "backups.json").write_text(json.dumps({"problems": []}))
    for name in ("answers", "memory_used", "failed_units"):
        monkeypatch.setattr(metrics, name, lambda: 1.0)
    monkeypatch.setattr(metrics, "error_percent", lambda log, now: 1.0)
    monkeypatch.setattr(metrics, "certificate_days", lambda now: 1.0)
    monkeypatch.setattr(metrics, "last_minute", lambda history, column, now, per=1: 1.0)
    wanted = alarms.metrics(alarms.NAMES, dashboard=True)
    assert set(metrics.measured(wanted)) == wanted == set(alarms.UNITS)


def test_measurement_that_fails_does_not_silence_the_others(
    web: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (web / "room.json").write_text(json.dumps({"used_percent": 12.5}))
    monkeypatch.setenv("PATH", "/nonexistent")
    assert metrics.measured({"DiskUsedPercent", "FailedUnits"}) == {"DiskUsedPercent": 12.5}
    assert "FailedUnits cannot be measured: FileNotFoundError" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "answers"), [(200, 1.0), (503, 0.0)])
def test_server_answers_if_the_health_check_is_200(
    web: Path, monkeypatch: pytest.MonkeyPatch, status: int, answers: float
) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/healthz"
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        launched(monkeypatch, document("", tls="off"))
        real = http.client.HTTPConnection
        monkeypatch.setattr(
            http.client, "HTTPConnection", lambda host, timeout: real(host, server.server_port, timeout=timeout)
        )
        assert metrics.answers() == answers
        server.shutdown()
    assert metrics.answers() == 0.0, "nobody listens"


def line(at: datetime, status: int, path: str = "/") -> str:
    return f'{at.isoformat()} 10.0.0.1 ann "GET {path}" {status} 12 0.001\n'


def test_errors_are_counted_among_the_requests_of_the_last_minute(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    old = [line(NOW - timedelta(seconds=90), 500)] * 100
    new = [line(NOW - timedelta(seconds=30), 200, "/a\\x22 500 ")] * 90 + [line(NOW - timedelta(seconds=5), 502)] * 10
    log.write_text("".join([*old, *new, "cut in the mid"]))
    assert metrics.error_percent(log, NOW) == 10.0
    log.write_text("".join([*old, line(NOW, 500)]))
    assert metrics.error_percent(log, NOW) == 5.0, "one error among few requests"
    log.write_text("")
    assert metrics.error_percent(log, NOW) == 0.0
    assert metrics.error_percent(tmp_path / "none", NOW) is None


def test_counted_status_is_the_one_of_nginxs_own_log_format() -> None:
    text = (Path(__file__).parents[2] / "provisioning/rootfs/etc/nginx/nginx.conf").read_text()
    assert """log_format requests '$time_iso8601 $remote_addr $remote_user "$request_method $uri" $status """ in text


def test_certificate_that_is_served_is_measured(web: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=server", "-days", "10"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    launched(monkeypatch, document("https://unused"))
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        real, port = socket.create_connection, server.server_port
        monkeypatch.setattr(socket, "create_connection", lambda address, timeout: real((address[0], port)))
        left = metrics.certificate_days(datetime.now(UTC))
        server.shutdown()
    assert left is not None and 9.9 <= left <= 10
    launched(monkeypatch, document("", tls="off"))
    assert metrics.certificate_days(NOW) is None


def test_failed_units_are_counted_but_not_those_with_an_alarm_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "systemctl"
    program.write_text(
        "#!/bin/sh\n"
        "echo 'mlflow-host-room.service loaded failed failed Check'\n"
        "echo 'mlflow-host-gc.service loaded failed failed Remove'\n"
        "echo 'mlflow-host-backups-check.service loaded failed failed Check'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert metrics.failed_units() == 1


def test_memory_counts_only_what_the_kernel_cannot_drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       2000 kB\nMemFree:        100 kB\nMemAvailable:   500 kB\n")
    monkeypatch.setattr(metrics, "MEMORY", file)
    assert metrics.memory_used() == 75.0


def test_default_endpoint_is_the_regions() -> None:
    assert aws.regional_address("eu-central-1", "monitoring") == "https://monitoring.eu-central-1.amazonaws.com"
    assert aws.regional_address("cn-north-1", "monitoring").endswith(".amazonaws.com.cn")
