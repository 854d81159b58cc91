"""Run commands in a separate Linux kernel (the package user-mode-linux) that uses this machine's files.

Tests use this kernel on hosts where root lacks a capability, for example to resize a mounted file system."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

KERNEL = shutil.which("linux.uml")
CAP_SYS_RESOURCE = 24
"""linux/capability.h"""


def has_capability(number: int) -> bool:
    """Return whether this process has the capability `number`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) >> number & 1)


def run(command: str, disk: Path, seconds: float = 120) -> str:
    """Run a shell command as root in a machine with the file `disk` as /dev/ubda, and return the command's output."""
    assert KERNEL
    script, printed = disk.with_suffix(".sh"), disk.with_suffix(".out")
    lines = ["#!/bin/sh", "export PATH=/usr/sbin:/usr/bin:/sbin:/bin", "mount -t proc proc /proc"]
    lines += ["mount -t sysfs sysfs /sys", "mount -t tmpfs tmpfs /run", f"{{ {command}; }} >/dev/ttyS0 2>&1", "sync"]
    script.write_text("\n".join([*lines, "echo o >/proc/sysrq-trigger", "sleep 60"]) + "\n")
    script.chmod(0o755)
    with printed.open("wb") as output:
        given = [KERNEL, "mem=256M", "rootfstype=hostfs", "rootflags=/", "ro", f"ubda={disk}", f"init={script}"]
        given += ["quiet", "con=null", "con0=null", "ssl=null", "ssl0=fd:0,fd:1"]
        subprocess.run(given, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=seconds)
    return printed.read_text(errors="replace")
