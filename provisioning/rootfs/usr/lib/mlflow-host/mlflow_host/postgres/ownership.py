"""The ownership record: a comment on a database that names the release that last migrated it.

A comment survives a rename, changes in the same transaction, does not disturb MLflow, and psql's `\\l+` shows it.
An older release does not know the migrations of a newer one, so only the record distinguishes the database of a newer
release from a foreign one. Older and newer images read the record too: only ever add keys.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field, replace
from typing import Any

from psycopg2 import sql

from mlflow_host.postgres.cluster import run, value

FORMAT = 1


@dataclass(frozen=True)
class PendingMerge:
    """A kept database of a newer release, carried back to an older one. It holds the only copy of the data that the
    older schema cannot hold; a later upgrade merges that data back."""

    database: str
    head: str
    count: int
    carried_to: str
    """Migration head of the schema to which its content was last carried."""
    mlflow_version: str = ""
    image_version: str = ""
    at: str = ""
    unreadable: dict[str, list[str]] = field(default_factory=dict)
    """By "table.column", the values that the release it was carried to cannot read. Rows with them were not carried."""


@dataclass(frozen=True)
class OwnershipRecord:
    """`head` is the migration head and `count` the number of migrations up to it. `waiting` lists the pending merges,
    newest head first; an upgrade merges them from last to first."""

    head: str
    count: int
    mlflow_version: str = ""
    image_version: str = ""
    at: str = ""
    waiting: tuple[PendingMerge, ...] = ()
    format: int = FORMAT
    unresolved: tuple[str, ...] = ()
    """Kept databases with rows that a merge could not insert, because another row has their key."""

    @property
    def needed(self) -> set[str]:
        """The kept databases that hold the only copy of something."""
        return {entry.database for entry in self.waiting} | set(self.unresolved)


def parse(text: str | None) -> OwnershipRecord | None:
    """The record in a comment; None for any other comment. Keys that a later format added are ignored."""
    try:
        raw: Any = json.loads(text or "")["mlflow-host"]
        waiting = tuple(PendingMerge(**_known(PendingMerge, entry)) for entry in raw.get("waiting", ()))
        unresolved = tuple(map(str, raw.get("unresolved", ())))
        return OwnershipRecord(**{**_known(OwnershipRecord, raw), "waiting": waiting, "unresolved": unresolved})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def existing(waiting: tuple[PendingMerge, ...], there: set[str]) -> tuple[PendingMerge, ...]:
    """The pending merges whose kept database is among the databases `there`.

    A newer one that was carried to the schema of a missing one counts as carried to where that one was. Otherwise an
    upgrade would take everything that the missing release could hold, and the older one could not, for deleted."""
    found: list[PendingMerge] = []
    for entry in waiting:  # newest head first
        if entry.database in there:
            found.append(entry)
        elif found and found[-1].carried_to == entry.head:
            both = {
                place: sorted({*found[-1].unreadable.get(place, ()), *entry.unreadable.get(place, ())})
                for place in found[-1].unreadable | entry.unreadable
            }
            found[-1] = replace(found[-1], carried_to=entry.carried_to, unreadable=both)
    return tuple(found)


def dump(record: OwnershipRecord) -> str:
    return json.dumps({"mlflow-host": dataclasses.asdict(record)}, separators=(", ", ": "))


def read(opened: Any, database: str) -> OwnershipRecord | None:
    query = "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = %s"
    return parse(value(opened, query, (database,)))


def write(opened: Any, database: str, record: OwnershipRecord) -> None:
    run(opened, sql.SQL("COMMENT ON DATABASE {} IS %s").format(sql.Identifier(database)), (dump(record),))


def _known(kind: Any, raw: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {key: content for key, content in raw.items() if key in names}
