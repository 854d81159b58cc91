"""The syntax of a restore request: the value of `restoreFrom` and the argument of mlflow-host-restore."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

LATEST = "latest"
DUMPS = "dumps/"
DIGEST = ".sha256"
"""Suffix of the object beside a dump that holds its SHA-256 digest, as sha256sum writes it."""
BASE_BACKUPS = "pgbackrest/backup/"
"""Prefix in the backups bucket. It has a folder per stanza, which has a folder per base backup, named by its label."""
LISTED = 3
"""Maximum number of names of a kind in a sentence."""

_LABEL = re.compile(r"\d{8}-\d{6}F(_\d{8}-\d{6}[DI])?")
_OURS = re.compile(rf"{DUMPS}\d{{8}}T\d{{6}}Z-[a-z-]{{1,20}}-\w{{1,64}}\.dump", re.ASCII)
_DUMP = re.compile(r"(?:s3://[^/\s]+/)?(?:dumps/)?([A-Za-z0-9][A-Za-z0-9._+-]{0,180}\.dump)")


@dataclass(frozen=True)
class RestoreRequest:
    """At most one field is set; none means the latest backup."""

    label: str = ""
    """pgBackRest's label of a base backup: restore its state without the log after it."""
    dump: str = ""
    """Key of a dump in the bucket."""
    time: datetime | None = None
    """Restore everything committed until then."""


def parse(value: str) -> RestoreRequest:
    """Raises ValueError, with one sentence, for a value that is neither a backup's name nor a point in time."""
    if value == LATEST:
        return RestoreRequest()
    if _LABEL.fullmatch(value):
        return RestoreRequest(label=value)
    if found := _DUMP.fullmatch(value):
        return RestoreRequest(dump=DUMPS + found[1])
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError(
            f'"{value}" is not a backup: use latest, a point in time such as 2026-11-22T14:15:00Z, or the name of '
            "a backup such as 20261122-013005F or 20261122T013300Z-nightly-f4a9b2c7d1e6.dump"
        ) from None
    return RestoreRequest(time=at if at.tzinfo else at.replace(tzinfo=UTC))


def is_dump(key: str) -> bool:
    """Whether an object's key is one that `postgres.dump_file.dump_key` makes, directly below dumps/."""
    return _OURS.fullmatch(key) is not None


def wrong(value: str) -> str | None:
    """The problem with a value, for the stack's preview; None for a valid one."""
    try:
        parse(value)
    except ValueError:
        return (
            "must be latest, a point in time such as 2026-11-22T14:15:00Z, or a backup's name such as "
            "20261122-013005F or dumps/….dump"
        )
    return None


def is_label(name: str) -> bool:
    """Whether the name of a stanza's folder is a base backup's label."""
    return _LABEL.fullmatch(name) is not None


def missing(value: str, dumps: Sequence[str], labels: Sequence[str], now: datetime) -> str | None:
    """Why `value` cannot be restored from a bucket with these dumps and base backups, judged by their names; None if it
    may be possible.

    `dumps` (keys) and `labels` (pgBackRest's labels, in UTC) are sorted, oldest first.
    """
    asked, there = parse(value), inventory(dumps, labels)
    if asked.dump and asked.dump not in dumps:
        return f"there is no dump {asked.dump} in the backups bucket; available: {there}"
    if asked.label and asked.label not in labels:
        return f"there is no base backup {asked.label} in the backups bucket; available: {there}"
    if asked.time and asked.time > now:
        return f"{value} is in the future"
    if asked.time and not (labels and made(labels[0]) <= asked.time):
        return f"no base backup was made before {value}; available: {there}"
    if asked == RestoreRequest() and not dumps and not labels:
        return "the backups bucket holds no backup"
    return None


def made(label: str) -> datetime:
    """The time of a base backup, from its label."""
    return datetime.strptime(re.findall(r"\d{8}-\d{6}", label)[-1], "%Y%m%d-%H%M%S").replace(tzinfo=UTC)


def inventory(dumps: Sequence[str], labels: Sequence[str]) -> str:
    kinds = {"base backups": labels, "dumps": dumps}
    return " and ".join(f"{kind} {newest(names)}" for kind, names in kinds.items() if names) or "no backup"


def newest(names: Sequence[str]) -> str:
    """The newest of the names, which are sorted by age, and their number."""
    if len(names) <= LISTED:
        return ", ".join(names)
    return f"{', '.join(names[-LISTED:])} (the newest {LISTED} of {len(names)})"
