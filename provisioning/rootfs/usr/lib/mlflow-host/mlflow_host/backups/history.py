"""What was last backed up, kept on the data volume: one small file each, so that it outlives machines.

archive    the last segment of the write-ahead log that reached the bucket
base       the last base backup
dump       the last nightly dump
gap        the last segment that was given up, because the bucket was out of reach for too long
restored   what was last restored, and for which value of the stack's restoreFrom
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from mlflow_host import config, durable

FOLDER = config.DATA / "backups"

NIGHT = range(1, 5)
"""Hours (UTC) in which what is due every day is done, if it was not within the last 20 hours."""


@dataclass(frozen=True)
class History:
    folder: Path = FOLDER

    def read(self, what: str) -> dict[str, Any]:
        """{} where there is nothing yet. A file that cannot be read counts as that."""
        try:
            found = json.loads((self.folder / f"{what}.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, what: str, content: dict[str, Any]) -> None:
        """Whole and on disk, or not at all."""
        durable.write(self.folder / f"{what}.json", f"{json.dumps(content)}\n")

    def forget(self, what: str) -> None:
        (self.folder / f"{what}.json").unlink(missing_ok=True)


def stamp(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def time_of(content: dict[str, Any]) -> datetime | None:
    """When it was, None where there is nothing."""
    try:
        return datetime.fromisoformat(content["at"])
    except (KeyError, TypeError, ValueError):
        return None


def is_due(last: datetime | None, now: datetime) -> bool:
    """Whether what is done nightly is to be done now: also for the first time, and where a night was missed."""
    if last is None:
        return True
    age = now - last
    return age >= timedelta(hours=26) or (age >= timedelta(hours=20) and now.astimezone(UTC).hour in NIGHT)
