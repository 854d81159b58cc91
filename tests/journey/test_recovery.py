"""A part of the server that ends or hangs is restarted without a person, and a metric counts the restart.

On an idle machine, each part is active again within 30 seconds; pytest's option `-rP` prints the times. The tests allow
more time, because test machines are busy: one server process may take 20 seconds to start.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from mlflow import MlflowClient

from scripts.local_cloud import LocalCloud
from tests.support.servers import Server

pytestmark = pytest.mark.machine

PATIENCE_SECONDS = 120
FILL = (
    "dd if=/dev/zero of=/run/fill bs=1M 2>/dev/null; dd if=/dev/zero of=/run/fill2 bs=1k 2>/dev/null; df /run | tail -1"
)


@pytest.fixture
def run(server: Server, client: MlflowClient) -> str:
    identifier: str = client.create_run("0").info.run_id
    return identifier


def show(cloud: LocalCloud, server: Server, unit: str, name: str) -> str:
    return cloud.exec(server.instance_id, ["systemctl", "show", "--value", "--property", name, unit]).stdout.strip()


def restarts(server: Server, login: tuple[str, str], unit: str) -> int:
    told = server.ask("/mlflow-host/metrics", auth=login).text
    (count,) = re.findall(rf'^mlflow_host_unit_restarts_total{{unit="{re.escape(unit)}"}} (\d+)', told, re.MULTILINE)
    return int(count)


def is_back(cloud: LocalCloud, server: Server, unit: str, ended: str) -> bool:
    """Return whether the unit is active with a new process, and the server answers ten times in a row."""
    ready = show(cloud, server, unit, "ActiveState") == "active" and show(cloud, server, unit, "MainPID") != ended
    return ready and all(server.answers() for _ in range(10))


@contextmanager
def counted_restart(cloud: LocalCloud, server: Server, logins: dict[str, Any], unit: str) -> Iterator[str]:
    """Yield a unit's process ID. The `with` block must end this process. After the block, wait until the unit is active
    again, and assert that the metric counted one restart."""
    before, ended = restarts(server, logins["reader"], unit), show(cloud, server, unit, "MainPID")
    yield ended
    began = time.monotonic()
    while not is_back(cloud, server, unit, ended):
        assert time.monotonic() < began + PATIENCE_SECONDS, f"{unit} is not back after {PATIENCE_SECONDS} s"
        time.sleep(0.2)
    print(f"{unit}: back after {time.monotonic() - began:.1f} s")
    time.sleep(1.5)  # the server caches its metrics for one second
    assert restarts(server, logins["reader"], unit) == before + 1


def signal(cloud: LocalCloud, server: Server, name: str, process: str) -> None:
    assert cloud.exec(server.instance_id, ["kill", f"-{name}", process]).returncode == 0


@pytest.mark.parametrize(
    ("unit", "name"),
    [("mlflow-server@1", "KILL"), ("mlflow-server@2", "STOP"), ("nginx", "KILL"), ("mlflow-host-archive", "KILL")],
)
def test_process_that_ends_or_hangs_is_replaced(
    server: Server, cloud: LocalCloud, client: MlflowClient, logins: dict[str, Any], run: str, unit: str, name: str
) -> None:
    client.log_metric(run, "loss", 1.0, step=1)
    with counted_restart(cloud, server, logins, unit) as process:
        signal(cloud, server, name, process)
    client.log_metric(run, "loss", 2.0, step=2)
    assert [point.value for point in client.get_metric_history(run, "loss")] == [1.0, 2.0]
    if name == "STOP":  # the stack traces in the journal show where the process hung
        lines = cloud.exec(server.instance_id, ["journalctl", "-u", unit, "-o", "cat", "--no-pager"]).stdout
        assert "Fatal Python error: Aborted" in lines and "most recent call first" in lines


@pytest.mark.parametrize("unit", ["mlflow-host-postgresql", "nginx"])
def test_postgresql_or_nginx_that_hangs_is_replaced(
    server: Server, cloud: LocalCloud, client: MlflowClient, logins: dict[str, Any], run: str, unit: str
) -> None:
    client.log_metric(run, "loss", 1.0, step=1)
    with counted_restart(cloud, server, logins, unit):
        stopped = cloud.exec(server.instance_id, ["systemctl", "kill", "--signal=SIGSTOP", unit])
        assert stopped.returncode == 0
    client.log_metric(run, "loss", 2.0, step=2)
    assert [point.value for point in client.get_metric_history(run, "loss")] == [1.0, 2.0]
    lines = cloud.exec(
        server.instance_id, ["journalctl", "-u", "mlflow-host-watchdog", "-o", "cat", "--no-pager"]
    ).stdout
    assert f"{unit}.service has not answered for" in lines


def test_server_survives_a_full_run_folder(
    server: Server, cloud: LocalCloud, client: MlflowClient, logins: dict[str, Any], run: str
) -> None:
    """/run is a file system in memory. If /run is full, killed units cannot start. After space in /run is freed, the
    units start automatically."""
    try:
        assert " 100% " in cloud.exec(server.instance_id, ["sh", "-c", FILL]).stdout
        client.log_metric(run, "loss", 1.0, step=1)
        assert server.ask("/mlflow-host/metrics", auth=logins["reader"]).status_code == 200
        processes = {unit: show(cloud, server, unit, "MainPID") for unit in ("mlflow-server@1", "nginx")}
        for process in processes.values():
            signal(cloud, server, "KILL", process)
        time.sleep(20)  # the units' starts fail meanwhile
    finally:
        cloud.exec(server.instance_id, ["rm", "-f", "/run/fill", "/run/fill2"])
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not all(is_back(cloud, server, unit, process) for unit, process in processes.items()):
        assert time.monotonic() < deadline, f"not back {PATIENCE_SECONDS} s after /run has space"
        time.sleep(0.2)
    client.log_metric(run, "loss", 2.0, step=2)
    assert [point.value for point in client.get_metric_history(run, "loss")] == [1.0, 2.0]
