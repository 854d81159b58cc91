"""Test the boot step `data-volume`: wait for the volume, format only a blank volume, refuse foreign content."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlflow_host.boot import data_volume
from mlflow_host.contract import launch
from mlflow_host.machine import config, file_system, status
from mlflow_host.machine.status import StepFailed
from tests.support import user_mode_linux

pytestmark = pytest.mark.service

VOLUME = "vol-0123456789abcdef0"
NAME = "nvme-Amazon_Elastic_Block_Store_vol0123456789abcdef0"
# Shell command that writes a master boot record with one Linux partition at sector 2048 to the device $0.
MASTER_BOOT_RECORD = (
    r"""{ printf '\0\0\0\0\203\0\0\0\0\010\0\0\0\020\0\0'; head -c 48 /dev/zero; printf '\125\252'; } """
    """| dd of="$0" bs=1 seek=446 conv=notrunc"""
)
ME = pwd.getpwuid(os.getuid()).pw_name


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """Create a file that stands in for a block device. blkid, mkfs and e2fsck accept files."""
    path = tmp_path / "device"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    return path


def mkfs(device: Path, *options: str) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-F", *options, str(device)], check=True)


def test_attached_volume_is_found_at_once(tmp_path: Path, device: Path) -> None:
    (tmp_path / NAME).symlink_to(device)
    said: list[str] = []
    assert data_volume.wait_for(VOLUME, said.append, by_id=tmp_path) == device
    assert said == []


def test_volume_is_waited_for(tmp_path: Path, device: Path) -> None:
    said: list[str] = []
    threading.Timer(0.4, lambda: (tmp_path / NAME).symlink_to(device)).start()
    begun = time.monotonic()
    assert data_volume.wait_for(VOLUME, said.append, by_id=tmp_path) == device
    assert 0.3 < time.monotonic() - begun < 5
    assert said == [f"waiting for the volume {VOLUME} to be attached"]


def test_other_volume_or_partition_is_not_used(tmp_path: Path, device: Path) -> None:
    for name in ("nvme-Amazon_Elastic_Block_Store_vol0123456789abcdef1", f"{NAME}-part1", f"{NAME}_1"):
        (tmp_path / name).symlink_to(device)
    with pytest.raises(StepFailed, match=f"the volume {VOLUME} was not attached within 0 s: attach it and reboot"):
        data_volume.wait_for(VOLUME, print, by_id=tmp_path, patience=0.2)


def test_volume_without_any_signature_is_blank(device: Path) -> None:
    assert data_volume.is_blank(device, VOLUME)


def test_our_file_system_is_not_blank(device: Path) -> None:
    mkfs(device, "-L", data_volume.LABEL)
    assert not data_volume.is_blank(device, VOLUME)


@pytest.mark.parametrize(
    ("command", "found"),
    [
        (["mkfs.ext4", "-q", "-F"], "type ext4"),
        (["mkfs.ext4", "-q", "-F", "-L", "elsewhere"], "type ext4, label elsewhere"),
        (["mkfs.ext2", "-q", "-F", "-L", data_volume.LABEL], f"type ext2, label {data_volume.LABEL}"),
        (["mkswap", "-L", data_volume.LABEL], f"type swap, label {data_volume.LABEL}"),
        (["sh", "-c", MASTER_BOOT_RECORD], "pttype dos"),
    ],
)
def test_anything_else_is_refused_and_left_untouched(command: list[str], found: str, device: Path) -> None:
    subprocess.run([*command, str(device)], check=True, capture_output=True)
    before = device.read_bytes()
    with pytest.raises(StepFailed) as refused:
        data_volume.is_blank(device, VOLUME)
    assert str(refused.value) == (
        f"the volume {VOLUME} has foreign content ({found}) and was not changed: "
        "name the stack's own data volume or a blank volume"
    )
    assert device.read_bytes() == before


def test_device_that_cannot_be_read_is_not_blank(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=f"the volume {VOLUME} cannot be read"):
        data_volume.is_blank(tmp_path / "gone", VOLUME)


def test_clean_file_system_passes_the_check(device: Path) -> None:
    mkfs(device)
    data_volume.check(device, VOLUME)


def test_damage_that_cannot_be_repaired_stops_the_boot(device: Path) -> None:
    mkfs(device)
    # Change the type of the root folder to a file, and set the flag that makes e2fsck check the file system.
    for request in ("set_inode_field <2> mode 0100644", "set_super_value state 2"):
        subprocess.run(["debugfs", "-w", "-R", request, str(device)], check=True, capture_output=True)
    with pytest.raises(
        StepFailed, match=f"the file system on {VOLUME} is damaged, and e2fsck cannot repair it automatically"
    ):
        data_volume.check(device, VOLUME)


def shell(line: str) -> str:
    return subprocess.run(line, shell=True, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def mounted(tmp_path: Path, device: Path) -> Iterator[tuple[Path, Path, Callable[[int], None]]]:
    """Yield device, mount point, and a function that enlarges the device, for a 64 MiB ext4 file system."""
    mkfs(device, "-L", data_volume.LABEL)
    folder = tmp_path / "mounted"
    folder.mkdir()
    loop = shell(f"losetup --find --show {device}")

    def enlarge(mib: int) -> None:
        os.truncate(device, mib << 20)
        shell(f"losetup --set-capacity {loop}")

    try:
        shell(f"mount {loop} {folder}")
        yield Path(loop), folder, enlarge
    finally:
        shell(f"umount {folder}; losetup --detach {loop}")


def mib(folder: Path) -> int:
    return os.statvfs(folder).f_blocks * os.statvfs(folder).f_frsize >> 20


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="mounts a file system: needs root")


GROW = """
import os, sys
from pathlib import Path
from mlflow_host.machine import file_system
device, folder = Path(sys.argv[1]), Path(sys.argv[2])
(folder / "data").write_text("precious")
before = file_system.in_use(device) >> 20
answers = [file_system.grow(device), file_system.grow(device)]
blocks = os.statvfs(folder)
mib = blocks.f_blocks * blocks.f_frsize >> 20
print("grown", answers, before, file_system.in_use(device) >> 20, mib > 200, (folder / "data").read_text())
"""


@needs_root
@pytest.mark.skipif(
    not (user_mode_linux.has_capability(user_mode_linux.CAP_SYS_RESOURCE) or user_mode_linux.KERNEL),
    reason="this host withholds CAP_SYS_RESOURCE, and there is no other kernel (package user-mode-linux)",
)
def test_mounted_file_system_is_grown_to_its_volume(tmp_path: Path, device: Path) -> None:
    mkfs(device, "-L", data_volume.LABEL)
    os.truncate(device, 256 << 20)
    (tmp_path / "grow.py").write_text(GROW)
    host = Path(file_system.__file__).parents[2]
    grow = f"PYTHONPATH={host} PYTHONDONTWRITEBYTECODE=1 {sys.executable} {tmp_path}/grow.py"
    if user_mode_linux.has_capability(user_mode_linux.CAP_SYS_RESOURCE):
        (folder := tmp_path / "mounted").mkdir()
        loop = shell(f"losetup --find --show {device}")
        try:
            printed = shell(f"mount {loop} {folder}; {grow} {loop} {folder}; umount {folder}")
        finally:
            shell(f"losetup --detach {loop}")
    else:
        mounted = "mkdir /run/mounted; mount -t ext4 /dev/ubda /run/mounted"
        printed = user_mode_linux.run(f"{mounted}; {grow} /dev/ubda /run/mounted; umount /run/mounted", device)
    assert "grown ['', ''] 64 256 True precious" in printed
    subprocess.run(["e2fsck", "-fn", str(device)], check=True, capture_output=True)


@needs_root
def test_file_system_that_cannot_be_grown_is_named_with_the_reason(
    mounted: tuple[Path, Path, Callable[[int], None]],
) -> None:
    device, folder, enlarge = mounted
    enlarge(2048)
    shell(f"mount -o remount,ro {folder}")
    assert file_system.grow(device).startswith(
        "the data volume has 2.0 GiB, but its file system has 0.1 GiB, because resize2fs failed ("
    )
    assert mib(folder) < 64


def test_missing_device_is_one_error_sentence(tmp_path: Path) -> None:
    assert file_system.grow(tmp_path / "gone") == (
        "the size of the data volume cannot be read (No such file or directory): reboot the machine"
    )


def test_failed_growth_does_not_stop_the_boot(tmp_path: Path, device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "status").mkdir()
    document = launch.LaunchDocument(
        stack=launch.Stack("dev", "eu-central-1"),
        buckets=launch.Buckets("aaa", "mmm", "bbb"),
        credentials=launch.CredentialsParameter("/x"),
        data_volume=launch.DataVolume(VOLUME),
        web=launch.Web(("127.0.0.1",)),
    )
    mkfs(device, "-L", data_volume.LABEL)
    monkeypatch.setattr(config, "launch_document", lambda: document)
    monkeypatch.setattr(config, "DATA", tmp_path)
    monkeypatch.setattr(data_volume, "step", lambda name: status.step(name, tmp_path))
    monkeypatch.setattr(data_volume, "wait_for", lambda volume, say: device)
    monkeypatch.setattr(data_volume, "is_mounted", lambda: True)
    monkeypatch.setattr(data_volume, "lay_out", lambda data, volume: None)
    monkeypatch.setattr(file_system, "grow", lambda found: f"{found.name} was not grown")
    data_volume.main()
    told = json.loads((tmp_path / "status/data-volume.json").read_text())
    assert told["state"] == "done" and told["message"].endswith("MiB free; device was not grown")


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_volume, "LAYOUT", {"postgresql": (ME, 0o700), "reports": (ME, 0o755)})


@pytest.mark.usefixtures("layout")
def test_layout_is_made_once_and_then_kept(tmp_path: Path) -> None:
    data_volume.lay_out(tmp_path, VOLUME)
    assert (tmp_path / "format").read_text() == "1\n"
    assert (tmp_path / "postgresql").stat().st_mode & 0o777 == 0o700
    (tmp_path / "postgresql" / "data").write_text("precious")
    data_volume.lay_out(tmp_path, VOLUME)
    assert (tmp_path / "postgresql" / "data").read_text() == "precious"


@pytest.mark.usefixtures("layout")
@pytest.mark.skipif(os.getuid() != 0, reason="gives files to other users: needs root")
def test_folders_get_their_owner_back_when_user_ids_differ(tmp_path: Path) -> None:
    data_volume.lay_out(tmp_path, VOLUME)
    (tmp_path / "postgresql" / "data").write_text("precious")
    for path in (tmp_path / "postgresql" / "data", tmp_path / "postgresql"):
        os.chown(path, 4242, 4242)
    data_volume.lay_out(tmp_path, VOLUME)
    assert {(tmp_path / path).stat().st_uid for path in ("postgresql", "postgresql/data")} == {os.getuid()}


@pytest.mark.usefixtures("layout")
def test_format_of_a_newer_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "format").write_text("2\n")
    with pytest.raises(
        StepFailed, match=f"the volume {VOLUME} has format 2 and this image reads format 1: pin a newer"
    ):
        data_volume.lay_out(tmp_path, VOLUME)
    assert [path.name for path in tmp_path.iterdir()] == ["format"]


def test_failed_command_is_reported_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=r"^`resize2fs \S+gone` failed: .*[Nn]o such file"):
        data_volume.run("resize2fs", str(tmp_path / "gone"))
