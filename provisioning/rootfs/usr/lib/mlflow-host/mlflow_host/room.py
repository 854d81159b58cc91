"""Run by a timer: tells when the data volume fills up, and has nginx refuse what would write before PostgreSQL stops.

A PostgreSQL without room for its write-ahead log goes down, and everything that can be read with it. So from
REFUSE_PERCENT on whoever writes is told why it does not work, and reading goes on; below RELENT_PERCENT, after the
volume was enlarged or a kept database dropped, all is as before. From WARN_PERCENT on the unit that runs this is a
failed one (`systemctl --failed`), and the sentence stands at /mlflow-host/room.json.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from mlflow_host import config, web

WARN_PERCENT, RELENT_PERCENT, REFUSE_PERCENT = 90, 95, 97
REMEDY = "enlarge it (the setting dataVolumeGib), or drop a kept database that you no longer need"


@dataclass(frozen=True)
class Room:
    """How full a volume is for those who are not root."""

    used: float
    """Per cent."""
    free_mib: int

    @property
    def sentence(self) -> str:
        return f"the data volume is {self.used:.0f} % full ({self.free_mib:,} MiB left)"


def main() -> int:
    room, switch = measure(config.DATA), config.RUN / "nginx" / "room.map"
    refused = is_refused(switch)
    refusing = refuses(room, refused)
    if refusing != refused:
        web.write_private(switch, f"default {int(refusing)};\n", mode=0o644)
        web.reload()
        print(f"mlflow-host: writes are {'refused' if refusing else 'taken again'}: {room.sentence}", file=sys.stderr)
    problem = told(room, refusing)
    found = {"used_percent": round(room.used, 1), "free_mib": room.free_mib, "refusing": refusing, "problem": problem}
    web.write_private(config.RUN / "web" / "room.json", json.dumps(found) + "\n", mode=0o644)
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
    """Whether writes are refused from now on; what it was `refused` before decides between the two limits."""
    return room.used >= (RELENT_PERCENT if refused else REFUSE_PERCENT)


def told(room: Room, refusing: bool) -> str:
    """What somebody should do something about; "" when there is room enough."""
    if refusing:
        return f"{room.sentence}, so nothing can be written any more: {REMEDY}"
    if room.used >= WARN_PERCENT:
        return f"{room.sentence}, and at {REFUSE_PERCENT} % nothing can be written any more: {REMEDY}"
    return ""


if __name__ == "__main__":
    raise SystemExit(main())
