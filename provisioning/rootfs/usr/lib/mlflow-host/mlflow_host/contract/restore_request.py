"""The syntax of a restore request, which is the value of `restoreFrom` or the argument of mlflow-host-restore."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

LATEST = "latest"
DUMPS = "dumps/"
DIGEST = ".sha256"
"""The object with a dump's SHA-256 digest, in the format of sha256sum, has the dump's key plus this suffix."""
BASE_BACKUPS = "pgbackrest/backup/"
"""Prefix of the base backups in the backups bucket. Below this prefix, each stanza has a folder. The folder of a stanza
contains one folder per base backup, whose name is the label of the base backup."""
LISTED = 3
"""An error message lists at most this number of base backups and this number of dumps."""

_LABEL = re.compile(r"\d{8}-\d{6}F(_\d{8}-\d{6}[DI])?")
_OURS = re.compile(rf"{DUMPS}\d{{8}}T\d{{6}}Z-[a-z-]{{1,20}}-\w{{1,64}}\.dump", re.ASCII)
_DUMP = re.compile(r"(?:s3://[^/\s]+/)?(?:dumps/)?([A-Za-z0-9][A-Za-z0-9._+-]{0,180}\.dump)")


@dataclass(frozen=True)
class RestoreRequest:
    """In a restore request, at most one field has a value. A request without a value selects the latest backup."""

    label: str = ""
    """pgBackRest's label of a base backup. The restore does not replay the log that was archived after this backup."""
    dump: str = ""
    """Object key of a dump."""
    time: datetime | None = None
    """The restore includes every transaction that was committed up to this time."""


def parse(value: str) -> RestoreRequest:
    """Parse a restore request. Raises ValueError if the value is not `latest`, a backup's name or a point in time."""
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
    """Whether an object's key has the form of the keys that `postgres.dump_file.dump_key` returns."""
    return _OURS.fullmatch(key) is not None


def wrong(value: str) -> str | None:
    """The reason why a restore request is invalid, for `pulumi preview`. None for a valid request."""
    try:
        parse(value)
    except ValueError:
        return (
            "must be latest, a point in time such as 2026-11-22T14:15:00Z, or a backup's name such as "
            "20261122-013005F or dumps/….dump"
        )
    return None


def is_label(name: str) -> bool:
    """Whether the name of a folder in a stanza's folder is the label of a base backup."""
    return _LABEL.fullmatch(name) is not None


def missing(value: str, dumps: Sequence[str], labels: Sequence[str], now: datetime) -> str | None:
    """The reason why a bucket with these dumps and base backups cannot serve the restore request `value`. None if the
    names of the dumps and base backups show no such reason.

    `dumps` (object keys) and `labels` (pgBackRest's labels, in UTC) are sorted from the oldest to the newest.
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
    """The time of a base backup, read from the label."""
    return datetime.strptime(re.findall(r"\d{8}-\d{6}", label)[-1], "%Y%m%d-%H%M%S").replace(tzinfo=UTC)


def inventory(dumps: Sequence[str], labels: Sequence[str]) -> str:
    kinds = {"base backups": labels, "dumps": dumps}
    return " and ".join(f"{kind} {newest(names)}" for kind, names in kinds.items() if names) or "no backup"


def newest(names: Sequence[str]) -> str:
    """A text with the last LISTED names and the number of all names. `names` is sorted, and the newest name is last."""
    if len(names) <= LISTED:
        return ", ".join(names)
    return f"{', '.join(names[-LISTED:])} (the newest {LISTED} of {len(names)})"
