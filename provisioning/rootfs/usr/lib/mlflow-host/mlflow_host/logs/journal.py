"""Read the machine's journal with journalctl, and convert each line into an event of CloudWatch Logs.

The streams are `nginx`, `mlflow` (the server processes) and `host` (boot steps, PostgreSQL, backups, timers). The three
streams together contain the lines that `journalctl -u nginx -u 'mlflow-*'` prints. An event is a JSON object with the
unit, the priority and the message.
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
    # Without --merge, --follow omits earlier boots, so lines that were not sent before a reboot would be lost.
    "--merge",
    # Without --all, journalctl prints null for a field of more than 4,096 bytes.
    *("--all", "--output-fields=MESSAGE,PRIORITY,UNIT,_PID,_SYSTEMD_UNIT"),
)
CHUNK_BYTES = 1 << 16
LINE_BYTES = 4 << 20
"""Journal lines with more bytes are skipped, so another program cannot fill the memory of this service. journald splits
the output of units into lines of at most 48 KiB."""
EVENT_BYTES = 256 << 10
"""Maximum size of an event. Until 2025, AWS limited events in PutLogEvents to this size; the new limit is 1 MiB."""
CUT_BYTES = 40_000
"""If an event exceeds EVENT_BYTES, its message is cut to this size. JSON needs at most six bytes for a character."""


class JournalEnded(Exception):
    """journalctl has ended. The exception's message contains the exit status of journalctl."""


class Event(NamedTuple):
    stream: str
    at: int
    """Milliseconds since the epoch."""
    text: str


class Journal:
    """Follows the journal. The object starts and stops its own journalctl process."""

    def __init__(self, cursor: str, command: Sequence[str] = FOLLOW):
        """Start with the line after `cursor`. If `cursor` is empty, start with the oldest line."""
        after = [f"--after-cursor={cursor}"] if cursor else []
        self._process = subprocess.Popen([*command, *after], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self._process.stdout
        self._output = self._process.stdout.fileno()
        self._rest = b""
        self._too_long = False
        """Whether the current line is too long and is therefore skipped."""

    def read(self, seconds: float) -> list[bytes]:
        """Return the next lines, or an empty list if no line arrives within `seconds`. Raises JournalEnded."""
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
    """Return the cursor and the event of a line. The event is None for units whose lines are not sent to CloudWatch."""
    raw: dict[str, Any] = json.loads(line)
    # In a line from systemd (process 1), UNIT is the unit's name. Other processes can set UNIT, so _PID is checked.
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
    """Convert a field to text. A field is a string, or a list of bytes if it is not UTF-8. If a line repeats a field,
    the field is a list, and each element is a string or a list of bytes."""
    if isinstance(value, list):
        if all(isinstance(each, int) for each in value):
            return bytes(value).decode(errors="replace")
        return "\n".join(map(_text, value))
    return "" if value is None else str(value)
