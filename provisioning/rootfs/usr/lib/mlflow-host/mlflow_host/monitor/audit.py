"""The audit trail: one JSON line for each write that succeeded or was refused. The lines are written to the journal and
to files for the backups bucket.

A line has the time, user, role, address, method, name of the route, IDs of the items in the request, and status. A line
has no body, no query and no password. A request counts as a write if users with the role reader may not send it.

A client without a valid login could fill the bucket with lines about refused writes. Therefore, per minute and address,
at most REFUSALS refused writes get a line each, and one more line states how many other writes were refused.
"""

from __future__ import annotations

import json
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlflow_host.contract import audit_trail
from mlflow_host.contract.audit_trail import Span
from mlflow_host.machine import atomic_file
from mlflow_host.monitor.request_log import Position, Request
from mlflow_host.monitor.routes import Routes

REFUSALS = 20
"""Maximum number of lines per minute and address for refused writes without a valid login."""
UNKNOWN_PATH_CHARACTERS = 100
FILE_BYTES = 32 << 20
"""After a file of the audit trail has reached this size, a new file is started. The size is before compression."""
WAITING_BYTES = 256 << 20
"""Maximum total size of complete files that are not uploaded. If the size is exceeded, the oldest file is deleted."""


@dataclass
class Lines:
    """Makes the lines of the audit trail from requests, and counts refused writes."""

    routes: Routes
    _minute: str = ""
    _refused: Counter[str] = field(default_factory=Counter)
    """Number of refused writes in the minute `_minute`, by address."""

    def of(self, requests: Iterable[Request]) -> Iterator[dict[str, Any]]:
        for request in requests:
            if not request.writes:
                continue
            if not request.accepted:
                if request.time[:16] != self._minute:
                    yield from self.rest()
                    self._minute = request.time[:16]
                self._refused[request.address] += 1
                if self._refused[request.address] > REFUSALS:
                    continue
            yield self.line(request)

    def rest(self) -> Iterator[dict[str, Any]]:
        """A line for each address with more than REFUSALS refused writes in the minute."""
        for address, count in self._refused.items():
            if count > REFUSALS:
                yield {
                    "time": utc(f"{self._minute}:59+00:00"),
                    "address": address,
                    "login": "refused",
                    "more_refusals": count - REFUSALS,
                }
        self._refused.clear()

    def line(self, request: Request) -> dict[str, Any]:
        route, parts = self.routes.match(request.method, request.path)
        named = {"route": route} if route else {"route": None, "path": request.path[:UNKNOWN_PATH_CHARACTERS]}
        return {
            "time": utc(request.time),
            "user": request.user or None,
            "role": request.role if request.accepted else None,
            "login": "accepted" if request.accepted else "refused",
            "address": request.address,
            "method": request.method,
            **named,
            "ids": dict((*request.ids, *parts)),
            "status": request.status,
        }


def utc(time: str) -> str:
    if time.endswith("+00:00"):
        return f"{time[:-6]}Z"
    return datetime.fromisoformat(time).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class Spool:
    """The folder with the audit trail's files: `current.jsonl`, and the complete files, which monitor.upload uploads.

    `position.json` stores the position in nginx's log, and the size of current.jsonl at this position. If the service
    was killed, the next start cuts current.jsonl to the stored size, so the audit trail has each line exactly once."""

    folder: Path

    def resume(self) -> Position:
        """Cut current.jsonl to the size in position.json, and return the position in nginx's log from position.json."""
        try:
            found = json.loads(self.position.read_text())
        except (OSError, ValueError):
            return Position()
        if self.current.exists() and self.current.stat().st_size > found["spooled"]:
            os.truncate(self.current, found["spooled"])
        return Position(found["inode"], found["offset"])

    def add(self, lines: list[str], position: Position) -> None:
        with self.current.open("a") as file:
            file.writelines(f"{line}\n" for line in lines)
        self.record(position)

    def record(self, position: Position) -> None:
        size = self.current.stat().st_size if self.current.exists() else 0
        content = {"inode": position.inode, "offset": position.offset, "spooled": size}
        atomic_file.replace(self.position, json.dumps(content) + "\n")

    def complete(self, position: Position) -> None:
        """If current.jsonl has lines, rename it. The new name contains the file's earliest and latest time."""
        if not self.current.exists() or not self.current.stat().st_size:
            return
        span = span_of(self.current)
        self.current.rename(self.folder / f"{audit_trail.file_name(span, uuid.uuid4().hex[:8])}.jsonl")
        self.record(position)

    def waiting(self) -> list[Path]:
        """The complete files, oldest first."""
        return sorted(path for path in self.folder.glob("*.jsonl") if path != self.current)

    def limit(self) -> list[Path]:
        """Delete the oldest complete files until the rest has at most WAITING_BYTES. Returns the deleted files."""
        deleted, left = [], self.waiting()
        while sum(path.stat().st_size for path in left) > WAITING_BYTES:
            left[0].unlink(missing_ok=True)
            deleted.append(left.pop(0))
        return deleted

    @property
    def current(self) -> Path:
        return self.folder / "current.jsonl"

    @property
    def position(self) -> Path:
        return self.folder / "position.json"


def span_of(file: Path) -> Span:
    """The earliest and the latest time in a file of the audit trail. The lines may be out of order."""
    with file.open() as lines:
        times = [json.loads(line)["time"] for line in lines]
    return Span(datetime.fromisoformat(min(times)), datetime.fromisoformat(max(times)))
