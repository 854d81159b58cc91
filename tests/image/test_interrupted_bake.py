"""An interrupted or killed bake leaves no builder, no key pair, no security group and no image in the account."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from scripts.local_cloud import LocalCloud

pytestmark = pytest.mark.machine

PACKER_SECONDS = 300
"""The timeout is long, because Packer finishes its current command before it cleans up."""

BAKE = Path(__file__).resolve().parents[2] / "scripts" / "bake.py"


def traces(ec2: Any) -> dict[str, list[str]]:
    """Return the resources in the account that a bake creates, by kind."""
    filters = [{"Name": "tag-key", "Values": ["mlflow-ami:bake"]}]
    instances = [i for r in ec2.describe_instances(Filters=filters)["Reservations"] for i in r["Instances"]]
    groups = ec2.describe_security_groups()["SecurityGroups"]
    return {
        "builders": [i["InstanceId"] for i in instances if i["State"]["Name"] != "terminated"],
        "security groups": [group["GroupName"] for group in groups if group["GroupName"].startswith("packer_")],
        "key pairs": [
            p["KeyName"] for p in ec2.describe_key_pairs()["KeyPairs"] if p["KeyName"].startswith("mlflow-ami-bake-")
        ],
        "images": sorted(image["ImageId"] for image in ec2.describe_images(Owners=["self"])["Images"]),
    }


def bake_until(line: str) -> subprocess.Popen[str]:
    """Start a bake on the local cloud, and return when the bake logs `line`."""
    process = subprocess.Popen(
        [sys.executable, str(BAKE), "--local"], stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stderr is not None
    told = []
    for said in process.stderr:
        told.append(said)
        if line in said:
            return process
    pytest.fail(f"the bake never logged {line!r}:\n{''.join(told)}", pytrace=False)


@pytest.mark.parametrize(
    ("line", "number"),
    [
        pytest.param("wait for the builder's SSH", signal.SIGINT, id="Ctrl-C while it boots", marks=pytest.mark.slow),
        pytest.param("install packages", signal.SIGINT, id="Ctrl-C while it installs"),
        pytest.param("install packages", signal.SIGTERM, id="SIGTERM while it installs", marks=pytest.mark.slow),
    ],
)
def test_interrupted_bake_leaves_nothing(cloud: LocalCloud, line: str, number: signal.Signals) -> None:
    cloud.source_ami("debian12")
    ec2 = cloud.client("ec2")
    before = traces(ec2)
    process = bake_until(line)
    assert traces(ec2)["builders"] != before["builders"]
    process.send_signal(number)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "temporary resources are removed" in said
    assert traces(ec2) == before


@pytest.mark.slow
def test_killed_bake_leaves_nothing(cloud: LocalCloud) -> None:
    """After a kill of bake.py, only Packer can clean up. A watcher process interrupts Packer, and Packer continues
    to write its log."""
    cloud.source_ami("debian12")
    ec2 = cloud.client("ec2")
    before = traces(ec2)
    process = bake_until("wait for the builder's SSH")
    assert traces(ec2)["builders"] != before["builders"]
    process.kill()
    process.communicate()
    deadline = time.monotonic() + PACKER_SECONDS
    while traces(ec2) != before and time.monotonic() < deadline:
        time.sleep(1)
    assert traces(ec2) == before
