"""JSON files on the data volume that record the last backups and the last restore, one file per kind.

archive    the last archived segment of the write-ahead log.
base       the last base backup.
dump       the last dump.
gap        the last segment that was skipped because the bucket was unreachable for too long.
restored   the last restore, and the stack's restoreFrom at that time.
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
"""Hours (UTC) in which a nightly backup runs if the last backup is more than 20 hours old."""


@dataclass(frozen=True)
class LastRuns:
    folder: Path = FOLDER

    def read(self, kind: str) -> dict[str, Any]:
        """The content of the file for `kind`; {} if the file is missing or unreadable."""
        try:
            found = json.loads((self.folder / f"{kind}.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, kind: str, content: dict[str, Any]) -> None:
        """Replace the file for `kind` atomically."""
        atomic_file.write(self.folder / f"{kind}.json", f"{json.dumps(content)}\n")

    def forget(self, kind: str) -> None:
        (self.folder / f"{kind}.json").unlink(missing_ok=True)


def stamp(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def time_of(content: dict[str, Any]) -> datetime | None:
    """The time in `content`, or None if `content` has no valid time."""
    try:
        return datetime.fromisoformat(content["at"])
    except (KeyError, TypeError, ValueError):
        return None


def is_due(last: datetime | None, now: datetime) -> bool:
    """Whether a nightly backup is due. A backup is due if there is no earlier backup, or if the last backup is older
    than 26 hours. At night, a backup is due if the last backup is older than 20 hours."""
    if last is None:
        return True
    age = now - last
    return age >= timedelta(hours=26) or (age >= timedelta(hours=20) and now.astimezone(UTC).hour in NIGHT)
