"""EBS volumes. A volume is a sparse file, and a loop device attaches the file to a machine."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from scripts.local_cloud.layout import Places

GIB = 1024**3


def file_of(places: Places, volume: str) -> Path:
    return places.volumes / f"{volume}.img"


def create(places: Places, volume: str, gib: int, snapshot: str | None = None) -> Path:
    """If the volume's file is missing, copy the snapshot or create an empty file. Enlarge a smaller file to `gib`
    GiB."""
    path = file_of(places, volume)
    if not path.exists():
        source = places.snapshots / f"{snapshot}.img"
        if snapshot and source.exists():
            copy_sparse(source, path)
        else:
            path.touch(mode=0o600)
    if path.stat().st_size < gib * GIB:
        os.truncate(path, gib * GIB)
        for device in loop_devices(path):
            subprocess.run(["losetup", "--set-capacity", device], check=True, capture_output=True)
    return path


def copy_sparse(source: Path, target: Path) -> None:
    partial = target.with_suffix(".partial")
    subprocess.run(
        ["cp", "--sparse=always", "--reflink=auto", str(source), str(partial)], check=True, capture_output=True
    )
    partial.rename(target)


def snapshot(places: Places, volume: str, name: str) -> None:
    """Flush the kernel's buffers for the volume, and then copy the volume. The copy is crash-consistent."""
    source = file_of(places, volume)
    if not source.exists():
        return
    for device in loop_devices(source):
        subprocess.run(["sync", device], check=False, capture_output=True)
        subprocess.run(["blockdev", "--flushbufs", device], check=False, capture_output=True)
    copy_sparse(source, places.snapshots / f"{name}.img")


def attach(path: Path) -> str:
    """Return the loop device of the file `path`, such as "/dev/loop7". A missing loop device is created."""
    if existing := loop_devices(path):
        return existing[0]
    done = subprocess.run(["losetup", "--find", "--show", str(path)], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def detach(path: Path) -> None:
    for device in loop_devices(path):
        subprocess.run(["losetup", "--detach", device], check=True, capture_output=True)


def loop_devices(path: Path) -> list[str]:
    done = subprocess.run(
        ["losetup", "--json", "--list", "--associated", str(path)], check=True, capture_output=True, text=True
    )
    if not done.stdout.strip():
        return []
    return [device["name"] for device in json.loads(done.stdout)["loopdevices"]]


def loop_devices_under(folder: Path) -> dict[str, Path]:
    """Return the loop devices of files in `folder`: {"/dev/loop7": path}. Deleted files are included."""
    found: dict[str, Path] = {}
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            name = backing.read_text().strip().removesuffix(" (deleted)")
        except OSError:
            continue
        if Path(name).is_relative_to(folder):
            found[f"/dev/{backing.parent.parent.name}"] = Path(name)
    return found


def is_mounted_in(pid: int, device_number: int) -> bool:
    """Return whether the device is mounted in the mount namespace of the process."""
    wanted = f"{os.major(device_number)}:{os.minor(device_number)}"
    try:
        lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    except OSError:
        return False
    return any(line.split()[2] == wanted for line in lines)
