"""Test which data of a local cloud is kept and which is deleted by `down`, by a killed daemon, and by `purge`.

These tests use a second cloud while the cloud of the other tests runs, so two clouds run at the same time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.local_cloud import LocalCloud
from tests.support.leftovers import leftovers, running_processes

from .conftest import Account, create_key_pair, wait_until

pytestmark = [pytest.mark.machine, pytest.mark.slow]

TOKEN = "curl -sf -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' http://169.254.169.254/latest/api/token"


@pytest.fixture(scope="module")
def other(cloud: LocalCloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCloud]:
    """Yield a second cloud whose source image links to image layers of the first cloud. No cloud writes to an image
    layer."""
    other = LocalCloud(tmp_path_factory.mktemp("other"))
    try:
        yield with_source_image(other, cloud)
    finally:
        other.purge()


def with_source_image(other: LocalCloud, cloud: LocalCloud) -> LocalCloud:
    source = cloud.source_ami()
    other.up()
    layer = next(path for path in cloud.places.layers.iterdir() if path.name.startswith("debian12-"))
    subprocess.run(["cp", "-al", str(layer), str(other.places.making)], check=True)
    described = cloud.client("ec2").describe_images(ImageIds=[source])["Images"][0]
    other.register_source_image(described["Name"], described["Description"], other.places.making / layer.name)
    return other


@pytest.fixture(scope="module")
def own(other: LocalCloud, tmp_path_factory: pytest.TempPathFactory) -> Account:
    """Return an account in the second cloud. When the second cloud is purged, the account's resources are deleted."""
    return Account(other, *create_key_pair(other, tmp_path_factory.mktemp("keys")))


def daemon_pid(cloud: LocalCloud) -> int:
    return int((cloud.places.root / "daemon.pid").read_text())


def kill_daemon(cloud: LocalCloud) -> None:
    pid = daemon_pid(cloud)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{pid}/exe").exists(), 10, "the daemon is still there")


def test_everything_survives_down_and_up(other: LocalCloud, own: Account) -> None:
    s3, ssm = other.client("s3"), other.client("ssm")
    s3.create_bucket(Bucket="kept", CreateBucketConfiguration={"LocationConstraint": other.region})
    s3.put_bucket_versioning(Bucket="kept", VersioningConfiguration={"Status": "Enabled"})
    for body in (b"first", b"second"):
        s3.put_object(Bucket="kept", Key="object", Body=body)
    ssm.put_parameter(Name="/kept", Value="secret", Type="SecureString")
    volume = own.volume()
    allocation, address = own.elastic_address()
    running, stopped = own.launch(), own.launch()
    own.ec2.associate_address(AllocationId=allocation, InstanceId=running)
    own.ec2.attach_volume(VolumeId=volume, InstanceId=running, Device="/dev/sdf")
    own.run(running, "echo kept > /kept")
    own.ec2.stop_instances(InstanceIds=[stopped])
    own.wait_state(stopped, "stopped")
    image = own.ec2.create_image(InstanceId=stopped, Name="kept")["ImageId"]
    environment, before = other.environment(), running_processes()

    other.down()
    assert leftovers(other.places.root, ()) == []
    assert not other.is_up()
    other.up()

    assert other.environment() == environment
    assert len(s3.list_object_versions(Bucket="kept")["Versions"]) == 2
    assert ssm.get_parameter(Name="/kept", WithDecryption=True)["Parameter"]["Value"] == "secret"
    assert own.ec2.describe_images(ImageIds=[image])["Images"][0]["State"] == "available"
    assert own.state(stopped) == "stopped"
    own.wait_booted(running)
    assert own.run(running, "cat /kept; find /dev/disk/by-id -name '*vol*' | wc -l").split() == ["kept", "1"]
    assert own.address(running) == address
    wait_until(lambda: own.ssh(running, "true").returncode == 0, 30, "ssh does not answer on the Elastic IP")
    assert before


def test_up_changes_nothing_when_up(other: LocalCloud) -> None:
    pid, started = daemon_pid(other), time.monotonic()
    other.up()
    assert daemon_pid(other) == pid
    assert time.monotonic() - started < 5


def test_machines_outlive_a_killed_daemon_and_are_taken_over(other: LocalCloud, own: Account) -> None:
    volume = own.volume()
    instance = own.launch()
    own.ec2.attach_volume(VolumeId=volume, InstanceId=instance, Device="/dev/sdf")
    own.run(instance, "touch /run/since-boot")
    kill_daemon(other)
    own.run(instance, "test -e /run/since-boot")
    assert not other.is_up()
    other.up()
    own.wait_booted(instance)
    own.run(instance, "test -e /run/since-boot")
    wait_until(lambda: own.ssh(instance, "true").returncode == 0, 30, "ssh does not answer after the take-over")
    own.run(instance, TOKEN)
    own.run(instance, f"curl -sf {other.s3_endpoint}/healthz")
    own.run(instance, "getent hosts deb.debian.org")
    own.ec2.detach_volume(VolumeId=volume)
    wait_until(lambda: own.volume_state(volume) == "available", 10, "the volume did not detach")
    own.ec2.stop_instances(InstanceIds=[instance])
    own.wait_state(instance, "stopped")


def test_acknowledged_changes_survive_a_killed_daemon(other: LocalCloud, own: Account) -> None:
    for number in range(5):
        other.client("ssm").put_parameter(Name=f"/told/{number}", Value=str(number), Type="String")
        kill_daemon(other)
        other.up()
        assert other.client("ssm").get_parameter(Name=f"/told/{number}")["Parameter"]["Value"] == str(number)


def test_terminations_under_way_are_finished_by_the_next_daemon(other: LocalCloud, own: Account) -> None:
    instance = own.launch()
    own.ec2.terminate_instances(InstanceIds=[instance])
    kill_daemon(other)
    other.up()
    own.wait_state(instance, "terminated")
    assert not (other.places.machines / instance).exists()


def test_down_after_everything_was_killed_leaves_nothing(other: LocalCloud, own: Account) -> None:
    instance = own.launch()
    volume = own.volume()
    own.ec2.attach_volume(VolumeId=volume, InstanceId=instance, Device="/dev/sdf")
    kill_daemon(other)
    os.kill(int((other.places.root / "object-store.pid").read_text()), signal.SIGKILL)
    other.down()
    assert leftovers(other.places.root, ()) == []
    other.up()
    own.wait_booted(instance)
    assert other.client("s3").get_object(Bucket="kept", Key="object")["Body"].read() == b"second"


def test_purge_deletes_everything(other: LocalCloud, own: Account) -> None:
    instance = own.launch(wait=False)
    own.wait_state(instance, "running")
    number, run_dir = other.allotment.number, other.allotment.run_dir
    other.purge()
    assert leftovers(other.places.root, ()) == []
    assert not other.places.root.exists()
    assert not run_dir.exists()
    assert f"127.10.{number}." not in subprocess.check_output(["ss", "-ltn"], text=True)
    other.purge()
    assert other.status()["state"] == "absent"
