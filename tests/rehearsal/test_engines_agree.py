"""The rehearsal's own engine gives the same results as Pulumi's engine for the same program and the same changes.

Each engine runs infra/ on its own moto server, with the same cases in the same order. The test compares operations, the
order of operations on dependent resources, the stack's outputs, and the resources that remain in the cloud.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from scripts.rehearsal import stack, state
from scripts.rehearsal.errors import Interrupted, RehearsalError
from scripts.rehearsal.state import State
from scripts.rehearsal.wire import Props, reveal
from tests.support.marks import NEEDS_PULUMI
from tests.support.moto_cloud import MotoCloud, moto_cloud, register_image

pytestmark = [
    pytest.mark.tools,
    pytest.mark.slow,
    NEEDS_PULUMI,
]

ENGINES = ("own", "pulumi")
MINE = '["203.0.113.0/24"]'
VM = stack.INSTANCE


@dataclass
class Outcome:
    """The result of one case. In the result, names replace AWS's IDs, because IDs differ between runs."""

    steps: list[tuple[str, str, str]] = field(default_factory=list)
    outputs: Props = field(default_factory=dict)
    refusal: str = ""
    needs: dict[str, set[str]] = field(default_factory=dict)
    """Resource → the resources on which it depends, each written as "type name"."""
    left: dict[str, Any] = field(default_factory=dict)


@dataclass
class Walk:
    """Run the cases with one engine, and keep the settings and the results."""

    name: str
    cloud: MotoCloud
    folder: Path
    images: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)
    """ID in the stack's outputs whose resource is deleted → name that replaces the ID."""

    @property
    def module(self) -> Any:
        current = state.load(stack.state_path())
        return stack.engine_for(self.name, current)

    def current(self) -> State:
        return state.load(stack.state_path())

    def up(self, case: str, image: str = "first", verb: str = "bring_about", **settings: str) -> None:
        outcome = self.outcomes[case] = Outcome()
        current = self.current()
        by = stack.engine_for(self.name, current)
        wanted = {"allowedCidrs": MINE, **settings}
        client = stack.clients(self.cloud)  # type: ignore[arg-type]
        try:
            run = getattr(by, verb)(
                self.cloud, client, self.images[image], wanted, current, say=quiet, done=lambda step: None
            )
            outcome.steps = [
                (each.operation, each.type, each.name) for each in run.steps if not each.type.startswith("pulumi:")
            ]
        except RehearsalError as error:
            outcome.refusal = str(error)
        self.look(outcome)

    def then(self, case: str, act: Callable[[Any, Any, State], Any]) -> None:
        outcome = self.outcomes[case] = Outcome()
        current = self.current()
        run = act(stack.engine_for(self.name, current), stack.clients(self.cloud), current)  # type: ignore[arg-type]
        if run is not None:
            outcome.steps = [
                (each.operation, each.type, each.name) for each in run.steps if not each.type.startswith("pulumi:")
            ]
        self.look(outcome)

    def look(self, outcome: Outcome) -> None:
        current = self.current()
        known = names_of(current, self.images) | self.gone
        outcome.outputs = renamed(reveal(current.outputs), known)
        outcome.needs = {
            f"{each.type} {each.name}": {
                f"{other.type} {other.name}" for other in current.resources if other.urn in each.needs()
            }
            for each in current.resources
        }
        outcome.left = renamed(inventory(self.cloud), known)


def quiet(text: str) -> None:
    """Says nothing."""


def names_of(current: State, images: dict[str, str]) -> dict[str, str]:
    """Return a name for each ID and each address that differs between runs."""
    known = {ami: f"<image {name}>" for name, ami in images.items()}
    for each in current.resources:
        if each.custom and len(each.id) > 6 and not each.type.startswith("pulumi:"):
            known.setdefault(each.id, f"<{each.type} {each.name}>")
        address = reveal(each.outputs).get("publicIp")
        if address:
            known.setdefault(str(address), "<address>")
    return known


def renamed(value: Any, known: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {renamed(key, known): renamed(each, known) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [renamed(each, known) for each in value]
    if isinstance(value, str):
        for old in sorted(known, key=len, reverse=True):
            value = value.replace(old, known[old])
        return re.sub(r"-[0-9a-f]{7}\b", "-<random>", value)
    return value


def inventory(cloud: MotoCloud) -> dict[str, Any]:
    """Return the content of the cloud, sorted so that the order does not depend on IDs."""
    ec2, ssm, iam = cloud.client("ec2"), cloud.client("ssm"), cloud.client("iam")
    machines = [each for r in ec2.describe_instances()["Reservations"] for each in r["Instances"]]
    running = [each for each in machines if each["State"]["Name"] != "terminated"]
    groups = [each for each in ec2.describe_security_groups()["SecurityGroups"] if each["GroupName"] != "default"]
    doors = sorted(
        (rule.get("FromPort", 0), each["CidrIp"])
        for group in groups
        for rule in [*group["IpPermissions"], *group["IpPermissionsEgress"]]
        for each in rule["IpRanges"]
    )
    roots = {device["Ebs"]["VolumeId"] for each in machines for device in each.get("BlockDeviceMappings", [])[:1]}
    volumes = [each for each in ec2.describe_volumes()["Volumes"] if each["VolumeId"] not in roots]
    return {
        "machines": [(each["ImageId"], each["InstanceType"], each["State"]["Name"]) for each in running],
        "doors": doors,
        "volumes": [
            (each["VolumeId"], each["Size"], [a["InstanceId"] for a in each["Attachments"]]) for each in volumes
        ],
        "record": [sorted((tag["Key"], tag["Value"]) for tag in each.get("Tags", [])) for each in volumes],
        "addresses": [each.get("InstanceId") for each in ec2.describe_addresses()["Addresses"]],
        "networks": len([each for each in ec2.describe_vpcs()["Vpcs"] if not each["IsDefault"]]),
        "buckets": sorted(each["Name"] for each in cloud.client("s3").list_buckets()["Buckets"]),
        "parameters": sorted(
            (each["Name"], each["Type"])
            for page in ssm.get_paginator("describe_parameters").paginate()
            for each in page["Parameters"]
        ),
        "roles": sorted(each["RoleName"] for each in iam.list_roles()["Roles"]),
        "alarms": len(cloud.client("cloudwatch").describe_alarms()["MetricAlarms"]),
        "dashboards": [
            each["DashboardName"] for each in cloud.client("cloudwatch").list_dashboards()["DashboardEntries"]
        ],
        "log groups": [
            (each["logGroupName"], each["retentionInDays"])
            for each in cloud.client("logs").describe_log_groups()["logGroups"]
        ],
    }


@contextmanager
def backed_up(walk: Walk) -> Iterator[None]:
    """During the block, the backups bucket contains a dump, so that the stack's check of restoreFrom succeeds."""
    s3, bucket = walk.cloud.client("s3"), reveal(walk.current().outputs)["buckets"]["backups"]
    policy = s3.get_bucket_policy(Bucket=bucket)["Policy"]
    s3.delete_bucket_policy(Bucket=bucket)  # moto ignores conditions, so a bucket policy would deny all requests
    key = "dumps/20261122T013300Z-nightly-dc11669786a5.dump"
    version = s3.put_object(Bucket=bucket, Key=key, Body=b"")["VersionId"]
    s3.put_bucket_policy(Bucket=bucket, Policy=policy)
    yield
    s3.delete_bucket_policy(Bucket=bucket)
    s3.delete_object(Bucket=bucket, Key=key, VersionId=version)
    s3.put_bucket_policy(Bucket=bucket, Policy=policy)


def interrupted_up(walk: Walk) -> None:
    """Run `up`, and interrupt the run with SIGINT after the VPC is created."""
    current = walk.current()
    by = stack.engine_for(walk.name, current)
    ec2 = walk.cloud.client("ec2")

    def interrupt() -> None:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            if [each for each in ec2.describe_vpcs()["Vpcs"] if not each["IsDefault"]]:
                os.kill(os.getpid(), 2)
                return
            time.sleep(0.02)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Interrupted):
        by.bring_about(
            walk.cloud,
            stack.clients(walk.cloud),  # type: ignore[arg-type]
            walk.images["first"],
            {"allowedCidrs": MINE},
            current,
            say=quiet,
            done=lambda step: None,
        )


def walked(name: str, cloud: MotoCloud, folder: Path) -> Walk:
    walk = Walk(name, cloud, folder)
    walk.images = {
        "first": register_image(cloud, "20261122T101500Z"),
        "same schema": register_image(cloud, "20261123T101500Z"),
        "newer": register_image(
            cloud, "20261124T101500Z", mlflow_version="3.18.0", migration_head="f4a9b2c7d1e6", migration_count="70"
        ),
    }
    walk.up("refused", allowedCidrs='["everybody"]', verb="preview")
    interrupted_up(walk)
    walk.up("launched")
    walk.up("no change")
    walk.up("another image", image="same schema")
    walk.up("upgraded", image="newer")
    walk.up("rolled back", image="same schema")
    here = {"image": "same schema", "dataVolumeGib": "30"}
    walk.up("grown", **here)
    walk.up("one more network", **here, allowedCidrs='["203.0.113.0/24", "198.51.100.7/32"]')
    walk.up("tls off", **here, tls="off")
    walk.up("readers", **here, postgresCidrs=MINE)
    walk.up("no readers", **here)
    walk.up("logs and a dashboard", **here, logRetentionDays="7", dashboard="true")
    walk.up("neither", **here)
    last = {**here, "restoreFrom": "latest"}
    with backed_up(walk):
        walk.up("restored", **last)
    [machine] = [each.id for each in walk.current().resources if each.type == VM]
    walk.cloud.client("ec2").terminate_instances(InstanceIds=[machine])
    walk.gone[machine] = "<the machine that was terminated>"
    alarms = walk.cloud.client("cloudwatch").describe_alarms()["MetricAlarms"]
    [alarm] = [each["AlarmName"] for each in alarms if each["Namespace"] == "AWS/EC2"]
    walk.cloud.client("cloudwatch").delete_alarms(AlarmNames=[alarm])
    walk.then(
        "refreshed", lambda by, client, now: by.refresh(cloud, client, now, say=quiet, done=lambda step: None) and None
    )
    walk.up("made again", **last)
    walk.then("destroyed", lambda by, client, now: by.destroy(cloud, client, now, say=quiet, done=lambda step: None))
    return walk


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Walk]]:
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ENGINES:
            folder = tmp_path_factory.mktemp(name)
            patch.setenv("MLFLOW_AMI_LOCAL_CLOUD", str(folder))
            with moto_cloud() as cloud:
                found[name] = walked(name, cloud, folder)
    yield found


CASES = (
    "refused", "launched", "no change", "another image", "upgraded", "rolled back", "grown", "one more network",
    "tls off", "readers", "no readers", "logs and a dashboard", "neither", "restored", "refreshed", "made again",
    "destroyed",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_both_engines_perform_the_same_operations(walks: dict[str, Walk], case: str) -> None:
    if case == "launched":
        pytest.skip("the progress of an interrupted run depends on its speed")
    own, real = (walks[name].outcomes[case] for name in ENGINES)
    assert bool(own.refusal) == bool(real.refusal)
    assert Counter(own.steps) == Counter(real.steps)


@pytest.mark.parametrize("case", CASES)
def test_order_is_the_same_where_one_depends_on_the_other(walks: dict[str, Walk], case: str) -> None:
    own, real = (walks[name].outcomes[case] for name in ENGINES)
    place = {step: number for number, step in enumerate(own.steps)}
    for first, second in itertools.combinations(real.steps, 2):
        if first in place and second in place and related(first, second, real.needs):
            assert place[first] < place[second], f"{first} comes before {second} with Pulumi's engine"


def related(one: tuple[str, str, str], other: tuple[str, str, str], needs: dict[str, set[str]]) -> bool:
    """Return whether one of the two resources depends on the other, directly or indirectly."""

    def reach(start: str) -> set[str]:
        found: set[str] = set()
        open_ = [start]
        while open_:
            for each in needs.get(open_.pop(), ()):
                if each not in found:
                    found.add(each)
                    open_.append(each)
        return found

    first, second = " ".join(one[1:]), " ".join(other[1:])
    return first == second or first in reach(second) or second in reach(first)


@pytest.mark.parametrize("case", CASES)
def test_both_engines_export_the_same_outputs(walks: dict[str, Walk], case: str) -> None:
    own, real = (walks[name].outcomes[case].outputs for name in ENGINES)
    assert own == real


@pytest.mark.parametrize("case", CASES)
def test_both_engines_leave_the_same_resources(walks: dict[str, Walk], case: str) -> None:
    own, real = (walks[name].outcomes[case].left for name in ENGINES)
    assert own == real


def test_both_engines_print_only_the_programs_refusal(walks: dict[str, Walk]) -> None:
    own, real = (walks[name].outcomes["refused"].refusal for name in ENGINES)
    assert "everybody" in own
    assert real == own


def test_both_engines_delete_all_resources(walks: dict[str, Walk]) -> None:
    for walk in walks.values():
        left = walk.outcomes["destroyed"].left
        assert {name: each for name, each in left.items() if each} == {}


def test_pulumis_files_contain_no_secret(walks: dict[str, Walk]) -> None:
    """The state contains only encrypted passwords, and no other file contains a password as clear text."""
    folder = walks["pulumi"].folder
    texts = [each.read_text(errors="replace") for each in folder.rglob("*") if each.is_file()]
    assert any("ciphertext" in text for text in texts)
    assert not [text for text in texts if '"kek_passphrase"' in text]
