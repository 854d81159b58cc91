"""Find processes and resources that a local cloud left on this machine, from /proc and /sys, not from records."""

import subprocess
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path


def running_processes() -> set[int]:
    return {int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit()}


def leftovers(state_dir: Path, started_before: Collection[int]) -> list[str]:
    """Return every process, mount, loop device and container of the local cloud in `state_dir`.

    Processes in `started_before` are ignored, because the shell and `make` that run the tests also have the folder's
    name in their environment. Files in `state_dir` are ignored, because images, volumes and buckets are kept.
    """
    mark = str(state_dir)
    return [*processes(mark, started_before), *mounts(mark), *loop_devices(mark), *containers(mark)]


def orphaned_network_namespaces() -> set[str]:
    """Return named network namespaces (`ip netns`) without a process. Compare the result before and after a test."""
    inhabited = set()
    for pid in running_processes():
        with suppress(OSError):  # the process has ended in the meantime
            inhabited.add(Path(f"/proc/{pid}/ns/net").stat().st_ino)
    named = Path("/run/netns")
    return {
        f"network namespace {each.name}"
        for each in (named.iterdir() if named.is_dir() else ())
        if each.stat().st_ino not in inhabited
    }


def processes(mark: str, started_before: Collection[int]) -> list[str]:
    """Return processes with the folder in their arguments, in their environment or in the mounts of their container."""
    ours = Path("/proc/self/ns/mnt").readlink()
    found = []
    for pid in sorted(running_processes() - set(started_before)):
        proc = Path("/proc", str(pid))
        try:
            arguments = (proc / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (proc / "environ").read_bytes().decode(errors="replace")
            elsewhere = (proc / "ns" / "mnt").readlink() != ours
            if mark in arguments or mark in environment or (elsewhere and mark in (proc / "mountinfo").read_text()):
                found.append(f"process {pid}: {arguments.strip()[:200]}")
        except OSError:  # the process has ended in the meantime
            continue
    return found


def mounts(mark: str) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [f"mount {line.split()[4]}" for line in lines if mark in line]


def loop_devices(mark: str) -> list[str]:
    found = []
    for device in Path("/sys/block").glob("loop*"):
        try:
            backing = (device / "loop" / "backing_file").read_text().strip()
        except OSError:  # not attached to anything
            continue
        if mark in backing:
            found.append(f"loop device {device.name}: {backing}")
    return found


def containers(mark: str) -> list[str]:
    """Return containers in podman storages below the folder, and default-storage containers that mount the folder."""
    stores: list[list[str]] = [[]]
    for records in Path(mark).rglob("overlay-containers"):
        stores.append(["--root", str(records.parent)])
    found = []
    for store in stores:
        listed = subprocess.run(
            ["podman", *store, "ps", "--all", "--format", "{{.ID}} {{.Names}} {{.Status}} {{.Mounts}}"],
            capture_output=True,
            text=True,
        )
        found += [f"container {line}" for line in listed.stdout.splitlines() if store or mark in line]
    return found
