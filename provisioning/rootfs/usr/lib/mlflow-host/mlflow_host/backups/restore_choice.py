"""List the backups in the bucket, and find the backup that a restore request selects."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from mlflow_host.backups.last_runs import stamp
from mlflow_host.contract.restore_request import DIGEST, DUMPS, LISTED, is_dump, newest, parse
from mlflow_host.postgres.pgbackrest import EMPTY_ANNOTATION, FOLDER, BackupError, Repository, Stanza, parse_stanza

AHEAD = timedelta(hours=26)
"""A restore of "latest" prefers the newest dump to a base backup if the dump is newer than the last archived log
segment by more than this time."""


@dataclass(frozen=True)
class BaseBackup:
    """A base backup."""

    label: str
    stop: datetime
    bytes: int
    """Size of the restored cluster."""
    empty: bool = False
    """Whether the backup contains no data of users."""


@dataclass(frozen=True)
class StanzaRange:
    """A stanza with base backups. All moments from the end of the first base backup to `until` can be restored. `until`
    is the time of the last archived segment."""

    stanza: Stanza
    bases: tuple[BaseBackup, ...]
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
    recorded: bool = True
    """Whether the dump's digest is stored beside the dump. Older releases stored no digest."""


@dataclass(frozen=True)
class RecoveryPoints:
    lines: tuple[StanzaRange, ...] = ()
    """The stanzas with at least one base backup, oldest first."""
    dumps: tuple[Dump, ...] = ()
    """The dumps, oldest first."""


@dataclass(frozen=True)
class RecoveryPoint:
    """The backup to restore: a dump, or a base backup. After the restore of a base backup, the archived log is replayed
    up to `target`, up to the end of the log (`whole`), or not at all."""

    line: StanzaRange | None = None
    base: BaseBackup | None = None
    target: datetime | None = None
    whole: bool = False
    """Whether all of the archived log is replayed."""
    dump: Dump | None = None

    def described(self) -> str:
        if self.dump:
            return f"the dump {self.dump.key} of {stamp(self.dump.at)}"
        assert self.base and self.line
        if self.target:
            return f"the state at {stamp(self.target)}, from base backup {self.base.label}"
        if self.whole:
            return f"base backup {self.base.label} and the log archived after it, until {stamp(self.line.until)}"
        return f"base backup {self.base.label}, as of {stamp(self.base.stop)}"


def list_recovery_points(repository: Repository | None, client: Any, bucket: str) -> RecoveryPoints:
    """All backups in the bucket. Objects below dumps/ are ignored if their names are not names of dumps.

    Raises BackupError or botocore's exceptions if the bucket cannot be read."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=DUMPS)
    listed = {o["Key"]: o for page in pages for o in page.get("Contents", ())}
    dumps = [
        Dump(key, o["LastModified"], o["Size"], key + DIGEST in listed) for key, o in listed.items() if is_dump(key)
    ]
    lines = [stanza_range(entry, client, bucket) for entry in (repository.info() if repository else ())]
    return RecoveryPoints(
        tuple(sorted((line for line in lines if line), key=lambda line: line.stanza.began)),
        tuple(sorted(dumps, key=lambda dump: dump.at)),
    )


def stanza_range(entry: dict[str, Any], client: Any, bucket: str) -> StanzaRange | None:
    """One stanza of `pgbackrest info`; None for a stanza of another program or a stanza without base backups."""
    stanza = parse_stanza(entry["name"])
    bases = [
        BaseBackup(
            made["label"],
            datetime.fromtimestamp(made["timestamp"]["stop"], UTC),
            made["info"]["size"],
            EMPTY_ANNOTATION in (made.get("annotation") or {}),
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
    return StanzaRange(stanza, tuple(bases), until, last)


def choose(value: str, there: RecoveryPoints, major: int, ours: Stanza | None, now: datetime) -> RecoveryPoint:
    """Find the backup that the restore request `value` selects, for the PostgreSQL version `major`. `ours` is the
    stanza of this machine's cluster.

    Raises BackupError if no backup matches `value`. The message of BackupError lists the available backups."""
    try:
        asked = parse(value)
    except ValueError as error:
        raise BackupError(f"{error}; available: {inventory(there)}") from None
    if asked.dump:
        if found := next((dump for dump in there.dumps if dump.key == asked.dump), None):
            return RecoveryPoint(dump=found)
        raise BackupError(f"there is no dump {asked.dump} in the backups bucket; available: {inventory(there)}")
    if asked.label:
        for line in reversed(there.lines):
            for base in line.bases:
                if base.label == asked.label:
                    return of_this_major(RecoveryPoint(line, base), major, there)
        raise BackupError(f"there is no base backup {asked.label} in the backups bucket; available: {inventory(there)}")
    if asked.time:
        for line in reversed(there.lines):
            until = now if line.stanza == ours else line.until
            bases = [base for base in line.bases if base.stop <= asked.time]
            if bases and line.stanza.began <= asked.time <= until:
                return of_this_major(RecoveryPoint(line, bases[-1], asked.time), major, there)
        raise BackupError(f"no backup covers {stamp(asked.time)}; available: {inventory(there)}")
    of_major = [line for line in there.lines if line.stanza.major == major]
    # If a machine booted with a new volume before the restore was requested, the new volume's stanza contains no data.
    usable = [line for line in of_major if not line.bases[-1].empty] or of_major
    # A dump without a digest may come from any program with write access. A request for "latest" ignores such a dump.
    newest = next((dump for dump in reversed(there.dumps) if dump.recorded), None)
    if usable and not (newest and newest.at - usable[-1].until > AHEAD):
        return RecoveryPoint(usable[-1], usable[-1].bases[-1], whole=True)
    if newest:
        return RecoveryPoint(dump=newest)
    raise BackupError(f"there is nothing to restore in the backups bucket; available: {inventory(there)}")


def of_this_major(chosen: RecoveryPoint, major: int, there: RecoveryPoints) -> RecoveryPoint:
    assert chosen.line
    if chosen.line.stanza.major == major:
        return chosen
    raise BackupError(
        f"{chosen.described()} is from PostgreSQL {chosen.line.stanza.major}, which PostgreSQL {major} of this image "
        f"cannot read: restore a dump, or pin an image with PostgreSQL {chosen.line.stanza.major}; available: "
        f"{inventory(there)}"
    )


def inventory(there: RecoveryPoints) -> str:
    """The available backups, as text for an error message."""
    parts = []
    for line in there.lines[-LISTED:]:
        labels = newest([base.label for base in line.bases])
        parts.append(f"any moment from {stamp(line.since)} until {stamp(line.until)} (base backups {labels})")
    if there.dumps:
        parts.append(f"dumps {newest([dump.key for dump in there.dumps])}")
    return " and ".join(parts) or "no backup"


def table(there: RecoveryPoints) -> list[str]:
    """The available backups, one backup per line."""
    lines = []
    for line in there.lines:
        lines.append(f"PostgreSQL {line.stanza.major}: any moment from {stamp(line.since)} until {stamp(line.until)}")
        for base in line.bases:
            note = "  empty: nothing was logged yet" if base.empty else ""
            lines.append(f"  {base.label:<34} {stamp(base.stop)}  {base.bytes >> 20:>8} MiB{note}")
    if there.dumps:
        lines.append("dumps:")
        for dump in there.dumps:
            note = "" if dump.recorded else "  no digest: restored only by its name"
            lines.append(f"  {dump.key:<62} {stamp(dump.at)}  {dump.bytes >> 20:>8} MiB{note}")
    return lines or ["no backup yet"]
