"""A second launch changes nothing, and preview reports all mistakes at once, before any change."""

import json

import pytest
from mlflow import MlflowClient

from scripts.local_cloud import LocalCloud
from tests.support.servers import Server, describe_server, launch_server, script

pytestmark = pytest.mark.machine


def test_time_from_launch_to_first_response_is_logged(server: Server) -> None:
    assert server.seconds_to_first_answer is not None
    assert 0 < server.seconds_to_first_answer < 600


def test_up_again_changes_nothing(server: Server, cloud: LocalCloud) -> None:
    def launched() -> object:
        [[instance]] = [
            each["Instances"]
            for each in cloud.client("ec2").describe_instances(InstanceIds=[server.instance_id])["Reservations"]
        ]
        return instance["LaunchTime"], instance["State"]["Name"]

    before = launched()
    again = launch_server("--ami", server.ami_id)
    assert again.seconds_to_first_answer is None, "the machine was launched again"
    assert describe_server() == server
    assert launched() == before


@pytest.mark.parametrize(
    ("ami", "settings"),
    [
        ("ami-nonsense", {"allowedCidrs": "everyone", "dataVolumeGib": "0"}),
        # Preview can compare the instance type with the image only if the image exists.
        (None, {"allowedCidrs": "203.0.113.0/33", "instanceType": "m7g.large"}),
    ],
)
def test_all_mistakes_are_reported_together_at_preview(
    server: Server, ami: str | None, settings: dict[str, str]
) -> None:
    arguments = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    done = script("rehearse.py", "preview", "--ami", ami or server.ami_id, *arguments, expect=2)
    for part in [*settings, *([ami] if ami else []), *settings.values()]:
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert describe_server() == server


def test_status_is_one_json_document(server: Server) -> None:
    status = json.loads(script("rehearse.py", "status", "--json").stdout)
    assert status["state"] == "ready"
    assert set(status["buckets"]) == {"artifacts", "models", "backups"}


def test_server_runs_the_release_that_the_lock_file_names(server: Server, client: MlflowClient) -> None:
    from tests.support.servers import REPOSITORY

    lock = (REPOSITORY / "provisioning" / "requirements.lock").read_text()
    assert f"\nmlflow=={server.mlflow_version} " in lock
