"""Metrics for Prometheus have the right values, and promtool accepts them. If one part of the machine fails, the
metrics of the other parts are returned."""

from __future__ import annotations

import json
import re
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.openmetrics import parser
from prometheus_client.parser import text_string_to_metric_families as text_format

from mlflow_host.monitor import metrics, scraping
from mlflow_host.monitor.metrics import Machine, RequestMetrics, kind_of
from mlflow_host.postgres.cluster import Cluster
from tests.support.services import PostgreSQL
from tests.unit.test_audit_trail import parsed

RULES = Path(__file__).parents[2] / "infra/prometheus-rules.yaml"
openmetrics: Any = parser.text_string_to_metric_families
promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (scripts/prepare.sh)")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/api/2.0/mlflow/runs/log-metric", "log_metric"),
        ("/ajax-api/2.0/mlflow/runs/log-batch", "log_batch"),
        ("/api/2.0/mlflow/runs/create", "create_run"),
        ("/api/2.0/mlflow/runs/get", "runs"),
        ("/api/2.0/mlflow/runs/search", "search"),
        ("/ajax-api/3.0/mlflow/traces/search", "search"),
        ("/graphql", "search"),
        ("/api/2.0/mlflow/metrics/get-history", "history"),
        ("/api/2.0/mlflow-artifacts/artifacts/0/a/b", "artifacts"),
        ("/get-artifact", "artifacts"),
        ("/ajax-api/2.0/mlflow/logged-models/m-1/artifacts/files", "artifacts"),
        ("/v1/traces", "traces"),
        ("/api/2.0/mlflow/model-versions/create", "models"),
        ("/gateway/chat/invocations", "gateway"),
        ("/api/2.0/mlflow/webhooks", "other_api"),
        ("/", "pages"),
        ("/static-files/static/js/main.js", "pages"),
        ("/etc/passwd", "pages"),
    ],
)
def test_kind_of_a_path(path: str, kind: str) -> None:
    assert kind_of(path) == kind


def values(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    return {
        (sample.name.removeprefix("mlflow_host_"), *sample.labels.values()): sample.value
        for metric in registry.collect()
        for sample in metric.samples
    }


def test_requests_are_counted_by_kind_status_and_by_what_answered() -> None:
    registry = CollectorRegistry()
    artifact = "/api/2.0/mlflow-artifacts/artifacts/0/a/b"
    RequestMetrics(registry).add(
        [
            parsed(),
            parsed(by="-"),
            parsed(status="401", upstream="-", accepted="0", by="-"),
            parsed(status="401", upstream="-", accepted="0", by="-", user="-"),
            parsed(path=artifact, method="PUT"),
            parsed(path=artifact, method="GET", writes="0"),
        ]
    )
    found = values(registry)
    assert found["requests_total", "log_metric", "200", "direct"] == 1
    assert found["requests_total", "log_metric", "200", "mlflow"] == 1
    assert found["requests_total", "log_metric", "401", "nginx"] == 2
    assert found["logins_refused_total",] == 1
    assert found["audit_lines_total",] == 5
    assert (found["artifact_bytes_total", "in"], found["artifact_bytes_total", "out"]) == (620, 4)
    assert found["request_duration_seconds_bucket", "log_metric", "0.005"] == 4
    assert found["request_duration_seconds_count", "artifacts"] == 2


# ── The machine ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Answers(BaseHTTPRequestHandler):
    """A stand-in for nginx's monitoring socket. It reports two requests in addition to the monitor's own request, and
    one of two server processes is down."""

    def do_GET(self) -> None:
        load = {"waiting": {"requests": 3, "files": 0}, "threads": {"requests": 8, "files": 2}, "connections": 5}
        told = {
            "/requests": "Active connections: 9 \nserver accepts handled requests\n 9 9 9 \n"
            "Reading: 0 Writing: 3 Waiting: 6 \n",
            "/processes/1": json.dumps(load),
        }
        body = told.get(self.path, "").encode()
        self.send_response(200 if body else 502)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return ""

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """Yield a machine without PostgreSQL, with its files below `tmp_path`."""
    for folder in ("backups", "reports", "web"):
        (tmp_path / folder).mkdir()
    (tmp_path / "backups/dump.json").write_text('{"at": "2026-11-29T00:00:00Z"}')
    (tmp_path / "web/backups.json").write_text('{"problems": ["late"]}')
    (tmp_path / "image.json").write_text(
        json.dumps({"mlflow_version": "3.17.2", "image_version": "20261130T000000Z", "migration_head": "dc11669786a5"})
    )
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(
        "#!/bin/sh\nprintf 'NRestarts=0\\nId=nginx.service\\n\\nNRestarts=2\\nId=mlflow-server@1.service\\n'\n"
    )
    systemctl.chmod(0o755)
    server = socketserver.ThreadingUnixStreamServer(str(tmp_path / "nginx.sock"), Answers)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield Machine(
            cluster=Cluster(host=str(tmp_path)),
            nginx=tmp_path / "nginx.sock",
            data=tmp_path,
            run=tmp_path,
            facts=tmp_path / "image.json",
            systemctl=str(systemctl),
            waiting=lambda: 2,
            processes=1,
        )
    finally:
        server.shutdown()
        server.server_close()


def registry_of(machine: Machine) -> CollectorRegistry:
    registry = CollectorRegistry()
    RequestMetrics(registry).add([parsed()])
    registry.register(machine)
    return registry


def test_part_that_fails_leaves_the_others(machine: Machine) -> None:
    found = values(registry_of(machine))
    assert found["collector_success", "postgresql"] == 0
    assert [found["collector_success", part] for part in ("versions", "requests", "load", "space", "restarts")] == [
        1
    ] * 5
    assert found["requests_in_flight",] == 2
    assert found["requests_waiting", "1", "requests"] == 3
    assert found["pool_connections_used", "1"] == 5
    assert found["backup_problems",] == 1 and found["audit_files_waiting",] == 2
    assert found["backup_age_seconds", "dump"] > 0 and ("backup_age_seconds", "base") not in found
    assert found["unit_restarts_total", "mlflow-server@1"] == 2 and found["unit_restarts_total", "nginx"] == 0
    assert found["filesystem_free_bytes", "/"] > 0 and found["memory_total_bytes",] > 0
    assert found["info", "3.17.2", "20261130T000000Z", "dc11669786a5"] == 1


def test_process_that_is_down_is_named_by_the_collector(machine: Machine) -> None:
    machine.processes = 2
    found = values(registry_of(machine))
    assert found["collector_success", "load"] == 0 and found["collector_success", "requests"] == 1


@pytest.mark.service
def test_postgresql_is_measured(machine: Machine, cluster: PostgreSQL) -> None:
    machine.cluster = Cluster(host=str(cluster.sockets), port=cluster.port)
    found = values(registry_of(machine))
    assert found["collector_success", "postgresql"] == 1
    assert found["postgresql_connections", "active"] >= 1
    assert found["postgresql_database_size_bytes",] > 1e6
    assert found["postgresql_replication_slots",] == 0


# ── Scrapes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def served(machine: Machine, tmp_path: Path) -> Iterator[Path]:
    server = scraping.serve(tmp_path / "metrics.sock", registry_of(machine))
    yield tmp_path / "metrics.sock"
    server.shutdown()
    server.server_close()


def test_scrape_is_in_the_format_that_the_client_accepts(served: Path) -> None:
    plain = metrics.ask(served, "/").decode()
    assert [*text_format(plain)] and "# EOF" not in plain
    with pytest.MonkeyPatch.context() as patch:
        connection = metrics._UnixConnection(served)
        patch.setattr(connection, "timeout", 5)
        connection.request("GET", "/", headers={"Accept": "application/openmetrics-text;version=1.0.0"})
        answer = connection.getresponse()
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
        assert {family.name for family in openmetrics(answer.read().decode())} >= {
            "mlflow_host_requests",
            "mlflow_host",
        }
        connection.close()


def test_many_scrapes_measure_once_a_second(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def versions(self: Machine) -> Iterator[Metric]:
        measured.append(1)
        yield from ()

    monkeypatch.setattr(scraping, "KEEP_SECONDS", 60)
    monkeypatch.setattr(Machine, "versions", versions)
    assert len({metrics.ask(served, "/") for _ in range(20)}) == 1
    assert len(measured) == 1


@promtool
@pytest.mark.service
def test_promtool_finds_nothing_to_improve(served: Path) -> None:
    done = subprocess.run(["promtool", "check", "metrics"], input=metrics.ask(served, "/"), capture_output=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


@promtool
@pytest.mark.service
def test_promtool_accepts_the_example_rules() -> None:
    done = subprocess.run(["promtool", "check", "rules", str(RULES)], capture_output=True, text=True)
    assert done.returncode == 0 and "SUCCESS" in done.stdout, done.stdout + done.stderr


def test_rules_and_readme_name_metrics_that_exist(machine: Machine) -> None:
    names = {metric.name for metric in registry_of(machine).collect()}
    names |= {"mlflow_host_postgresql_connections", "mlflow_host_postgresql_longest_statement_seconds"}
    names |= {"mlflow_host_postgresql_database_size_bytes", "mlflow_host_postgresql_replication_slots"}
    readme = (RULES.parents[1] / "provisioning/README.md").read_text()
    listed = set(re.findall(r"^\| `(mlflow_host\w*)`", readme, re.MULTILINE))
    assert {name.removesuffix("_total").removesuffix("_info") for name in listed} == names
    used = set(re.findall(r"mlflow_host_\w+", RULES.read_text()))
    assert {re.sub("_(total|bucket|count|sum)$", "", name) for name in used} <= names
