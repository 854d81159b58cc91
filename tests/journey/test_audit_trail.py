"""The audit trail of a launched server names the user of each change, and is stored in the journal and the bucket."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

import pytest
from mlflow import MlflowClient

from scripts.local_cloud import LocalCloud
from tests.support.servers import Server, on_machine, script

pytestmark = pytest.mark.machine


def lines_since(began: datetime, *arguments: str) -> list[dict[str, Any]]:
    told = script("audit_trail.py", "--since", began.isoformat(), "--json", *arguments).stdout
    return [json.loads(line) for line in told.splitlines()]


def test_every_change_and_refusal_is_read_back(
    server: Server, cloud: LocalCloud, client: MlflowClient, logins: dict[str, tuple[str, str]]
) -> None:
    # nginx refused the users' first logins before it had their passwords. The audit trail limits the number of refusals
    # per minute, so the test waits for the next minute.
    time.sleep(60 - time.time() % 60)
    began = datetime.now(UTC).replace(microsecond=0)
    experiment = client.create_experiment(f"audited-{time.time_ns()}")
    run = client.create_run(experiment).info.run_id
    client.log_metric(run, "loss", 0.5)  # The fast path answers this request.
    client.set_tag(run, "note", "hunter2 is no part of the trail")  # MLflow answers this request.
    client.log_text(run, "hello", "notes/hello.txt")
    client.delete_run(run)
    delete = "/api/2.0/mlflow/runs/delete"
    assert server.ask(delete, "POST", json={"run_id": run}, auth=logins["reader"]).status_code == 403
    assert server.ask(f"{delete}?token=hunter2", "POST", json={}, auth=("eve", "hunter2")).status_code == 401
    time.sleep(3)  # nginx writes its log every second
    on_machine(cloud, server, "systemctl", "restart", "mlflow-host-monitor")
    found = lines_since(began)
    ours = [line for line in found if line.get("user") == server.username]
    by_route = {line["route"].rpartition("mlflow/")[2]: line for line in ours}
    for route in ("experiments/create", "runs/create", "runs/log-metric", "runs/set-tag"):
        line = by_route[route]
        assert (line["user"], line["role"], line["login"], line["status"]) == (
            server.username,
            "admin",
            "accepted",
            200,
        )
        assert run in line["ids"].values() or experiment in line["ids"].values()
    assert by_route["runs/create"]["ids"]["run_id"] == run
    (uploaded,) = [line for line in ours if line["ids"].get("artifact_path", "").endswith("notes/hello.txt")]
    assert (uploaded["method"], uploaded["status"]) == ("PUT", 200)
    # Each nginx process writes its log lines once per second, so lines of the same second are in any order.
    deletions = [(line["user"], line["login"], line["status"]) for line in found if line.get("route") == delete]
    assert sorted(deletions) == [
        (server.username, "accepted", 200),
        (logins["reader"][0], "accepted", 403),
        ("eve", "refused", 401),
    ]
    journal = on_machine(cloud, server, "journalctl", "--namespace=mlflow-audit", "--output=cat", "--no-pager")
    assert {json.dumps(line, separators=(",", ":")) for line in found} <= set(journal.splitlines())
    assert "hunter2" not in journal + json.dumps(found)
    assert len(lines_since(began, "--id", run, "--user", server.username)) == 5
    refusals = lines_since(began, "--refused")
    assert {line["status"] for line in refusals if "more_refusals" not in line} == {401, 403}


def test_trail_of_a_machine_that_stops_is_in_the_bucket(
    server: Server, cloud: LocalCloud, client: MlflowClient
) -> None:
    began = datetime.now(UTC).replace(microsecond=0)
    name = f"before-the-stop-{time.time_ns()}"
    client.create_experiment(name)
    ec2, machine = cloud.client("ec2"), [server.instance_id]
    ec2.stop_instances(InstanceIds=machine)
    ec2.get_waiter("instance_stopped").wait(InstanceIds=machine, WaiterConfig={"Delay": 2, "MaxAttempts": 60})
    try:
        found = [line for line in lines_since(began) if line.get("ids", {}).get("name") == name]
        assert [line["status"] for line in found] == [200], "the trail's last lines are not in the bucket"
    finally:
        ec2.start_instances(InstanceIds=machine)
        deadline = time.monotonic() + 180
        while not server.answers():
            assert time.monotonic() < deadline, "the server does not answer after its start"
            time.sleep(1)
