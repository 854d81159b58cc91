"""Launching again changes nothing, and mistakes are told at preview, all at once, before anything is touched."""

import json

import pytest
from local_cloud import LocalCloud
from mlflow import MlflowClient
from servers import Server, describe_server, script

pytestmark = pytest.mark.machine


def test_up_again_changes_nothing(server: Server, cloud: LocalCloud) -> None:
    def launched() -> object:
        [[instance]] = [
            each["Instances"]
            for each in cloud.client("ec2").describe_instances(InstanceIds=[server.instance_id])["Reservations"]
        ]
        return instance["LaunchTime"], instance["State"]["Name"]

    before = launched()
    script("rehearse.py", "up", "--ami", server.ami_id)
    assert describe_server() == server
    assert launched() == before


def test_all_mistakes_are_told_together_at_preview(server: Server) -> None:
    done = script(
        "rehearse.py", "preview", "--ami", "ami-nonsense",
        "--set", "allowedCidrs=not a network", "--set", "instanceType=m7g.large",
        expect=2,
    )  # fmt: skip
    for part in ("ami-nonsense", "not a network", "m7g.large"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert describe_server() == server


def test_status_is_one_json_document(server: Server) -> None:
    status = json.loads(script("rehearse.py", "status", "--json").stdout)
    assert status["state"] == "ready"
    assert set(status["buckets"]) == {"artifacts", "models", "backups"}


def test_server_runs_the_release_that_the_lock_file_names(server: Server, client: MlflowClient) -> None:
    from servers import REPOSITORY

    lock = (REPOSITORY / "provisioning" / "requirements.lock").read_text()
    assert f"\nmlflow=={server.mlflow_version} " in lock
