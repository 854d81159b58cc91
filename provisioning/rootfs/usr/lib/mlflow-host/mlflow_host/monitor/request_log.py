"""Read nginx's request log, of the format `watched` in site.conf.j2, while nginx writes and logrotate renames it."""

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
"""Of a longer path, only the beginning is kept: caches have paths as their keys."""
IDLE_READS = 5
"""Reads without a new line after which a renamed file counts as complete: nginx reopens its log after the rename."""

_LINE = re.compile(
    r'(\S+) (\S+) ([^"]*) "(\S+) ([^" ]*)" (\d{3}) (\d+) (\d+) ([\d.]+) "([^"]*)" '
    r'([01]) ([01]) (\S+) "(\S*)" "(\S*)"'
)
_ESCAPED = re.compile(r"(?:\\x[0-9A-F]{2})+")


class Request(NamedTuple):
    """One request of the site."""

    time: str
    """Its end, in ISO 8601."""
    address: str
    user: str
    """The name in the login; "" without one. `accepted` says whether the login was."""
    method: str
    path: str
    """As the client sent it, without the query."""
    status: int
    bytes_out: int
    bytes_in: int
    seconds: float
    reached_mlflow: bool
    writes: bool
    accepted: bool
    """Whether the login was checked and accepted."""
    role: str
    by: str
    """"direct" if a process answered beside MLflow, else ""."""
    ids: tuple[tuple[str, str], ...]
    """What the request's and the response's fields name, from `mlflow_host.server.request_ids`."""


def parse(line: str) -> Request | None:
    """None for a line in another format: written before the site was configured, or by another server block."""
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
    """The header's IDs, without a decoder for those that need none."""
    if ids in ("", "-"):
        return ()
    if "%" in ids or "\\" in ids or "+" in ids:
        return tuple(parse_qsl(unescaped(ids), keep_blank_values=True))
    return tuple((name, value) for name, _, value in (pair.partition("=") for pair in ids.split("&")))


def unescaped(text: str) -> str:
    r"""A variable of nginx's log, which writes quotation marks, backslashes and bytes beyond ASCII as \xHH."""
    if "\\" not in text:
        return text
    return _ESCAPED.sub(lambda run: bytes.fromhex(run[0].replace("\\x", "")).decode(errors="replace"), text)


@dataclass(frozen=True)
class Position:
    """How far the log was read: the file's inode, and the offset in it."""

    inode: int = 0
    offset: int = 0


class Follower:
    """Reads the log from a position on; owns the open file."""

    def __init__(self, log: Path, position: Position):
        self.log, self.position = log, position
        self._file: BinaryIO | None = None
        self._idle = 0

    def read(self) -> list[str]:
        """The complete lines since `position`, at most CHUNK_BYTES of them; moves `position` behind them."""
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
        """Open the log file of `position`, even if logrotate has renamed it; if it is gone, the current file at its
        start. None if there is none yet."""
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
                f"mlflow-host: {self.log} was rotated more than once meanwhile: requests are missing", file=sys.stderr
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
