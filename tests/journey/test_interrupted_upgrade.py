"""After an interrupted or failed upgrade, the preview names the schema in service, not the requested schema."""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from scripts.local_cloud import LocalCloud
from tests.support.servers import OLDER, SCRIPTS, launch_server, own_stack, script

pytestmark = [pytest.mark.machine, pytest.mark.slow]


def preview(ami: str) -> str:
    done = script("rehearse.py", "preview", "--ami", ami)
    return done.stdout + done.stderr


def test_preview_names_the_schema_in_service_until_a_boot_has_changed_it(
    cloud: LocalCloud, image: Mapping[str, Any], older_image: str
) -> None:
    newer, release = image["ami_id"], image["facts"]["mlflow_version"]
    with own_stack(cloud, "interrupted"):
        launch_server("--ami", older_image)
        upgrade = preview(newer)
        assert "Upgrade over" in upgrade and f"MLflow {OLDER}" in upgrade

        running = subprocess.Popen(
            [sys.executable, str(SCRIPTS / "rehearse.py"), "up", "--ami", newer], stderr=subprocess.PIPE, text=True
        )
        assert running.stderr is not None
        for line in running.stderr:  # the update writes the volume's tags before it replaces the machine
            if "delete" in line and "EipAssociation" in line:
                running.send_signal(signal.SIGINT)
                break
        shown = running.stderr.read()
        assert running.wait(timeout=300) == 130, shown
        (volume,) = cloud.client("ec2").describe_volumes(
            Filters=[{"Name": "tag:mlflow-ami:stack", "Values": ["interrupted"]}]
        )["Volumes"]
        tags = {tag["Key"]: tag["Value"] for tag in volume["Tags"]}
        assert tags["mlflow-ami:mlflow-version"] == release, "the interruption was too early for this test"

        again = preview(newer)
        assert "Upgrade over" in again and f"MLflow {OLDER}" in again and "Same image" not in again
        assert "no machine reported that its boot finished" in again

        finished = json.loads(script("rehearse.py", "up", "--ami", newer, "--json").stdout)
        assert finished["state"] == "ready"
        assert "the same schema" in preview(newer)
        assert "Rollback over" in preview(older_image)
