"""Timer `mlflow-host-room`: grow the data volume's file system, report its use, and make nginx refuse writes on a full
volume.

PostgreSQL stops without space for its write-ahead log, and then nothing can be read either. So at REFUSE_PERCENT nginx
begins to refuse writes and says why; reads continue. Writes are accepted again below RELENT_PERCENT, after the volume
was enlarged or a kept database dropped. From WARN_PERCENT on, and while the file system cannot be grown, this unit
fails (`systemctl --failed`), and the sentence is shown at /mlflow-host/room.json and on the status page.
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
    """How full a volume is, without root's reserve."""

    used: float
    """Per cent."""
    free_mib: int

    @property
    def sentence(self) -> str:
        return f"the data volume is {self.used:.0f} % full ({self.free_mib:,} MiB left)"


def main() -> int:
    growth = file_system.grow(config.DATA_DEVICE)
    room, switch = measure(config.DATA), config.RUN / "nginx" / "room.map"
    refused = is_refused(switch)
    refusing = refuses(room, refused)
    if refusing != refused:
        nginx.write_private(switch, f"default {int(refusing)};\n", mode=0o644)
        nginx.reload()
        print(
            f"mlflow-host: writes are {'refused' if refusing else 'accepted again'}: {room.sentence}", file=sys.stderr
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


def is_refused(switch: Path) -> bool:
    return switch.exists() and switch.read_text().startswith("default 1")


def refuses(room: Room, refused: bool) -> bool:
    """Whether writes are refused; between the two limits the previous state `refused` is kept."""
    return room.used >= (RELENT_PERCENT if refused else REFUSE_PERCENT)


def told(room: Room, refusing: bool) -> str:
    """The sentence about the remedy; "" while there is enough space."""
    if refusing:
        return f"{room.sentence}, so nothing can be written any more: {REMEDY}"
    if room.used >= WARN_PERCENT:
        return f"{room.sentence}, and at {REFUSE_PERCENT} % nothing can be written any more: {REMEDY}"
    return ""


if __name__ == "__main__":
    raise SystemExit(main())
