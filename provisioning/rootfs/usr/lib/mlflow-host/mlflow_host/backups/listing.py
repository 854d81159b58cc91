"""What the backups bucket can bring back, and which of it a request means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from mlflow_host.backups.history import stamp
from mlflow_host.backups.naming import DUMPS, parse
from mlflow_host.backups.repository import EMPTY, FOLDER, BackupError, Repository, Stanza, parse_stanza

AHEAD = timedelta(hours=26)
"""A dump that is this much younger than all base backups and their logs is what "latest" means."""


@dataclass(frozen=True)
class Base:
    """A base backup."""

    label: str
    stop: datetime
    bytes: int
    """Of the restored cluster."""
    empty: bool = False
    """Taken before anything was logged."""


@dataclass(frozen=True)
class Line:
    """One history: any moment from the end of its first base backup `until` its last segment can be had."""

    stanza: Stanza
    bases: tuple[Base, ...]
    until: datetime
    last_segment: str = ""

    @property
    def since(self) -> datetime:
        return self.bases[0].stop


@dataclass(frozen=True)
class Dump:
    key: str
    at: datetime
    bytes: int


@dataclass(frozen=True)
class Available:
    lines: tuple[Line, ...] = ()
    """With at least one base backup each, oldest first."""
    dumps: tuple[Dump, ...] = ()
    """Oldest first."""


@dataclass(frozen=True)
class Chosen:
    """What a request means: a base backup with the log after it up to `target`, or a dump."""

    line: Line | None = None
    base: Base | None = None
    target: datetime | None = None
    whole: bool = False
    """All of the log that there is, rather than the state at the end of the base backup or at `target`."""
    dump: Dump | None = None

    def described(self) -> str:
        if self.dump:
            return f"the dump {self.dump.key} of {stamp(self.dump.at)}"
        assert self.base and self.line
        if self.target:
            return f"the state at {stamp(self.target)}, from base backup {self.base.label}"
        if self.whole:
            return f"base backup {self.base.label} and all that was archived since, until {stamp(self.line.until)}"
        return f"base backup {self.base.label}, as of {stamp(self.base.stop)}"


def look(repository: Repository | None, client: Any, bucket: str) -> Available:
    """All of it. Raises BackupError, or what botocore raises, when the bucket cannot be read."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=DUMPS)
    dumps = [Dump(o["Key"], o["LastModified"], o["Size"]) for page in pages for o in page.get("Contents", ())]
    lines = [read_line(entry, client, bucket) for entry in (repository.info() if repository else ())]
    return Available(
        tuple(sorted((line for line in lines if line), key=lambda line: line.stanza.began)),
        tuple(sorted((dump for dump in dumps if dump.key.endswith(".dump")), key=lambda dump: dump.at)),
    )


def read_line(entry: dict[str, Any], client: Any, bucket: str) -> Line | None:
    """One stanza of `pgbackrest info`; None for one that is not ours or has no base backup to begin with."""
    stanza = parse_stanza(entry["name"])
    bases = [
        Base(
            made["label"],
            datetime.fromtimestamp(made["timestamp"]["stop"], UTC),
            made["info"]["size"],
            EMPTY in (made.get("annotation") or {}),
        )
        for made in entry.get("backup", ())
        if not made.get("error")
    ]
    if stanza is None or not bases:
        return None
    archive = (entry.get("archive") or [{}])[-1]
    last = archive.get("max") or ""
    until = bases[-1].stop
    if last:
        prefix = f"{FOLDER}/archive/{stanza.name}/{archive['id']}/{last[:16]}/{last}"
        found = client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", ())
        until = max([until, *(each["LastModified"] for each in found)])
    return Line(stanza, tuple(bases), until, last)


def choose(value: str, there: Available, major: int, ours: Stanza | None, now: datetime) -> Chosen:
    """What `value` means on a machine with PostgreSQL `major` whose cluster writes the history `ours`, if any.

    Raises BackupError, with what there is, for what is not there."""
    try:
        asked = parse(value)
    except ValueError as error:
        raise BackupError(f"{error}; there is {inventory(there)}") from None
    if asked.dump:
        if found := next((dump for dump in there.dumps if dump.key == asked.dump), None):
            return Chosen(dump=found)
        raise BackupError(f"there is no dump {asked.dump} in the backups bucket; there is {inventory(there)}")
    if asked.label:
        for line in reversed(there.lines):
            for base in line.bases:
                if base.label == asked.label:
                    return of_this_major(Chosen(line, base), major, there)
        raise BackupError(f"there is no base backup {asked.label} in the backups bucket; there is {inventory(there)}")
    if asked.time:
        for line in reversed(there.lines):
            until = now if line.stanza == ours else line.until
            bases = [base for base in line.bases if base.stop <= asked.time]
            if bases and line.stanza.began <= asked.time <= until:
                return of_this_major(Chosen(line, bases[-1], asked.time), major, there)
        raise BackupError(f"nothing that is kept reaches {stamp(asked.time)}; there is {inventory(there)}")
    of_major = [line for line in there.lines if line.stanza.major == major]
    # A machine that came up on a new volume, before anybody thought of a restore, has begun a history of its own.
    usable = [line for line in of_major if not line.bases[-1].empty] or of_major
    newest = there.dumps[-1] if there.dumps else None
    if usable and not (newest and newest.at - usable[-1].until > AHEAD):
        return Chosen(usable[-1], usable[-1].bases[-1], whole=True)
    if newest:
        return Chosen(dump=newest)
    raise BackupError(f"there is nothing to restore in the backups bucket: there is {inventory(there)}")


def of_this_major(chosen: Chosen, major: int, there: Available) -> Chosen:
    assert chosen.line
    if chosen.line.stanza.major == major:
        return chosen
    raise BackupError(
        f"{chosen.described()} is of PostgreSQL {chosen.line.stanza.major}, which PostgreSQL {major} of this image "
        f"cannot read: restore a dump, or pin an image with PostgreSQL {chosen.line.stanza.major}; there is "
        f"{inventory(there)}"
    )


def inventory(there: Available) -> str:
    """What can be restored, for one sentence."""
    parts = []
    for line in there.lines:
        labels = _few(base.label for base in line.bases)
        parts.append(f"any moment from {stamp(line.since)} until {stamp(line.until)} (base backups {labels})")
    if there.dumps:
        parts.append(f"dumps {_few(dump.key for dump in there.dumps)}")
    return " and ".join(parts) or "no backup at all"


def _few(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every) if len(every) <= 6 else f"{', '.join(every[:2])}, …, {', '.join(every[-3:])}"


def table(there: Available) -> list[str]:
    """All of it, a line each, for a person."""
    lines = []
    for line in there.lines:
        lines.append(f"PostgreSQL {line.stanza.major}: any moment from {stamp(line.since)} until {stamp(line.until)}")
        for base in line.bases:
            note = "  nothing was logged yet" if base.empty else ""
            lines.append(f"  {base.label:<34} {stamp(base.stop)}  {base.bytes >> 20:>8} MiB{note}")
    if there.dumps:
        lines.append("dumps:")
        lines += [f"  {dump.key:<62} {stamp(dump.at)}  {dump.bytes >> 20:>8} MiB" for dump in there.dumps]
    return lines or ["no backup yet"]
