"""Grow the data volume's file system to the size of the volume, at boot and when the disk space timer runs."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

SUPERBLOCK = 1024
"""Offset of the superblock in an ext4 file system. Source: struct ext4_super_block in Linux, fs/ext4/ext4.h."""


def grow(device: Path) -> str:
    """Grow a mounted ext4 file system to the size of its device. Returns "" if the file system has the right size.
    After a failure, returns a sentence about the failure, and the file system stays usable at its old size."""
    try:
        whole, used = size(device), in_use(device)
        if whole - used < 1 << 20:
            return ""
        done = subprocess.run(["resize2fs", str(device)], capture_output=True, text=True)
        if not done.returncode:
            return ""
        reason = (done.stderr.strip() or done.stdout.strip() or "it gives no reason").splitlines()[-1]
    except OSError as error:
        return f"the size of the data volume cannot be read ({error.strerror or error}): reboot the machine"
    return (
        f"the data volume has {whole / (1 << 30):.1f} GiB, but its file system has {used / (1 << 30):.1f} GiB, because "
        f"resize2fs failed ({reason}): reboot the machine, which checks the file system, or run resize2fs by hand"
    )


def size(device: Path) -> int:
    """The size of a device in bytes."""
    with device.open("rb") as file:
        return file.seek(0, os.SEEK_END)


def in_use(device: Path) -> int:
    """The size of the ext4 file system on a device, in bytes."""
    with device.open("rb") as file:
        file.seek(SUPERBLOCK)
        block = file.read(1024)
    (low, shift), (high,) = struct.unpack_from("<4xI16xI", block), struct.unpack_from("<I", block, 0x150)
    return int((high << 32 | low) << (10 + shift))
