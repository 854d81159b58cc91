"""Boot step `data-volume`: find the stack's EBS volume, format a blank volume, check the file system and mount it.

The volume is attached after the machine has started, so the step waits for the device. The step formats the volume only
if `blkid -p` finds no signature. If the volume has foreign content, the step fails and does not change the volume.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from mlflow_host.machine import config, file_system
from mlflow_host.machine.status import StepFailed, step

LABEL = "mlflow-data"
FORMAT = 1
BY_ID = Path("/dev/disk/by-id")

PATIENCE_SECONDS = 600

LAYOUT = {
    "postgresql": ("postgres", 0o700),
    "reports": ("postgres", 0o755),
    "backups": ("postgres", 0o755),
    "certificates": ("root", 0o700),
    "tmp": ("mlflow", 0o700),
}
"""Owner and mode of each folder at the top of the data volume."""


def main() -> None:
    with step("data-volume") as s:
        volume = config.launch_document().data_volume.id
        device = wait_for(volume, s.say)
        if is_blank(device, volume):
            s.say(f"formatting {volume}, which is blank")
            run("mkfs.ext4", "-q", "-L", LABEL, "-m", "1", "-E", "lazy_itable_init=1,lazy_journal_init=1", str(device))
        s.say(f"mounting {volume} on {config.DATA}")
        if not is_mounted():
            check(device, volume)
            mount(device)
        problem = file_system.grow(device)  # a problem does not stop the boot; the disk space timer reports it
        lay_out(config.DATA, volume)
        free = shutil.disk_usage(config.DATA).free // 2**20
        s.say(f"{volume} is mounted on {config.DATA}, {free} MiB free" + f"; {problem}" * bool(problem))


def wait_for(
    volume: str, say: Callable[[str], None], *, by_id: Path = BY_ID, patience: float = PATIENCE_SECONDS
) -> Path:
    """Wait until an EBS volume is attached, and return its device. Raises StepFailed after `patience` seconds."""
    link = by_id / f"nvme-Amazon_Elastic_Block_Store_{volume.replace('-', '')}"
    give_up = time.monotonic() + patience
    if not link.exists():
        say(f"waiting for the volume {volume} to be attached")
    while not link.exists():
        if time.monotonic() > give_up:
            raise StepFailed(f"the volume {volume} was not attached within {patience:.0f} s: attach it and reboot")
        time.sleep(0.05)
    return link.resolve()


def is_blank(device: Path, volume: str) -> bool:
    """Return True for a device without a signature, False for a data volume. Raises StepFailed for other content."""
    probe = subprocess.run(["blkid", "-p", "-o", "export", str(device)], capture_output=True, text=True)
    if probe.returncode == 2:
        # blkid also returns status 2 if it cannot read the device. An unreadable device must not be formatted.
        require_readable(device, volume)
        return True
    if probe.returncode not in (0, 8):
        raise StepFailed(f"the volume {volume} cannot be read: {probe.stderr.strip() or 'blkid gives no reason'}")
    found = dict(line.split("=", 1) for line in probe.stdout.splitlines() if "=" in line)
    if found.get("TYPE") == "ext4" and found.get("LABEL") == LABEL:
        return False
    known = [f"{key.lower()} {found[key]}" for key in ("TYPE", "LABEL", "PTTYPE") if key in found]
    raise StepFailed(
        f"the volume {volume} has foreign content ({', '.join(known) or 'several signatures'}) and was not changed: "
        "name the stack's own data volume or a blank volume"
    )


def require_readable(device: Path, volume: str) -> None:
    """Read both ends of the device, where a file system has its signatures. Raises StepFailed if a read fails."""
    try:
        with device.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for offset in (0, max(0, size - (1 << 20))):
                file.seek(offset)
                if len(file.read(1 << 20)) < min(1 << 20, size):
                    raise OSError("it ends early")
            if size == 0:
                raise OSError("it is empty")
    except OSError as error:
        raise StepFailed(
            f"the volume {volume} cannot be read ({error.strerror or error}): nothing was written; check the volume"
        ) from None


def check(device: Path, volume: str) -> None:
    """Run e2fsck, which replays the journal and makes the repairs that lose no data. On a clean file system, e2fsck
    takes milliseconds."""
    fsck = subprocess.run(["e2fsck", "-p", str(device)], capture_output=True, text=True)
    if fsck.returncode >= 4:
        raise StepFailed(
            f"the file system on {volume} is damaged, and e2fsck cannot repair it automatically: "
            "take a snapshot, then restore a backup or run e2fsck by hand"
        )


def is_mounted() -> bool:
    """Ask systemd whether the volume is mounted. /srv/mlflow is always a mount point in the sandbox of this unit, so a
    check of the mount point would not help."""
    return subprocess.run(["systemctl", "is-active", "--quiet", "srv-mlflow.mount"]).returncode == 0


def mount(device: Path) -> None:
    """Mount the volume through systemd. At shutdown, systemd first stops all units that use the volume, and then
    unmounts the volume."""
    new = config.DATA_DEVICE.with_name(".data-volume.new")
    new.unlink(missing_ok=True)
    new.symlink_to(device)
    new.replace(config.DATA_DEVICE)
    run("systemctl", "start", "srv-mlflow.mount")


def lay_out(data: Path, volume: str) -> None:
    """Create the folders and the format file, and set the folders' owners, because user IDs differ between images."""
    mark = data / "format"
    found = mark.read_text().strip() if mark.exists() else str(FORMAT)
    if found != str(FORMAT):
        raise StepFailed(
            f"the volume {volume} has format {found} and this image reads format {FORMAT}: pin a newer image"
        )
    for name, (owner, mode) in LAYOUT.items():
        folder, user = data / name, pwd.getpwnam(owner)
        folder.mkdir(exist_ok=True)
        if folder.stat().st_uid != user.pw_uid:
            run("chown", "-R", "-h", f"{owner}:{user.pw_gid}", str(folder))
        folder.chmod(mode)
    if not mark.exists():
        with mark.open("w") as file:
            file.write(f"{FORMAT}\n")
            file.flush()
            os.fsync(file.fileno())


def run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        said = (result.stderr.strip() or result.stdout.strip() or "no reason given").splitlines()
        raise StepFailed(f"`{' '.join(command)}` failed: {said[-1]}")


if __name__ == "__main__":
    main()
