"""Timer `mlflow-host-room`: grow the data volume's file system, report its free space, and reject writes if it is full.

If there is no space for the write-ahead log, PostgreSQL stops, and reads fail too. Therefore nginx rejects writes if
the used space is at least REFUSE_PERCENT, and still accepts reads. nginx accepts writes again if the used space is
below RELENT_PERCENT, for example after the volume is enlarged or a kept database is dropped. This unit fails
(`systemctl --failed`) if the used space is at least WARN_PERCENT, or if the file system cannot be grown. The reason for
the failure is in /mlflow-host/room.json and on the status page.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from mlflow_host.contract.alarms import REFUSE_PERCENT, RELENT_PERCENT, WARN_PERCENT
from mlflow_host.machine import config, file_system, nginx, status

REMEDY = "enlarge it (the setting dataVolumeGib), or drop a kept database that you no longer need"


@dataclass(frozen=True)
class Room:
    """The used and the free space of a volume. The blocks that are reserved for root are not counted."""

    used: float
    """Used space in per cent."""
    free_mib: int

    @property
    def sentence(self) -> str:
        return f"the data volume is {self.used:.0f} % full ({self.free_mib:,} MiB left)"


def main() -> int:
    growth = file_system.grow(config.DATA_DEVICE)
    room, switch = measure(config.DATA), config.RUN / "nginx" / "volume-full"
    refused = switch.exists()
    refusing = refuses(room, refused)
    if refusing != refused:
        switch.touch() if refusing else switch.unlink()
        print(
            f"mlflow-host: writes are {'rejected' if refusing else 'accepted again'}: {room.sentence}", file=sys.stderr
        )
    problem = "; ".join(filter(None, (growth, told(room, refusing))))
    found = {"used_percent": round(room.used, 1), "free_mib": room.free_mib, "refusing": refusing, "problem": problem}
    nginx.write_private(config.RUN / "web" / "room.json", json.dumps(found) + "\n", mode=0o644)
    status.publish()
    if problem:
        print(f"mlflow-host: {problem}", file=sys.stderr)
    return 2 if problem else 0


def measure(folder: Path) -> Room:
    volume = os.statvfs(folder)
    usable = volume.f_blocks - volume.f_bfree + volume.f_bavail
    return Room(100 * (1 - volume.f_bavail / usable), volume.f_bavail * volume.f_frsize >> 20)


def refuses(room: Room, refused: bool) -> bool:
    """Return true if nginx must reject writes. Between RELENT_PERCENT and REFUSE_PERCENT, the state does not change."""
    return room.used >= (RELENT_PERCENT if refused else REFUSE_PERCENT)


def told(room: Room, refusing: bool) -> str:
    """Return a sentence with the remedy, or "" if there is enough space."""
    if refusing:
        return f"{room.sentence}, so the server rejects writes: {REMEDY}"
    if room.used >= WARN_PERCENT:
        return f"{room.sentence}, and the server rejects writes from {REFUSE_PERCENT} % on: {REMEDY}"
    return ""


if __name__ == "__main__":
    raise SystemExit(main())
