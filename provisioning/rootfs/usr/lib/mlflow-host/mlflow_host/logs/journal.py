"""The machine's journal, read by journalctl after a cursor, and the event of CloudWatch Logs that a line of it becomes.

The streams are `nginx`, `mlflow` (the server processes) and `host` (boot steps, PostgreSQL, backups, timers): what
`journalctl -u nginx -u 'mlflow-*'` prints. An event is a JSON object with the unit, the priority and the message.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Sequence
from typing import Any, NamedTuple

FOLLOW = (
    *("journalctl", "--follow", "--no-tail", "--quiet", "--output=json"),
    # Without --merge, --follow leaves out earlier boots: lines that were not sent before a reboot.
    "--merge",
    # Without --all, a field of more than 4,096 bytes is null.
    *("--all", "--output-fields=MESSAGE,PRIORITY,UNIT,_PID,_SYSTEMD_UNIT"),
)
CHUNK_BYTES = 1 << 16
LINE_BYTES = 4 << 20
"""A longer line is left out, so that no program can fill this one's memory. The journal cuts the output of units at
48 KiB."""
EVENT_BYTES = 256 << 10
"""Largest event, by AWS's documentation of PutLogEvents; it allows 1 MiB since 2025."""
CUT_BYTES = 40_000
"""Bytes that are kept of a longer message: JSON writes a character as six bytes at most."""


class JournalEnded(Exception):
    """journalctl ended; the text states its exit status."""


class Event(NamedTuple):
    stream: str
    at: int
    """Milliseconds since the epoch."""
    text: str


class Journal:
    """Follows the journal; owns the process of journalctl."""

    def __init__(self, cursor: str, command: Sequence[str] = FOLLOW):
        """Begins after `cursor`, or with the oldest line if it is empty."""
        after = [f"--after-cursor={cursor}"] if cursor else []
        self._process = subprocess.Popen([*command, *after], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self._process.stdout
        self._output = self._process.stdout.fileno()
        self._rest = b""
        self._too_long = False
        """Whether the begun line is left out."""

    def read(self, seconds: float) -> list[bytes]:
        """The next lines; none if there is none for `seconds`. Raises JournalEnded."""
        while select.select([self._output], [], [], seconds)[0]:
            found = os.read(self._output, CHUNK_BYTES)
            if not found:
                raise JournalEnded(f"journalctl ended with status {self._process.wait()}")
            *lines, self._rest = (self._rest + found).split(b"\n")
            if lines and self._too_long:
                lines, self._too_long = lines[1:], False
            if self._too_long or len(self._rest) > LINE_BYTES:
                self._rest, self._too_long = b"", True
            if lines:
                return lines
        return []

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def parse(line: bytes) -> tuple[str, Event | None]:
    """The cursor of a line, and its event. None if it belongs to no unit whose lines are sent."""
    raw: dict[str, Any] = json.loads(line)
    # What systemd writes about a unit has the unit's name in UNIT, which any other process could set, too.
    unit = _text(raw.get("UNIT" if _text(raw.get("_PID")) == "1" else "_SYSTEMD_UNIT"))
    stream = stream_of(unit)
    if not stream:
        return raw["__CURSOR"], None
    message, content = _text(raw.get("MESSAGE")), {"unit": unit, "priority": int(_text(raw.get("PRIORITY")) or 6)}
    text = _json({**content, "message": message})
    if len(text.encode()) > EVENT_BYTES:
        kept = message.encode(errors="replace")[:CUT_BYTES].decode(errors="ignore")
        text = _json({**content, "message": kept, "cut": True})
    return raw["__CURSOR"], Event(stream, int(raw["__REALTIME_TIMESTAMP"]) // 1000, text)


def stream_of(unit: str) -> str:
    if unit == "nginx.service":
        return "nginx"
    if unit.startswith("mlflow-server@"):
        return "mlflow"
    return "host" if unit.startswith("mlflow-") else ""


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(errors="replace").decode()


def _text(value: Any) -> str:
    """A field: text, a list of bytes if it is not UTF-8, or a list of these if the line has the field several times."""
    if isinstance(value, list):
        if all(isinstance(each, int) for each in value):
            return bytes(value).decode(errors="replace")
        return "\n".join(map(_text, value))
    return "" if value is None else str(value)
