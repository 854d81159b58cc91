"""Read nginx's request log while nginx writes to it and logrotate renames it. site.conf.j2 defines the log's format."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import parse_qsl

LOG = Path("/var/log/nginx/access.log")
CHUNK_BYTES = 1 << 20
PATH_CHARACTERS = 2000
"""Longer paths are cut to this length, because caches use paths as keys."""
IDLE_READS = 5
"""nginx may write to a renamed file until nginx reopens its log. After this number of reads without a new line, the
renamed file counts as complete."""

_LINE = re.compile(
    r'(\S+) (\S+) ([^"]*) "(\S+) ([^" ]*)" (\d{3}) (\d+) (\d+) ([\d.]+) "([^"]*)" '
    r'([01]) ([01]) (\S+) "(\S*)" "(\S*)"'
)
_ESCAPED = re.compile(r"(?:\\x[0-9A-F]{2})+")


class Request(NamedTuple):
    """One request of the site."""

    time: str
    """Time at which the request ended, in ISO 8601."""
    address: str
    user: str
    """The user name that the client sent, or "". If `accepted` is false, the login was not valid."""
    method: str
    path: str
    """The path as the client sent it, without the query."""
    status: int
    bytes_out: int
    bytes_in: int
    seconds: float
    reached_mlflow: bool
    writes: bool
    accepted: bool
    """Whether the password was checked and was right."""
    role: str
    by: str
    """The value is "direct" if a server process answered without MLflow's code, else ""."""
    ids: tuple[tuple[str, str], ...]
    """Names and values of the IDs in the request and the response, from `mlflow_host.server.request_ids`."""


def parse(line: str) -> Request | None:
    """Parse a line. Returns None for lines in another format, which nginx writes for other server blocks or before the
    site is configured."""
    found = _LINE.fullmatch(line)
    if not found:
        return None
    at, address, user, method, path, status, out, inward, seconds, upstream, writes, accepted, role, by, ids = (
        found.groups()
    )
    return Request(
        at,
        address,
        "" if user == "-" else unescaped(user),
        method,
        unescaped(path)[:PATH_CHARACTERS],
        int(status),
        int(out),
        int(inward),
        float(seconds),
        upstream not in ("", "-"),
        writes == "1",
        accepted == "1",
        role,
        "" if by == "-" else by,
        pairs(ids),
    )


def pairs(ids: str) -> tuple[tuple[str, str], ...]:
    """Split the logged IDs into names and values. To save time, IDs without encoded characters are not decoded."""
    if ids in ("", "-"):
        return ()
    if "%" in ids or "\\" in ids or "+" in ids:
        return tuple(parse_qsl(unescaped(ids), keep_blank_values=True))
    return tuple((name, value) for name, _, value in (pair.partition("=") for pair in ids.split("&")))


def unescaped(text: str) -> str:
    r"""Decode a variable in nginx's log. nginx writes quotation marks, backslashes and non-ASCII bytes as \xHH."""
    if "\\" not in text:
        return text
    return _ESCAPED.sub(lambda run: bytes.fromhex(run[0].replace("\\x", "")).decode(errors="replace"), text)


@dataclass(frozen=True)
class Position:
    """A position in the log: the inode of the file, and the offset in the file."""

    inode: int = 0
    offset: int = 0


class Follower:
    """Reads the log from a position, and keeps the log file open."""

    def __init__(self, log: Path, position: Position):
        self.log, self.position = log, position
        self._file: BinaryIO | None = None
        self._idle = 0

    def read(self) -> list[str]:
        """Return the complete lines after `position`, at most CHUNK_BYTES, and move `position` to their end."""
        if self._file is None:
            self._file = self._open()
        if self._file is None:
            return []
        self._file.seek(self.position.offset)
        complete, _, _ = self._file.read(CHUNK_BYTES).rpartition(b"\n")
        if complete:
            self._idle = 0
            self.position = Position(self.position.inode, self.position.offset + len(complete) + 1)
            return complete.decode(errors="replace").split("\n")
        self._idle += 1
        if self._idle >= IDLE_READS and self._is_renamed():
            self.close()
            self.position = Position()
        return []

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._idle = None, 0

    def _open(self) -> BinaryIO | None:
        """Open the log file of `position`, even if logrotate has renamed the file. If the file no longer exists, open
        the current log file at its start. Returns None if no log file exists."""
        renamed = self.log.with_name(f"{self.log.name}.1")
        for path in (self.log, renamed):
            with suppress(FileNotFoundError):
                file = path.open("rb")
                inode = os.fstat(file.fileno()).st_ino
                if inode == self.position.inode and os.fstat(file.fileno()).st_size >= self.position.offset:
                    return file
                file.close()
        if self.position.inode:
            print(
                f"mlflow-host: {self.log} was rotated before all lines were read: requests are missing", file=sys.stderr
            )
        with suppress(FileNotFoundError):
            file = self.log.open("rb")
            self.position = Position(os.fstat(file.fileno()).st_ino)
            return file
        return None

    def _is_renamed(self) -> bool:
        try:
            return self.log.stat().st_ino != self.position.inode
        except FileNotFoundError:
            return False
