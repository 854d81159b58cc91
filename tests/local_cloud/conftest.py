"""Fixtures for the tests of the local cloud itself. The fixtures start machines from the plain source image."""

from __future__ import annotations

import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from scripts.local_cloud import LocalCloud, LocalCloudError

ANYONE = "0.0.0.0/0"


@dataclass
class Account:
    """The AWS resources of a test, with methods to create and use resources. `close` deletes the test's resources."""

    cloud: LocalCloud
    key_name: str
    key_file: Path
    instances: list[str] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ec2 = self.cloud.client("ec2")

    def group(self, *ports: int, cidr: str = ANYONE) -> str:
        """Create a security group that allows connections from `cidr` to `ports`, and return its ID."""
        group: str = self.ec2.create_security_group(GroupName=uuid.uuid4().hex, Description="test")["GroupId"]
        self.groups.append(group)
        for port in ports:
            self.allow(group, port, cidr)
        return group

    def allow(self, group: str, port: int, cidr: str = ANYONE) -> None:
        self.ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[permission(port, cidr)])

    def forbid(self, group: str, port: int, cidr: str = ANYONE) -> None:
        self.ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=[permission(port, cidr)])

    def launch(self, *groups: str, wait: bool = True, image: str | None = None, **options: Any) -> str:
        """Start a machine and return its instance ID. If `wait` is true, return after the machine has booted."""
        parameters: dict[str, Any] = {
            "ImageId": image or self.cloud.source_ami(),
            "InstanceType": "t3.micro",
            "MinCount": 1,
            "MaxCount": 1,
            "KeyName": self.key_name,
            "SecurityGroupIds": list(groups) or [self.group(22)],
            "MetadataOptions": {"HttpTokens": "required"},
        }
        launched = self.ec2.run_instances(**(parameters | options))
        instance: str = launched["Instances"][0]["InstanceId"]
        self.instances.append(instance)
        if wait:
            self.wait_booted(instance)
        return instance

    def describe(self, instance: str) -> dict[str, Any]:
        found = self.ec2.describe_instances(InstanceIds=[instance])
        described: dict[str, Any] = found["Reservations"][0]["Instances"][0]
        return described

    def state(self, instance: str) -> str:
        return str(self.describe(instance)["State"]["Name"])

    def address(self, instance: str) -> str:
        return str(self.describe(instance)["PublicIpAddress"])

    def wait_state(self, instance: str, state: str, seconds: float = 120) -> None:
        wait_until(lambda: self.state(instance) == state, seconds, f"{instance} is {self.state(instance)}, not {state}")

    def wait_booted(self, instance: str) -> None:
        self.wait_state(instance, "running")

        def booted() -> bool:
            if self.state(instance) != "running":
                return False
            try:
                done = self.cloud.exec(instance, ["systemctl", "is-system-running"])
            except LocalCloudError:
                return False
            return done.stdout.strip() in ("running", "degraded")

        wait_until(booted, 300, f"{instance} did not boot")

    def run(self, instance: str, script: str) -> str:
        """Run a shell script on the machine as root, and return the output of the script."""
        done = self.cloud.exec(instance, ["sh", "-ec", script])
        assert done.returncode == 0, f"{script!r} failed: {done.stderr or done.stdout}"
        return done.stdout.strip()

    def ssh(self, instance: str, command: str) -> subprocess.CompletedProcess[str]:
        argv = ["ssh", "-i", str(self.key_file), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        argv += ["-o", "ConnectTimeout=10", "-o", "LogLevel=ERROR", f"ubuntu@{self.address(instance)}", command]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60)

    def volume(self, gib: int = 1, **options: Any) -> str:
        zone = options.pop("zone", f"{self.cloud.region}a")
        volume: str = self.ec2.create_volume(Size=gib, AvailabilityZone=zone, **options)["VolumeId"]
        self.volumes.append(volume)
        return volume

    def volume_state(self, volume: str) -> str:
        return str(self.ec2.describe_volumes(VolumeIds=[volume])["Volumes"][0]["State"])

    def elastic_address(self) -> tuple[str, str]:
        """Allocation id and address."""
        made = self.ec2.allocate_address(Domain="vpc")
        self.addresses.append(made["AllocationId"])
        return made["AllocationId"], made["PublicIp"]

    def close(self) -> None:
        if self.instances:
            self.ec2.terminate_instances(InstanceIds=self.instances)
            for instance in self.instances:
                self.wait_state(instance, "terminated")
        existing = {volume["VolumeId"] for volume in self.ec2.describe_volumes()["Volumes"]}
        for volume in existing.intersection(self.volumes):
            self.ec2.delete_volume(VolumeId=volume)
        for address in self.addresses:
            self.ec2.release_address(AllocationId=address)
        for image in self.images:
            self.ec2.deregister_image(ImageId=image, DeleteAssociatedSnapshots=True)
        for group in self.groups:
            self.ec2.delete_security_group(GroupId=group)


def permission(port: int, cidr: str) -> dict[str, Any]:
    return {"IpProtocol": "tcp", "FromPort": port, "ToPort": port, "IpRanges": [{"CidrIp": cidr}]}


def wait_until(true: Callable[[], bool], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{otherwise} after {seconds:.0f} s"
        time.sleep(0.2)


def create_key_pair(cloud: LocalCloud, folder: Path) -> tuple[str, Path]:
    """Create a key pair, and return its name and the file with its private key."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    pair = cloud.client("ec2").create_key_pair(KeyName=name, KeyType="ed25519")
    path = folder / f"{name}.pem"
    path.write_text(pair["KeyMaterial"])
    path.chmod(0o600)
    return name, path


@pytest.fixture(scope="session")
def key_pair(cloud: LocalCloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    name, path = create_key_pair(cloud, tmp_path_factory.mktemp("keys"))
    yield name, path
    cloud.client("ec2").delete_key_pair(KeyName=name)


@pytest.fixture(scope="module")
def shared(cloud: LocalCloud, key_pair: tuple[str, Path]) -> Iterator[Account]:
    """Yield one account that all tests of a module share."""
    shared = Account(cloud, *key_pair)
    yield shared
    shared.close()


@pytest.fixture
def account(cloud: LocalCloud, key_pair: tuple[str, Path]) -> Iterator[Account]:
    """An account for one test."""
    account = Account(cloud, *key_pair)
    yield account
    account.close()


@pytest.fixture(scope="module")
def machine(shared: Account) -> str:
    """Start one machine that the tests of a module share and do not change."""
    return shared.launch()
