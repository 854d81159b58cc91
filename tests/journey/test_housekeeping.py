"""The server removes objects that users deleted long ago, except objects of registered model versions. The server
reports if the data volume becomes full."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient

from mlflow_host.contract import alarms
from scripts.local_cloud import LocalCloud
from scripts.rehearsal import stack
from tests.support import user_mode_linux
from tests.support.servers import Server, launch_server, on_machine, own_stack, script

pytestmark = pytest.mark.machine


@pytest.fixture
def keys(cloud: LocalCloud, server: Server) -> Callable[[str, str], set[str]]:
    """Return a function that lists all keys that contain a text in the buckets artifacts and models. The function lists
    the keys of current objects or of object versions."""

    def keys(holding: str, kind: str = "Contents") -> set[str]:
        client, operation = cloud.client("s3"), "list_objects_v2" if kind == "Contents" else "list_object_versions"
        pages = [
            page
            for bucket in (server.buckets["artifacts"], server.buckets["models"])
            for page in client.get_paginator(operation).paginate(Bucket=bucket)
        ]
        return {each["Key"] for page in pages for each in page.get(kind, []) if holding in each["Key"]}

    return keys


def test_weekly_unit_removes_old_deleted_items_and_none_that_is_registered(
    cloud: LocalCloud, server: Server, client: MlflowClient, tmp_path: Path, keys: Callable[..., set[str]]
) -> None:
    experiment = client.create_experiment("deleted long ago")
    (tmp_path / "MLmodel").write_text("flavors: {}")

    def run(name: str) -> str:
        made: str = client.create_run(experiment, run_name=name).info.run_id
        client.log_text(made, name, "model/MLmodel")
        return made

    def model(name: str) -> str:
        made: str = client.create_logged_model(experiment, name).model_id
        client.log_model_artifacts(made, str(tmp_path))
        return made

    going, staying = {run("going"), model("going")}, {run("staying"), model("staying")}
    client.create_registered_model("stays")
    for each in staying:
        of_model = each.startswith("m-")
        source, model_id = (f"models:/{each}", each) if of_model else (f"runs:/{each}/model", None)
        client.create_model_version("stays", source, run_id=None if of_model else each, model_id=model_id)
    for each in going | staying:
        (client.delete_logged_model if each.startswith("m-") else client.delete_run)(each)

    first_look = on_machine(cloud, server, "mlflow-host-gc")
    assert "nothing would be removed" in first_look, "all of it can still be restored"
    earlier = 40 * 24 * 3600 * 1000
    for table, column in (("runs", "deleted_time"), ("logged_models", "last_updated_timestamp_ms")):
        statement = f"UPDATE {table} SET {column} = {column} - {earlier} WHERE experiment_id = {experiment}"
        on_machine(cloud, server, "runuser", "-u", "postgres", "--", "psql", "-qd", "mlflow", "-c", statement)

    on_machine(cloud, server, "systemctl", "start", "mlflow-host-gc.service")
    told: dict[str, Any] = server.ask("/mlflow-host/garbage.json", auth=server.login).json()
    assert {each["id"] for each in told["removed"]} == going
    assert {each["id"] for each in told["kept"]} == staying
    assert told["failed"] == [] and f"s3://{server.buckets['backups']}/dumps/" in told["dump"]
    for each in going:
        assert keys(each) == set()
        assert keys(each, "Versions"), "a removed object can be recovered during the buckets' retention"
    for each in staying:
        assert keys(each)
    assert client.get_model_version("stays", "1").name == "stays"
    assert client.search_runs([experiment], run_view_type=2)[0].info.run_id in staying


@pytest.mark.slow
def test_the_weekly_timer_starts_the_removal_by_itself(cloud: LocalCloud, server: Server) -> None:
    """The timer normally starts the removal on Sunday night. The test sets the timer to a time a few seconds later."""
    (timer,) = json.loads(on_machine(cloud, server, "systemctl", "list-timers", "--output=json", GC_TIMER))
    planned = datetime.fromtimestamp(timer["next"] / 1e6, UTC)
    assert planned.strftime("%A") == "Sunday" and (2, 40) <= (planned.hour, planned.minute) <= (3, 10)

    soon = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=10)
    lines = [
        "[Timer]",
        "OnCalendar=",
        f"OnCalendar={soon:%Y-%m-%d %H:%M:%S} UTC",
        "RandomizedDelaySec=0",
        "AccuracySec=1",
    ]
    folder = f"/run/systemd/system/{GC_TIMER}.d"
    drop_in = f"mkdir {folder} && printf '%s\\n' {shlex.join(lines)} >{folder}/soon.conf && systemctl daemon-reload"
    on_machine(cloud, server, "sh", "-c", drop_in)
    try:
        deadline = time.monotonic() + 60
        while last_removal(server) < soon:
            assert time.monotonic() < deadline, on_machine(cloud, server, "systemctl", "list-timers", GC_TIMER)
            time.sleep(0.5)
    finally:
        on_machine(cloud, server, "sh", "-c", f"rm -r {folder}; systemctl daemon-reload")


GC_TIMER = "mlflow-host-gc.timer"


def last_removal(server: Server) -> datetime:
    """Return the time of the last report, or a time long ago if there is no report."""
    answer = server.ask("/mlflow-host/garbage.json", auth=server.login)
    return datetime.fromisoformat(answer.json()["at"] or "2000-01-01T00:00:00Z")


def test_artifacts_under_another_layout_stay_readable(
    cloud: LocalCloud, server: Server, client: MlflowClient, request: pytest.FixtureRequest
) -> None:
    """A server without our plug-in stored these artifacts elsewhere in the bucket."""
    bucket = server.buckets["artifacts"]
    experiment = client.create_experiment("another layout", artifact_location=f"s3://{bucket}/old/layout")
    request.addfinalizer(lambda: client.delete_experiment(experiment))  # clients cannot list artifacts in this layout
    run = client.create_run(experiment).info
    assert run.artifact_uri == f"s3://{bucket}/old/layout/{run.run_id}/artifacts"
    key = f"old/layout/{run.run_id}/artifacts/plots/curve.txt"
    cloud.client("s3").put_object(Bucket=bucket, Key=key, Body=b"up and to the right")
    listed = server.ask(f"/api/2.0/mlflow/artifacts/list?run_id={run.run_id}&path=plots", auth=server.login).json()
    assert [each["path"] for each in listed["files"]] == ["plots/curve.txt"]
    asked = f"/get-artifact?path=plots/curve.txt&run_uuid={run.run_id}"
    assert server.ask(asked, auth=server.login).content == b"up and to the right"


def test_cloudwatch_gets_the_metrics_of_the_alarms(cloud: LocalCloud, server: Server) -> None:
    for unit in ("mlflow-host-room.service", "mlflow-host-backups-check.service", "mlflow-host-metrics.service"):
        on_machine(cloud, server, "systemctl", "start", unit)
    client = cloud.client("cloudwatch")
    found = [each for each in client.describe_alarms()["MetricAlarms"] if is_of(each, stack.STACK)]
    ours = {each["MetricName"]: each for each in found if each["Namespace"].startswith("mlflow-ami/")}
    assert set(ours) == {alarm.metric for alarm in alarms.ALARMS}
    now = datetime.now(UTC)
    values = {}
    for name, alarm in ours.items():
        watched = {"Namespace": alarm["Namespace"], "MetricName": name, "Dimensions": alarm["Dimensions"]}
        # moto lists a metric without dimensions several times: once for each of its values.
        assert watched in client.list_metrics(**watched)["Metrics"], "the machine sends the alarm's metric"
        (point, *_) = client.get_metric_statistics(
            **watched,
            StartTime=now - timedelta(minutes=5),
            EndTime=now + timedelta(minutes=1),
            Period=600,
            Statistics=["Maximum"],
        )["Datapoints"]
        values[name] = point["Maximum"]
    assert values["ServerAnswers"] == 1, values
    assert 0 < values["DiskUsedPercent"] < 90 and 0 < values["MemoryUsedPercent"] < 100, values
    assert values["CertificateDaysLeft"] > 14, values


def is_of(alarm: Mapping[str, Any], name: str) -> bool:
    """Return whether an alarm belongs to the stack of that name."""
    return bool(re.search(rf"mlflow-{re.escape(name)}(?![\w-])", alarm["AlarmDescription"]))


@pytest.mark.slow
def test_operators_are_notified_within_five_minutes_of_a_dead_server_and_of_a_broken_archive(
    cloud: LocalCloud, image: Mapping[str, Any]
) -> None:
    """MLflow, the archive and the machine are stopped one after the other. The machine's own timers run the checks."""
    topic, queue = pager(cloud)
    with own_stack(cloud, "dead"):
        own = launch_server("--ami", image["ami_id"], "--set", f"alarmTopicArn={topic}")
        until(lambda: states(cloud, "dead")["server-down"] == states(cloud, "dead")["backups-late"] == "OK", 180)
        on_machine(cloud, own, "systemctl", "stop", "mlflow-server@1.service", "mlflow-server@2.service")
        on_machine(cloud, own, "systemctl", "mask", "--runtime", "--now", "mlflow-host-archive.service")
        on_machine(cloud, own, "su", "postgres", "-s", "/bin/sh", "-c", "psql -qc 'SELECT pg_switch_wal()' mlflow")
        until(lambda: states(cloud, "dead")["server-down"] == states(cloud, "dead")["backups-late"] == "ALARM", 300)
        on_machine(cloud, own, "systemctl", "unmask", "--runtime", "mlflow-host-archive.service")
        on_machine(cloud, own, "systemctl", "start", "mlflow-host-archive.service")
        on_machine(cloud, own, "systemctl", "start", "mlflow-server@1.service", "mlflow-server@2.service")
        until(lambda: states(cloud, "dead")["server-down"] == states(cloud, "dead")["backups-late"] == "OK", 300)
        cloud.client("ec2").stop_instances(InstanceIds=[own.instance_id])
        until(lambda: states(cloud, "dead")["server-down"] == "ALARM", 300)
    told = [(each["AlarmName"].rsplit("-", 1)[0], each["NewStateValue"]) for each in received(cloud, queue)]
    assert told.count(("server-down", "ALARM")) == 2 and ("backups-late", "ALARM") in told, told


def pager(cloud: LocalCloud) -> tuple[str, str]:
    """Create an SNS topic and a queue that is subscribed to it. Returns the topic's ARN and the queue's URL."""
    sns, sqs = cloud.client("sns"), cloud.client("sqs")
    topic = sns.create_topic(Name="operators")["TopicArn"]
    queue = sqs.create_queue(QueueName="pager")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=arn)
    return str(topic), str(queue)


def received(cloud: LocalCloud, queue: str) -> list[dict[str, Any]]:
    """Remove the messages about alarms from a queue and return them."""
    sqs, found = cloud.client("sqs"), []
    while got := sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=10).get("Messages"):
        found += [dict(json.loads(json.loads(each["Body"])["Message"])) for each in got]
        for each in got:
            sqs.delete_message(QueueUrl=queue, ReceiptHandle=each["ReceiptHandle"])
    return found


def states(cloud: LocalCloud, name: str) -> dict[str, str]:
    """Return the state of each alarm of a stack. The keys are the alarm names without the stack's name."""
    found = cloud.client("cloudwatch").describe_alarms()["MetricAlarms"]
    return {each["AlarmName"].rsplit("-", 1)[0]: str(each["StateValue"]) for each in found if is_of(each, name)}


@pytest.mark.slow
def test_a_volume_that_fills_up_sets_off_the_alarm_then_takes_no_writes_until_there_is_room(
    cloud: LocalCloud, image: Mapping[str, Any]
) -> None:
    """The machine's own timers send the metric. The local cloud evaluates the alarm in the same way as CloudWatch."""
    topic, queue = pager(cloud)
    with own_stack(cloud, "full"):
        own = launch_server("--ami", image["ami_id"], "--set", f"alarmTopicArn={topic}", "--set", "dataVolumeGib=8")

        def alarm() -> str:
            return states(cloud, "full")["data-volume-full"]

        def leave(percent: int) -> None:
            """Fill the data volume with a file so that `percent` percent of the volume is free."""
            on_machine(cloud, own, "rm", "-f", "/srv/mlflow/ballast")
            line = "df --output=size,avail -B1M /srv/mlflow | tail -1"
            size, available = map(int, on_machine(cloud, own, "sh", "-c", line).split())
            on_machine(cloud, own, "fallocate", "-l", f"{available - size * percent // 100}M", "/srv/mlflow/ballast")

        def room() -> dict[str, Any]:
            found: dict[str, Any] = own.ask("/mlflow-host/room.json", auth=own.login).json()
            return found

        def write() -> requests.Response:
            named = {"name": f"written {time.time_ns()}"}
            return own.ask("/api/2.0/mlflow/experiments/create", "POST", json=named, auth=own.login)

        until(lambda: alarm() == "OK", 120)  # the machine sends the metric for the first time a minute after its boot
        leave(8)
        until(lambda: alarm() == "ALARM", 120)
        assert 90 <= room()["used_percent"] < 97 and "the data volume is 9" in room()["problem"]
        assert "mlflow-host-room.service" in on_machine(cloud, own, "systemctl", "list-units", "--state=failed")
        assert write().status_code == 200

        leave(2)
        until(lambda: bool(room()["refusing"]), 60)
        refused = write()
        assert refused.status_code == 507 and "data volume is full" in refused.json()["message"]
        assert own.answers(), "reads still work"
        script("rehearse.py", "up", "--ami", image["ami_id"], "--set", "dataVolumeGib=16")
        if not user_mode_linux.has_capability(user_mode_linux.CAP_SYS_RESOURCE):
            # The machine has at most the capabilities of this process, so resize2fs fails on the machine.
            until(lambda: "its file system has 8.0 GiB, because resize2fs failed" in room()["problem"], 60)
            page = on_machine(cloud, own, "cat", "/run/mlflow-host/web/status.html")
            assert "because resize2fs failed" in page and own.answers()
            leave(50)
        until(lambda: write().status_code == 200, 60)
        if user_mode_linux.has_capability(user_mode_linux.CAP_SYS_RESOURCE):
            until(lambda: not on_machine(cloud, own, "systemctl", "list-units", "--state=failed", "--no-legend"), 60)
    messages = [each for each in received(cloud, queue) if each["AlarmName"].startswith("data-volume-full-")]
    assert "ALARM" in [each["NewStateValue"] for each in messages]
    assert all("Enlarge the volume (the setting dataVolumeGib)" in each["AlarmDescription"] for each in messages)


def until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(1)


def test_backups_are_reported_from_the_first_minute(cloud: LocalCloud, server: Server) -> None:
    deadline = time.monotonic() + 60
    while (answer := server.ask("/mlflow-host/backups.json", auth=server.login)).status_code == 503:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert answer.json()["problems"] == []
