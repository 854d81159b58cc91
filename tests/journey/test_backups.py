"""The server can be restored from its backups: after the loss of the data volume, to any moment, and from a dump.

The tests have their own stack, because they delete its data volume.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from mlflow import MlflowClient

from scripts import recover_backups
from scripts.local_cloud import LocalCloud
from tests.journey.test_role import ASK
from tests.support.servers import Server, client_of, describe_server, launch_server, on_machine, own_stack, script

pytestmark = pytest.mark.machine

PATIENCE_SECONDS = 420
LOST_AT_MOST_SECONDS = 60


@pytest.fixture(scope="module")
def backed_up(cloud: LocalCloud, image: Mapping[str, Any], drill_meanwhile: None) -> Iterator[Server]:
    """Launch a machine and wait for its first base backup, which starts half a minute after the boot."""
    with own_stack(cloud, "backups"):
        server = launch_server("--ami", image["ami_id"])
        wait_until(lambda: history(cloud, server, "base"), "first base backup")
        yield server


def shell(cloud: LocalCloud, server: Server, line: str) -> str:
    """Run a shell command on the machine. Returns its output, even if the command fails."""
    done = cloud.exec(server.instance_id, ["sh", "-c", line], timeout=PATIENCE_SECONDS)
    return done.stdout + done.stderr


def history(cloud: LocalCloud, server: Server, what: str) -> dict[str, Any]:
    """Return one of the JSON files about backups on the data volume, or {} if the file does not exist."""
    found = cloud.exec(server.instance_id, ["cat", f"/srv/mlflow/backups/{what}.json"])
    return dict(json.loads(found.stdout)) if found.returncode == 0 else {}


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(1)


def log(client: MlflowClient, name: str) -> None:
    """Create a run with metrics and a registered model, both named `name`."""
    run = client.create_run("0", run_name=name)
    for number in range(20):
        client.log_metric(run.info.run_id, "loss", 1 / (number + 1), step=number)
    client.set_terminated(run.info.run_id)
    client.create_registered_model(name)
    client.create_model_version(name, f"runs:/{run.info.run_id}/model", run.info.run_id)


def logged(client: MlflowClient) -> dict[str, Any]:
    """Read everything that `log` wrote with MLflow's client, and return this data."""
    runs = {run.info.run_name: run for run in client.search_runs(["0"])}
    return {
        "losses": {
            name: [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "loss")]
            for name, run in runs.items()
        },
        "models": sorted((each.name, each.version) for each in client.search_model_versions()),
    }


def archived_since(cloud: LocalCloud, server: Server, moment: datetime) -> bool:
    """Return whether the archive has a WAL segment that was finished after `moment`."""
    at = history(cloud, server, "archive").get("at")
    return at is not None and datetime.fromisoformat(at) > moment


def test_a_lost_volume_loses_at_most_a_minute(backed_up: Server, cloud: LocalCloud) -> None:
    with client_of(backed_up) as client:
        log(client, "before-the-loss")
        written = datetime.now(UTC)
        wait_until(lambda: archived_since(cloud, backed_up, written), "archived segment", LOST_AT_MOST_SECONDS)
        before = logged(client)
    assert before["losses"]["before-the-loss"] and before["models"]
    found = json.loads(shell(cloud, backed_up, CHECK))
    assert (found["state"], found["problems"]) == ("good", [])
    assert {"archive", "base", "dump"} <= found.keys()

    ec2 = cloud.client("ec2")
    lose_power(cloud, backed_up)
    ec2.terminate_instances(InstanceIds=[backed_up.instance_id])
    volume = json.loads(script("rehearse.py", "status", "--json").stdout)["data_volume_id"]
    wait_until(lambda: ec2.describe_volumes(VolumeIds=[volume])["Volumes"][0]["State"] == "available", "free volume")
    ec2.delete_volume(VolumeId=volume)

    restored = launch_server("--ami", backed_up.ami_id, "--set", "restoreFrom=latest")
    with client_of(restored) as client:
        assert logged(client) == before
        log(client, "after-the-restore")
        after = logged(client)
        assert after["losses"]["after-the-restore"]
        # The setting restoreFrom is unchanged, but the machine does not restore this backup a second time.
        again = shell(cloud, restored, f"{AS_POSTGRES} -m mlflow_host.backups.restore --step")
        assert "no restore is requested, or it is done already" in again
        assert logged(client) == after
    assert history(cloud, restored, "restored")["value"] == "latest"


def lose_power(cloud: LocalCloud, server: Server) -> None:
    """Stop the machine immediately, without a shutdown."""
    ec2 = cloud.client("ec2")
    ec2.stop_instances(InstanceIds=[server.instance_id], Force=True)
    ec2.get_waiter("instance_stopped").wait(InstanceIds=[server.instance_id], WaiterConfig={"Delay": 1})


AS_POSTGRES = "cd /; runuser -u postgres -G mlflow-host -- /opt/mlflow/bin/python"
CHECK = (
    "systemctl start mlflow-host-dump; systemctl start mlflow-host-backups-check; cat /run/mlflow-host/web/backups.json"
)


def restore(cloud: LocalCloud, server: Server, what: str) -> dict[str, Any]:
    """Run `mlflow-host-restore` by hand, and return its record."""
    said = shell(cloud, server, f"mlflow-host-restore {shlex.quote(what)} --yes")
    noted = history(cloud, server, "restored")
    assert noted.get("asked") == what, said
    wait_until(server.answers, "answer")
    return noted


@pytest.fixture
def running(backed_up: Server) -> Server:
    """The current machine. An earlier test has deleted the first machine's volume and launched another machine."""
    return describe_server()


@pytest.mark.slow
def test_any_moment_can_be_restored(running: Server, cloud: LocalCloud) -> None:
    with client_of(running) as client:
        shell(cloud, running, "systemctl start mlflow-host-base-backup")
        log(client, "right")
        before = logged(client)
        time.sleep(2)
        moment = datetime.now(UTC).isoformat(timespec="milliseconds")
        time.sleep(2)
        log(client, "wrong")
        everything = logged(client)
        noted = restore(cloud, running, moment)
        assert logged(client) == before
        kept = f"/srv/mlflow/postgresql/{noted['kept']}"
        assert "PG_VERSION" in shell(cloud, running, f"ls {kept}"), "what was replaced is kept"
        assert everything != before


@pytest.mark.slow
def test_dump_is_restored_by_name(running: Server, cloud: LocalCloud) -> None:
    with client_of(running) as client:
        log(client, "in-the-dump")
        before = logged(client)
        address = shell(cloud, running, "mlflow-host-dump").split()[-1]
        log(client, "not-in-the-dump")
        noted = restore(cloud, running, address)
        assert logged(client) == before
    databases = shell(cloud, running, "cd /; runuser -u postgres -- psql -Atc 'SELECT datname FROM pg_database'")
    assert noted["kept"] in databases.split()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yesterday", "2020-01-01T00:00:00Z", "20200101-000000F", "dumps/none.dump"])
def test_unknown_backup_is_refused_with_the_available_ones(running: Server, cloud: LocalCloud, name: str) -> None:
    with client_of(running) as client:
        before = logged(client)
        said = shell(cloud, running, f"mlflow-host-restore {name} --yes")
        assert said.count("\n") == 1 and "available: any moment from" in said, said
        assert logged(client) == before


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.5, 2.0, 4.0, 6.0, 8.0])
def test_a_restore_that_is_killed_loses_nothing(running: Server, cloud: LocalCloud, after: float) -> None:
    """The machine loses power during the restore. The next boot finishes the restore or restarts it."""
    with client_of(running) as client:
        log(client, f"before-the-kill-{after}")
        before = logged(client)
        shell(cloud, running, "systemctl start mlflow-host-base-backup")
        command = "setsid mlflow-host-restore latest --yes >/dev/null 2>&1 &"
        shell(cloud, running, command)
        wait_until(
            lambda: "activating" in shell(cloud, running, "systemctl is-active mlflow-host-restore"), "restore", 60
        )
        time.sleep(after)
        lose_power(cloud, running)
        cloud.client("ec2").start_instances(InstanceIds=[running.instance_id])
        wait_until(running.answers, "answer")
        assert logged(client) == before
    left = shell(cloud, running, "ls /srv/mlflow/postgresql /srv/mlflow/backups")
    assert "restoring" not in left and "restore-" not in left


@pytest.mark.slow
def test_a_name_that_is_not_there_fails_the_boot_and_touches_nothing(running: Server, cloud: LocalCloud) -> None:
    with client_of(running) as client:
        before = logged(client)
    refused = script("rehearse.py", "up", "--ami", running.ami_id, "--set", "restoreFrom=20200101-000000F", expect=2)
    assert "there is no base backup 20200101-000000F in the backups bucket; available:" in refused.stderr
    answering = launch_server("--ami", running.ami_id, "--set", "restoreFrom=")
    with client_of(answering) as client:
        assert logged(client) == before


@pytest.mark.slow
def test_spoiled_backups_are_restored_from_before(running: Server, cloud: LocalCloud) -> None:
    """An intruder uses the machine's own credentials to delete and overwrite all backups."""
    bucket, once = running.buckets["backups"], Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1})
    told = json.loads(on_machine(cloud, running, "python3", "-c", ASK))
    keys = {
        "aws_access_key_id": "AccessKeyId",
        "aws_secret_access_key": "SecretAccessKey",
        "aws_session_token": "Token",
    }
    intruder = cloud.client("s3", config=once, **{ours: told[theirs] for ours, theirs in keys.items()})
    owner = cloud.client("s3")
    with client_of(running) as client:
        log(client, "before-the-intruder")
        before = logged(client)
        address = shell(cloud, running, "mlflow-host-dump").split()[-1]
        time.sleep(2)
        moment = datetime.now(UTC)
        time.sleep(2)
        found = recover_backups.entries(owner, bucket)
        for key in {each.key for each in found}:
            intruder.put_object(Bucket=bucket, Key=key, Body=b"spoiled")
            intruder.delete_object(Bucket=bucket, Key=key)
        for each in found:
            with pytest.raises(ClientError, match="AccessDenied"):
                intruder.delete_object(Bucket=bucket, Key=each.key, VersionId=each.version)
        log(client, "after-the-intruder")
        assert "there is no" in shell(cloud, running, f"mlflow-host-restore {address} --yes")

        recover_backups.recover(owner, bucket, recover_backups.plan(recover_backups.entries(owner, bucket), moment))
        noted = restore(cloud, running, address)
        assert noted["kept"] and logged(client) == before
