"""What a restore can be asked for: the words of `restoreFrom` and of the command, without knowing what there is.

The stack imports this as well, so it needs nothing but the standard library.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime

LATEST = "latest"
DUMPS = "dumps/"

_LABEL = re.compile(r"\d{8}-\d{6}F(_\d{8}-\d{6}[DI])?")
_DUMP = re.compile(r"(?:s3://[^/\s]+/)?(?:dumps/)?([A-Za-z0-9][A-Za-z0-9._+-]{0,180}\.dump)")


@dataclass(frozen=True)
class Asked:
    """Exactly one of these; none of them means the latest that there is."""

    label: str = ""
    """A base backup by pgBackRest's name: the state at its end."""
    dump: str = ""
    """A dump by its key in the bucket."""
    time: datetime | None = None
    """A moment: all that was committed until then."""


def parse(value: str) -> Asked:
    """Raises ValueError, with a sentence, for what is no name of a backup and no point in time."""
    if value == LATEST:
        return Asked()
    if _LABEL.fullmatch(value):
        return Asked(label=value)
    if found := _DUMP.fullmatch(value):
        return Asked(dump=DUMPS + found[1])
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError(
            f'"{value}" is no backup: it must be latest, a point in time such as 2026-11-22T14:15:00Z, or the name of '
            "a backup such as 20261122-013005F or 20261122T013300Z-nightly-f4a9b2c7d1e6.dump"
        ) from None
    return Asked(time=at if at.tzinfo else at.replace(tzinfo=UTC))


def wrong(value: str) -> str | None:
    """What is wrong with a value, for the stack to say at preview; None where nothing is."""
    try:
        parse(value)
    except ValueError:
        return (
            "must be latest, a point in time such as 2026-11-22T14:15:00Z, or a backup's name such as "
            "20261122-013005F or dumps/….dump"
        )
    return None
