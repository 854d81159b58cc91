"""Cut a machine's power at random moments of the boot that changes the schema, and start the machine again. After the
restart, the server is ready and has every acknowledged write.

A forced stop on the local cloud kills all processes of the machine at once. The host kernel keeps its page cache, so
these tests simulate the loss of a machine, not of its disk. MLFLOW_AMI_CUTS sets the number of cuts (default 6).
MLFLOW_AMI_SEED sets the random seed.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from scripts.drilling.expected_writes import ExpectedWrites
from scripts.drilling.worker_client import WorkerClient
from scripts.local_cloud import LocalCloud, LocalCloudError
from scripts.rehearsal import stack, state
from scripts.rehearsal.status_document import client_environment
from tests.support.servers import SCRIPTS, own_stack, script

pytestmark = [pytest.mark.machine, pytest.mark.slow]

SEED = int(os.environ.get("MLFLOW_AMI_SEED") or random.randrange(1 << 32))
CUTS = int(os.environ.get("MLFLOW_AMI_CUTS") or 6)
STEP_SECONDS = 20
"""The latest moment of a cut, in seconds after the start of the database step: about the duration of the step."""


@pytest.fixture
def stack_of_our_own(cloud: LocalCloud) -> Iterator[None]:
    with own_stack(cloud, "power-cuts"):
        yield


def test_power_cuts_while_the_schema_changes_lose_nothing(
    cloud: LocalCloud, image: Mapping[str, Any], older_image: str, stack_of_our_own: None
) -> None:
    chosen, expected = random.Random(SEED), ExpectedWrites()
    older, newer = older_image, image["ami_id"]
    server = json.loads(script("rehearse.py", "up", "--ami", older, "--json").stdout)
    worker = WorkerClient(Path(sys.executable), "", client_environment(server))
    try:
        for number in range(CUTS):
            release, url = server["mlflow_version"], server["url"]
            touched = worker.write(url, f"{number}-{release.replace('.', '-')}")
            expected.add(release, touched, worker.read(url))
            target = older if server["ami_id"] == newer else newer
            where = f"seed {SEED}, cut {number}, after MLflow {release}"
            where += cut_power(cloud, server["instance_id"], target, chosen.uniform(0, STEP_SECONDS))
            server = json.loads(script("rehearse.py", "up", "--ami", target, "--json").stdout)
            assert server["ami_id"] == target, where
            findings = expected.compare(server["mlflow_version"], worker.read(url))
            assert [str(finding) for finding in findings] == [], where
    finally:
        worker.end()


def cut_power(cloud: LocalCloud, replaced: str, ami: str, seconds: float) -> str:
    """Replace the machine, and cut the new machine's power `seconds` after the start of its database step. Returns a
    description of the moment at which the power was cut."""
    up = subprocess.Popen(
        [sys.executable, SCRIPTS / "rehearse.py", "up", "--ami", ami],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        instance = machine_in_its_database_step(cloud, replaced, up)
        time.sleep(seconds)
        doing = database_status(cloud, instance)
        cloud.client("ec2").stop_instances(InstanceIds=[instance], Force=True)
        up.communicate(timeout=120)
    finally:
        up.kill()
        up.communicate()
    return f", {seconds:.1f} s into the step, which was {doing}"


def machine_in_its_database_step(cloud: LocalCloud, replaced: str, up: subprocess.Popen[str]) -> str:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        machines = [each.id for each in state.load(stack.state_path()).resources if each.type == stack.INSTANCE]
        instance = next((each for each in machines if each and each != replaced), "")
        if instance and database_status(cloud, instance):
            return instance
        assert up.poll() is None, up.communicate()[1]
        time.sleep(0.1)
    raise AssertionError("the new machine's database step did not begin within 180 s")


def database_status(cloud: LocalCloud, instance: str) -> str:
    """Return the database step's state and message, for example "running: copying 64 tables". Return "" if the step has
    not begun."""
    try:
        done = cloud.exec(instance, ["cat", "/run/mlflow-host/status/database.json"])
        found = json.loads(done.stdout)
    except (LocalCloudError, ValueError):
        return ""
    return f"{found['state']}: {found['message']}"
