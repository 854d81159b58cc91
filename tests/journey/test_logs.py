"""CloudWatch Logs has the journal of a launched server: the lines of nginx, MLflow and the host, and no secret."""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mlflow_host.contract import alarms
from scripts.local_cloud import LocalCloud
from tests.support.canaries import logged, names, secrets_of
from tests.support.servers import Server, launch_server, on_machine, own_stack

pytestmark = pytest.mark.machine

STACK = "logged"
GROUP = f"/mlflow-ami/{STACK}"


@pytest.fixture(scope="module")
def own(cloud: LocalCloud, image: Mapping[str, Any]) -> Iterator[Server]:
    """Launch a server in a stack with a log group and a dashboard."""
    with own_stack(cloud, STACK):
        yield launch_server("--ami", image["ami_id"], "--set", "logRetentionDays=3", "--set", "dashboard=true")


def lines(cloud: LocalCloud, stream: str) -> list[dict[str, Any]]:
    """Return the lines of all machines' log streams with the name `stream`. Each line has a unit, a priority and a
    message."""
    found = [each for each in logged(cloud, GROUP) if each["logStreamName"].endswith(f"/{stream}")]
    return [json.loads(each["message"]) for each in found]


def within(seconds: int, holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def test_lines_of_nginx_mlflow_and_the_boot_arrive_within_a_minute(own: Server, cloud: LocalCloud) -> None:
    steps = {"mlflow-host-configure.service", "mlflow-host-database.service", "mlflow-host-postgresql.service"}
    assert within(60, lambda: steps <= {each["unit"] for each in lines(cloud, "host")})
    assert within(60, lambda: any("mlflow-server@1" in each["unit"] for each in lines(cloud, "mlflow")))
    somebody = f"nobody-{uuid.uuid4().hex}"
    assert own.ask("/version", auth=(somebody, "wrong")).status_code == 401
    before = len(lines(cloud, "mlflow"))
    on_machine(cloud, own, "systemctl", "restart", "mlflow-server@1.service")
    assert within(60, lambda: any(somebody in each["message"] for each in lines(cloud, "nginx")))
    assert within(60, lambda: len(lines(cloud, "mlflow")) > before)
    streams = {each["logStreamName"] for each in logged(cloud, GROUP)}
    assert streams == {f"{own.instance_id}/{name}" for name in ("nginx", "mlflow", "host")}


NOISE = 3000
WRITE = f"i=0; while [ $i -lt {NOISE} ]; do echo noise-$i; i=$((i+1)); sleep 0.005; done"


def test_kills_and_restarts_lose_no_line(own: Server, cloud: LocalCloud) -> None:
    on_machine(cloud, own, "systemd-run", "--quiet", "--unit=mlflow-host-noise", "sh", "-c", WRITE)
    for verb in (["kill", "--signal=KILL"], ["restart"], ["kill", "--signal=KILL"]):
        time.sleep(6)
        on_machine(cloud, own, "systemctl", *verb, "mlflow-host-logs.service")
    wanted = {f"noise-{number}" for number in range(NOISE)}

    def arrived() -> Counter[str]:
        return Counter(each["message"] for each in lines(cloud, "host") if each["message"] in wanted)

    assert within(120, lambda: set(arrived()) == wanted), sorted(wanted - set(arrived()))[:10]
    assert arrived().total() < 2 * NOISE, "a kill repeats the lines of one batch, which has those of five seconds"


def test_no_secret_is_in_the_log_group(own: Server, cloud: LocalCloud) -> None:
    canary = uuid.uuid4().hex
    with secrets_of(own, cloud) as secrets:
        for password in (own.password, f"{own.password}x"):
            login = own.username, password
            own.ask("/api/2.0/mlflow/experiments/search", "POST", json={"max_results": "x"}, auth=login)
        on_machine(cloud, own, "systemd-run", "--quiet", "--unit=mlflow-host-canary", "echo", f"a line of {canary}")
        assert within(60, lambda: any(canary in each["message"] for each in lines(cloud, "host")))
        text = "\n".join(each["message"] for each in logged(cloud, GROUP))
        assert names({"canary": canary}, text) == ["canary"], "the search finds nothing at all"
        assert names(secrets, text) == []


def test_dashboard_has_the_numbers_of_the_page(own: Server, cloud: LocalCloud) -> None:
    cloudwatch = cloud.client("cloudwatch")
    body = json.loads(cloudwatch.get_dashboard(DashboardName=f"mlflow-{STACK}")["DashboardBody"])
    plotted = [line for each in body["widgets"] for line in each["properties"]["metrics"]]
    assert {line[1] for line in plotted} == alarms.metrics((), dashboard=True)

    def measured() -> dict[str, float]:
        assert own.answers()
        now, found = datetime.now(UTC), {}
        for namespace, name, *dimension in plotted:
            points = cloudwatch.get_metric_statistics(
                Namespace=namespace,
                MetricName=name,
                Dimensions=[{"Name": dimension[0], "Value": dimension[1]}] if dimension else [],
                StartTime=now - timedelta(minutes=10),
                EndTime=now + timedelta(minutes=1),
                Period=600,
                Statistics=["Maximum"],
            )["Datapoints"]
            if points:
                found[name] = points[0]["Maximum"]
        return found

    assert within(180, lambda: len(found := measured()) == len(plotted) and found[alarms.MEDIAN] > 0), measured()
    assert 0 < measured()[alarms.REQUESTS] < 1000


def test_last_lines_of_a_machine_that_stops_are_in_the_log_group(own: Server, cloud: LocalCloud) -> None:
    ec2, machine = cloud.client("ec2"), [own.instance_id]
    ec2.stop_instances(InstanceIds=machine)
    ec2.get_waiter("instance_stopped").wait(InstanceIds=machine, WaiterConfig={"Delay": 2, "MaxAttempts": 60})
    ends = [each for each in lines(cloud, "host") if each["unit"] == "mlflow-host-postgresql.service"][-5:]
    assert any("Stopped" in each["message"] for each in ends), ends
