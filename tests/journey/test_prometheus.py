"""A real Prometheus scrapes a launched server, and promtool accepts the server's metrics."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.support.servers import Server
from tests.support.services import free_port, process

pytestmark = [
    pytest.mark.machine,
    pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is not installed (scripts/prepare.sh)"),
]

METRICS = "/mlflow-host/metrics"


@pytest.fixture
def prometheus(server: Server, logins: dict[str, tuple[str, str]], tmp_path: Path) -> Iterator[str]:
    """Run a Prometheus that scrapes the server every second as a reader, and yield its address."""
    name, password = logins["reader"]
    scheme, _, target = server.url.partition("://")
    job = {
        "job_name": "mlflow",
        "scheme": scheme,
        "metrics_path": METRICS,
        "basic_auth": {"username": name, "password": password},
        "tls_config": {"ca_file": server.server_certificate},
        "static_configs": [{"targets": [target]}],
    }
    rules = Path(__file__).parents[2] / "infra/prometheus-rules.yaml"
    content = {"global": {"scrape_interval": "1s"}, "rule_files": [str(rules)], "scrape_configs": [job]}
    (tmp_path / "prometheus.yml").write_text(json.dumps(content))
    port = free_port()
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with process([*command, f"--web.listen-address=127.0.0.1:{port}"], tmp_path / "prometheus.log"):
        yield f"http://127.0.0.1:{port}"


def query(address: str, expression: str) -> dict[tuple[str, ...], float]:
    try:
        with urllib.request.urlopen(f"{address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}") as told:
            found: list[dict[str, Any]] = json.load(told)["data"]["result"]
    except OSError:
        return {}
    return {tuple(each["metric"].values()): float(each["value"][1]) for each in found}


def test_prometheus_scrapes_requests_and_the_machine(server: Server, client: MlflowClient, prometheus: str) -> None:
    run = client.create_run("0").info.run_id
    for step in range(20):
        client.log_metric(run, "loss", step, step=step)
    deadline = time.monotonic() + 60
    counted = 'sum by (kind, by) (mlflow_host_requests_total{status="200",kind=~"log_metric|create_run"})'
    while query(prometheus, counted).get(("direct", "log_metric"), 0) < 20:
        assert time.monotonic() < deadline, query(prometheus, "up") or "Prometheus does not answer"
        time.sleep(0.5)
    assert query(prometheus, 'max(up{job="mlflow"})') == {(): 1}
    assert query(prometheus, "min(mlflow_host_collector_success)") == {(): 1}
    assert query(prometheus, f'count(mlflow_host_info{{mlflow_version="{server.mlflow_version}"}})') == {(): 1}
    assert query(prometheus, "max(mlflow_host_postgresql_replication_slots)") == {(): 0}
    median = "histogram_quantile(0.5, sum by (le) (mlflow_host_request_duration_seconds_bucket{kind='log_metric'}))"
    assert 0 < query(prometheus, median)[()] < 5
    with urllib.request.urlopen(f"{prometheus}/api/v1/rules") as told:
        assert [group["name"] for group in json.load(told)["data"]["groups"]] == ["mlflow-ami"]


def test_promtool_accepts_a_scrape(server: Server, logins: dict[str, tuple[str, str]]) -> None:
    told = server.ask(METRICS, auth=logins["reader"])
    assert told.status_code == 200
    done = subprocess.run(["promtool", "check", "metrics"], input=told.content, capture_output=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")
    assert server.ask(METRICS).status_code == 401


def test_page_of_the_server_is_drawn_from_its_requests(server: Server, logins: dict[str, tuple[str, str]]) -> None:
    """The monitor writes the page /mlflow-host/ once per minute."""
    deadline = time.monotonic() + 150
    while (
        (told := server.ask("/mlflow-host/", auth=logins["reader"])).status_code != 200
        or "<svg" not in told.text
        or logins["reader"][0] not in told.text
    ):
        assert time.monotonic() < deadline, (told.status_code, told.text[-500:])
        time.sleep(2)
    assert f"MLflow {server.mlflow_version}" in told.text and "not written" not in told.text
    assert server.ask("/mlflow-host/").status_code == 401
