"""The data volume is waited for, formatted only when it is blank, and refused when it is anybody else's."""

from __future__ import annotations

import os
import pwd
import subprocess
import threading
import time
from pathlib import Path

import pytest
from mlflow_host import data_volume
from mlflow_host.status import StepFailed

VOLUME = "vol-0123456789abcdef0"
NAME = "nvme-Amazon_Elastic_Block_Store_vol0123456789abcdef0"
# One Linux partition at sector 2048 in a master boot record, written into the device that follows as $0.
MASTER_BOOT_RECORD = (
    r"""{ printf '\0\0\0\0\203\0\0\0\0\010\0\0\0\020\0\0'; head -c 48 /dev/zero; printf '\125\252'; } """
    """| dd of="$0" bs=1 seek=446 conv=notrunc"""
)
ME = pwd.getpwuid(os.getuid()).pw_name


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A file in place of a block device: blkid, mkfs and e2fsck take either."""
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


def test_another_volume_or_a_partition_is_not_taken_for_it(tmp_path: Path, device: Path) -> None:
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
        f"the volume {VOLUME} holds something else ({found}): it is left untouched; "
        "name the stack's own data volume, or a blank one"
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
    # A root folder that is no folder, and the mark that makes e2fsck look.
    for request in ("set_inode_field <2> mode 0100644", "set_super_value state 2"):
        subprocess.run(["debugfs", "-w", "-R", request, str(device)], check=True, capture_output=True)
    with pytest.raises(
        StepFailed, match=f"the file system on {VOLUME} is damaged beyond what e2fsck repairs by itself"
    ):
        data_volume.check(device, VOLUME)


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
def test_folders_of_an_image_that_numbered_its_users_otherwise_get_their_owner_back(tmp_path: Path) -> None:
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


def test_failed_command_is_quoted_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=r"^`resize2fs \S+gone` failed: .*[Nn]o such file"):
        data_volume.run("resize2fs", str(tmp_path / "gone"))
