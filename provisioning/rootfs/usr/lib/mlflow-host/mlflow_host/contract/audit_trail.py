"""Names of the audit trail's objects in the backups bucket. Each object is a gzipped file with one JSON line per write.

    audit/2026/11/30/20261130T061000Z-20261130T061958Z-vol-0123456789abcdef0-9f86d081.jsonl.gz

The machine's role may add objects below PREFIX, but cannot replace or delete objects there (`infra/iam_roles.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime

PREFIX = "audit/"
_KEY = re.compile(rf"{PREFIX}\d{{4}}/\d\d/\d\d/(\d{{8}}T\d{{6}}Z)-(\d{{8}}T\d{{6}}Z)-([\w-]+)\.jsonl\.gz")
_STAMP = "%Y%m%dT%H%M%SZ"


@dataclass(frozen=True)
class Span:
    """The time of the first line and the time of the last line of an object."""

    first: datetime
    last: datetime


def folder(day: datetime) -> str:
    """The key prefix of the objects whose first line was written on the given day (UTC)."""
    return f"{PREFIX}{day.astimezone(UTC):%Y/%m/%d}/"


def file_name(span: Span, unique: str) -> str:
    """The name, without suffix, of the local file with the lines of one object."""
    return "-".join([*(at.astimezone(UTC).strftime(_STAMP) for at in (span.first, span.last)), unique])


def key(name: str, machine: str) -> str:
    """The key of the object to which the machine uploads the local file `name`."""
    first, last, unique = name.split("-")
    return f"{folder(datetime.strptime(first, _STAMP).replace(tzinfo=UTC))}{first}-{last}-{machine}-{unique}.jsonl.gz"


def span_of(name: str) -> Span | None:
    """The times in an object's key, or None if the object does not belong to the audit trail."""
    found = _KEY.fullmatch(name)
    if not found:
        return None
    first, last = (datetime.strptime(text, _STAMP).replace(tzinfo=UTC) for text in found.groups()[:2])
    return Span(first, last)
