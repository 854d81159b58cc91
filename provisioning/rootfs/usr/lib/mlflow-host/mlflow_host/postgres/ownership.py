"""The ownership record is a comment on a database. The record names the release that last migrated the database.

A comment survives a rename of its database, can be written in the rename's transaction, does not affect MLflow, and is
printed by psql's `\\l+`. An older release does not know the migrations of a newer release. Only the record shows that a
newer MLflow release migrated the database. Older and newer images read the record, so never remove or rename its keys.
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
    """A kept database of a newer release after a carry back to an older release. The kept database has the only copy of
    the data that the older schema cannot hold. A later upgrade merges this data into the upgraded database."""

    database: str
    head: str
    count: int
    carried_to: str
    """The migration head of the older schema into which the rows were last copied."""
    mlflow_version: str = ""
    image_version: str = ""
    at: str = ""
    unreadable: dict[str, list[str]] = field(default_factory=dict)
    """The values, by "table.column", that the older release cannot read, and whose rows were therefore not carried."""


@dataclass(frozen=True)
class OwnershipRecord:
    """`head` is the database's migration head. `count` is the number of migrations up to `head`. `waiting` lists the
    pending merges: the merge with the newest migration head is first, and an upgrade starts with the last merge."""

    head: str
    count: int
    mlflow_version: str = ""
    image_version: str = ""
    at: str = ""
    waiting: tuple[PendingMerge, ...] = ()
    format: int = FORMAT
    unresolved: tuple[str, ...] = ()
    """Kept databases with rows that a merge could not insert, because another row had the same key."""

    @property
    def needed(self) -> set[str]:
        """The kept databases that have the only copy of some data."""
        return {entry.database for entry in self.waiting} | set(self.unresolved)


def parse(text: str | None) -> OwnershipRecord | None:
    """Return the ownership record in a comment, or None if the comment has no record. Unknown keys are ignored."""
    try:
        raw: Any = json.loads(text or "")["mlflow-host"]
        waiting = tuple(PendingMerge(**_known(PendingMerge, entry)) for entry in raw.get("waiting", ()))
        unresolved = tuple(map(str, raw.get("unresolved", ())))
        return OwnershipRecord(**{**_known(OwnershipRecord, raw), "waiting": waiting, "unresolved": unresolved})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def existing(waiting: tuple[PendingMerge, ...], there: set[str]) -> tuple[PendingMerge, ...]:
    """Return the pending merges whose kept database still exists. `there` contains the names of all existing databases.

    Example: database A was carried to database B, and later B was carried to C. If B no longer exists, the entry of A
    gets the `carried_to` of B. Otherwise an upgrade would treat rows as deleted by users if B could hold the rows and C
    could not."""
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
