"""When each kind of backup last succeeded: one JSON file per kind on the data volume, where it outlives the machine.

archive    the last archived segment of the write-ahead log
base       the last base backup
dump       the last nightly dump
gap        the last skipped segment, because the bucket was unreachable for too long
restored   the last restore, and the value of the stack's restoreFrom that requested it
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from mlflow_host.machine import atomic_file, config

FOLDER = config.DATA / "backups"

NIGHT = range(1, 5)
"""Hours (UTC) of the nightly backups, for those that last ran more than 20 hours ago."""


@dataclass(frozen=True)
class LastRuns:
    folder: Path = FOLDER

    def read(self, kind: str) -> dict[str, Any]:
        """The file's content; {} when it is missing or unreadable."""
        try:
            found = json.loads((self.folder / f"{kind}.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, kind: str, content: dict[str, Any]) -> None:
        """Replace the file atomically."""
        atomic_file.write(self.folder / f"{kind}.json", f"{json.dumps(content)}\n")

    def forget(self, kind: str) -> None:
        (self.folder / f"{kind}.json").unlink(missing_ok=True)


def stamp(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def time_of(content: dict[str, Any]) -> datetime | None:
    """The time in `content`; None without one."""
    try:
        return datetime.fromisoformat(content["at"])
    except (KeyError, TypeError, ValueError):
        return None


def is_due(last: datetime | None, now: datetime) -> bool:
    """Whether a nightly backup is due: never taken, older than 26 hours, or older than 20 hours at night."""
    if last is None:
        return True
    age = now - last
    return age >= timedelta(hours=26) or (age >= timedelta(hours=20) and now.astimezone(UTC).hour in NIGHT)
