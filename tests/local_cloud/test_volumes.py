"""A volume's device appears at the attachment and disappears at the detachment, and the volume keeps its data."""

from __future__ import annotations

import subprocess

import pytest
from botocore.exceptions import ClientError

from .conftest import Account, wait_until

pytestmark = [pytest.mark.machine, pytest.mark.slow]


def by_id(volume: str) -> str:
    return f"/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_{volume.replace('-', '')}"


def test_attached_volume_appears_and_its_content_outlives_the_machine(account: Account) -> None:
    volume = account.volume(2)
    first = account.launch()
    account.ec2.attach_volume(VolumeId=volume, InstanceId=first, Device="/dev/sdf")
    device = by_id(volume)
    wait_until(lambda: account.cloud.exec_or_none(first, ["test", "-b", device]) == 0, 10, "the volume did not appear")
    assert account.run(first, f"blockdev --getsize64 {device}") == str(2 * 1024**3)
    assert account.cloud.exec(first, ["blkid", "-p", device]).returncode == 2, "a new volume is blank"
    account.run(first, f"mkfs.ext4 -q -L data {device} && mount {device} /mnt && echo kept > /mnt/file")
    account.ec2.terminate_instances(InstanceIds=[first])
    account.wait_state(first, "terminated")
    assert account.volume_state(volume) == "available"

    second = account.launch()
    account.ec2.attach_volume(VolumeId=volume, InstanceId=second, Device="/dev/sdf")
    wait_until(lambda: account.cloud.exec_or_none(second, ["test", "-b", device]) == 0, 10, "it did not appear again")
    assert account.run(second, f"mount {device} /mnt; cat /mnt/file") == "kept"


def test_volume_is_there_from_the_first_instant_after_a_restart(account: Account) -> None:
    volume = account.volume()
    instance = account.launch()
    account.ec2.attach_volume(VolumeId=volume, InstanceId=instance, Device="/dev/sdf")
    unit = f'[Service]\\nType=oneshot\\nExecStart=/bin/sh -c "test -b {by_id(volume)} && touch /run/seen"\\n'
    unit += "[Unit]\\nDefaultDependencies=no\\n[Install]\\nWantedBy=sysinit.target\\n"
    account.run(instance, f"printf '{unit}' > /etc/systemd/system/look.service; systemctl enable -q look.service")
    account.ec2.stop_instances(InstanceIds=[instance])
    account.wait_state(instance, "stopped")
    assert account.volume_state(volume) == "in-use"
    account.ec2.start_instances(InstanceIds=[instance])
    account.wait_booted(instance)
    account.run(instance, "test -e /run/seen")


def test_mounted_volume_stays_until_it_is_unmounted(account: Account) -> None:
    volume = account.volume()
    instance = account.launch()
    account.ec2.attach_volume(VolumeId=volume, InstanceId=instance, Device="/dev/sdf")
    device = by_id(volume)
    wait_until(lambda: account.cloud.exec_or_none(instance, ["test", "-b", device]) == 0, 10, "it did not appear")
    account.run(instance, f"mkfs.ext4 -q {device} && mount {device} /mnt")
    account.ec2.detach_volume(VolumeId=volume)
    account.run(instance, "echo still > /mnt/there")
    assert account.volume_state(volume) == "in-use"
    account.run(instance, "umount /mnt")
    wait_until(lambda: account.volume_state(volume) == "available", 10, "the volume did not detach")
    assert account.cloud.exec(instance, ["test", "-e", device]).returncode == 1


def test_volume_is_attached_to_one_machine_at_a_time(account: Account) -> None:
    volume = account.volume()
    first, second = account.launch(), account.launch()
    account.ec2.attach_volume(VolumeId=volume, InstanceId=first, Device="/dev/sdf")
    with pytest.raises(ClientError, match="VolumeInUse"):
        account.ec2.attach_volume(VolumeId=volume, InstanceId=second, Device="/dev/sdf")
    with pytest.raises(ClientError, match="VolumeInUse"):
        account.ec2.delete_volume(VolumeId=volume)


def test_volume_of_another_zone_is_refused(account: Account) -> None:
    volume = account.volume(zone=f"{account.cloud.region}b")
    instance = account.launch(Placement={"AvailabilityZone": f"{account.cloud.region}a"}, wait=False)
    account.wait_state(instance, "running")
    with pytest.raises(ClientError, match="ZoneMismatch"):
        account.ec2.attach_volume(VolumeId=volume, InstanceId=instance, Device="/dev/sdf")


def test_snapshot_contains_the_data_of_the_volume(account: Account) -> None:
    volume = account.volume()
    instance = account.launch()
    account.ec2.attach_volume(VolumeId=volume, InstanceId=instance, Device="/dev/sdf")
    device = by_id(volume)
    wait_until(lambda: account.cloud.exec_or_none(instance, ["test", "-b", device]) == 0, 10, "it did not appear")
    account.run(instance, f"mkfs.ext4 -q {device}; mount {device} /mnt; echo then > /mnt/file; sync")
    snapshot = account.ec2.create_snapshot(VolumeId=volume)["SnapshotId"]
    account.run(instance, "echo now > /mnt/file; sync")
    copy = account.volume(2, SnapshotId=snapshot)
    account.ec2.attach_volume(VolumeId=copy, InstanceId=instance, Device="/dev/sdg")
    wait_until(lambda: account.cloud.exec_or_none(instance, ["test", "-b", by_id(copy)]) == 0, 10, "no copy appeared")
    assert account.run(instance, f"mkdir /copy; mount {by_id(copy)} /copy; cat /copy/file") == "then"
    account.ec2.delete_snapshot(SnapshotId=snapshot)
    assert not (account.cloud.places.snapshots / f"{snapshot}.img").exists()


def test_grown_volume_is_seen_by_the_machine(account: Account) -> None:
    volume = account.volume(1)
    instance = account.launch()
    account.ec2.attach_volume(VolumeId=volume, InstanceId=instance, Device="/dev/sdf")
    device = by_id(volume)
    wait_until(lambda: account.cloud.exec_or_none(instance, ["test", "-b", device]) == 0, 10, "it did not appear")
    account.ec2.modify_volume(VolumeId=volume, Size=3)
    assert account.run(instance, f"blockdev --getsize64 {device}") == str(3 * 1024**3)
    with pytest.raises(ClientError, match="smaller"):
        account.ec2.modify_volume(VolumeId=volume, Size=2)


def test_deleted_volume_leaves_no_file_and_no_loop_device(account: Account) -> None:
    volume = account.volume()
    path = account.cloud.places.volumes / f"{volume}.img"
    assert path.stat().st_size == 1024**3
    assert path.stat().st_blocks == 0, "a volume takes no space before it is written"
    account.ec2.delete_volume(VolumeId=volume)
    assert not path.exists()
    assert volume not in subprocess.check_output(["losetup", "-a"], text=True)
