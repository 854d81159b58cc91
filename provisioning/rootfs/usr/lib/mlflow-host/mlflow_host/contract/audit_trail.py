"""The audit trail in the backups bucket: names of its objects, which hold one JSON object per line, compressed by gzip.

    audit/2026/11/30/20261130T061000Z-20261130T061958Z-vol-0123456789abcdef0-9f86d081.jsonl.gz

The machine's role may add objects below PREFIX. It may neither replace nor delete one (`infra/access.py`).
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
    """The times of the first and the last line of an object."""

    first: datetime
    last: datetime


def folder(day: datetime) -> str:
    """The prefix of the objects whose first line is of that day (UTC)."""
    return f"{PREFIX}{day.astimezone(UTC):%Y/%m/%d}/"


def file_name(span: Span, unique: str) -> str:
    """The name of the file with the object's lines on the machine, without its suffix."""
    return "-".join([*(at.astimezone(UTC).strftime(_STAMP) for at in (span.first, span.last)), unique])


def key(name: str, machine: str) -> str:
    """The name of the object with the lines of a file."""
    first, last, unique = name.split("-")
    return f"{folder(datetime.strptime(first, _STAMP).replace(tzinfo=UTC))}{first}-{last}-{machine}-{unique}.jsonl.gz"


def span_of(name: str) -> Span | None:
    """None for an object that is not part of the audit trail."""
    found = _KEY.fullmatch(name)
    if not found:
        return None
    first, last = (datetime.strptime(text, _STAMP).replace(tzinfo=UTC) for text in found.groups()[:2])
    return Span(first, last)
