"""What users deleted long ago goes for good, and nothing a registered version stands on; what fills up is told."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests
from local_cloud import LocalCloud
from mlflow import MlflowClient
from servers import Server, launch_server, on_machine, own_stack

pytestmark = pytest.mark.machine


@pytest.fixture
def keys(cloud: LocalCloud, server: Server) -> Callable[[str, str], set[str]]:
    """Keys in both buckets that hold a text: of present objects, or of versions."""

    def keys(holding: str, kind: str = "Contents") -> set[str]:
        client, operation = cloud.client("s3"), "list_objects_v2" if kind == "Contents" else "list_object_versions"
        pages = [
            page
            for bucket in (server.buckets["artifacts"], server.buckets["models"])
            for page in client.get_paginator(operation).paginate(Bucket=bucket)
        ]
        return {each["Key"] for page in pages for each in page.get(kind, []) if holding in each["Key"]}

    return keys


def test_the_weekly_unit_removes_what_was_deleted_long_ago_and_nothing_that_is_registered(
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
        assert keys(each, "Versions"), "an object that was removed can be had back for the buckets' retention"
    for each in staying:
        assert keys(each)
    assert client.get_model_version("stays", "1").name == "stays"
    assert client.search_runs([experiment], run_view_type=2)[0].info.run_id in staying


@pytest.mark.slow
def test_the_weekly_timer_starts_the_removal_by_itself(cloud: LocalCloud, server: Server) -> None:
    """Its own time is a Sunday night; then it is told of another, in a few seconds, and nothing is started by hand."""
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
    """When the last report was finished, long ago where there is none."""
    answer = server.ask("/mlflow-host/garbage.json", auth=server.login)
    return datetime.fromisoformat(answer.json()["at"] if answer.status_code == 200 else "2000-01-01T00:00:00Z")


def test_artifacts_under_another_layout_stay_readable(
    cloud: LocalCloud, server: Server, client: MlflowClient, request: pytest.FixtureRequest
) -> None:
    """As a server left them that kept its artifacts elsewhere in the bucket, without a plug-in."""
    bucket = server.buckets["artifacts"]
    experiment = client.create_experiment("another layout", artifact_location=f"s3://{bucket}/old/layout")
    request.addfinalizer(lambda: client.delete_experiment(experiment))  # a client here cannot list its artifacts
    run = client.create_run(experiment).info
    assert run.artifact_uri == f"s3://{bucket}/old/layout/{run.run_id}/artifacts"
    key = f"old/layout/{run.run_id}/artifacts/plots/curve.txt"
    cloud.client("s3").put_object(Bucket=bucket, Key=key, Body=b"up and to the right")
    listed = server.ask(f"/api/2.0/mlflow/artifacts/list?run_id={run.run_id}&path=plots", auth=server.login).json()
    assert [each["path"] for each in listed["files"]] == ["plots/curve.txt"]
    asked = f"/get-artifact?path=plots/curve.txt&run_uuid={run.run_id}"
    assert server.ask(asked, auth=server.login).content == b"up and to the right"


def test_cloudwatch_is_told_how_full_the_data_volume_is_and_watches_it(cloud: LocalCloud, server: Server) -> None:
    on_machine(cloud, server, "systemctl", "start", "mlflow-host-room.service")
    on_machine(cloud, server, "systemctl", "start", "mlflow-host-metrics.service")
    client = cloud.client("cloudwatch")
    (alarm,) = client.describe_alarms(AlarmNamePrefix="data-volume-full")["MetricAlarms"]
    assert (alarm["Threshold"], alarm["ComparisonOperator"]) == (90, "GreaterThanOrEqualToThreshold")
    watched = {"Namespace": alarm["Namespace"], "MetricName": alarm["MetricName"], "Dimensions": alarm["Dimensions"]}
    assert client.list_metrics(**watched)["Metrics"] == [watched], "what the machine tells is what the alarm watches"


@pytest.mark.slow
def test_a_volume_that_fills_up_sets_off_the_alarm_then_takes_no_writes_until_there_is_room(
    cloud: LocalCloud, image: Mapping[str, Any]
) -> None:
    """By the machine's own timers; the local cloud evaluates the alarm as CloudWatch would."""
    cloudwatch, sns, sqs = (cloud.client(service) for service in ("cloudwatch", "sns", "sqs"))
    topic = sns.create_topic(Name="operators")["TopicArn"]
    queue = sqs.create_queue(QueueName="pager")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=arn)
    with own_stack(cloud, "full"):
        own = launch_server("--ami", image["ami_id"], "--set", f"alarmTopicArn={topic}", "--set", "dataVolumeGib=8")

        def alarm() -> str:
            alarms = cloudwatch.describe_alarms(AlarmNamePrefix="data-volume-full")["MetricAlarms"]
            (ours,) = (each for each in alarms if "mlflow-full is" in each["AlarmDescription"])
            return str(ours["StateValue"])

        def leave(percent: int) -> None:
            """Of the data volume, with a file that takes the rest."""
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

        until(lambda: alarm() == "OK", 120)  # the machine tells it for the first time a minute after its boot
        leave(8)
        on_machine(cloud, own, "systemctl", "restart", "mlflow-host-metrics.timer")  # a minute instead of five
        until(lambda: alarm() == "ALARM", 120)
        assert 90 <= room()["used_percent"] < 97 and "the data volume is 9" in room()["problem"]
        assert "mlflow-host-room.service" in on_machine(cloud, own, "systemctl", "list-units", "--state=failed")
        assert write().status_code == 200

        leave(2)
        until(lambda: bool(room()["refusing"]), 60)
        refused = write()
        assert refused.status_code == 507 and "data volume is full" in refused.json()["message"]
        assert own.answers(), "what is there can be read"
        leave(50)
        until(lambda: write().status_code == 200, 60)
        until(lambda: not on_machine(cloud, own, "systemctl", "list-units", "--state=failed", "--no-legend"), 60)
    received = sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=10)["Messages"]
    messages = [json.loads(json.loads(each["Body"])["Message"]) for each in received]
    assert "ALARM" in [each["NewStateValue"] for each in messages]
    assert all("Enlarge it (the setting dataVolumeGib)" in each["AlarmDescription"] for each in messages)


def until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(1)


def test_backups_are_told_from_the_first_minute(cloud: LocalCloud, server: Server) -> None:
    deadline = time.monotonic() + 60
    while (answer := server.ask("/mlflow-host/backups.json", auth=server.login)).status_code == 404:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert answer.json()["problems"] == []
