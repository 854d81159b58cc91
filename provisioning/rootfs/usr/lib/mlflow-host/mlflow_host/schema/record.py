"""Who last owned a database, kept as a comment on it: it survives a rename, changes in the same transaction as one,
is out of MLflow's way, and `\\l+` shows it to people.

The older release cannot know a newer release's revisions, so the record is also what tells "newer" from "foreign".
Images of other ages read it: change it only by adding.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from psycopg2 import sql

from mlflow_host.schema.cluster import Cluster, connection, rows, run, value

FORMAT = 1


@dataclass(frozen=True)
class Waiting:
    """A kept database of a newer release whose content was carried back, and which still holds what did not fit."""

    database: str
    head: str
    count: int
    carried_to: str
    """Head of the schema that its content was last fitted into."""
    mlflow_version: str = ""
    image_version: str = ""
    at: str = ""


@dataclass(frozen=True)
class Record:
    """`head` and `count` say which schema and how many migrations lead to it; `waiting` is ordered newest head first,
    and is put back last to first."""

    head: str
    count: int
    mlflow_version: str = ""
    image_version: str = ""
    at: str = ""
    waiting: tuple[Waiting, ...] = ()
    format: int = FORMAT


def parse(text: str | None) -> Record | None:
    """None where the comment is not ours. Keys that a later format added are passed over."""
    try:
        raw: Any = json.loads(text or "")["mlflow-host"]
        waiting = tuple(Waiting(**_known(Waiting, entry)) for entry in raw.get("waiting", ()))
        return Record(**{**_known(Record, raw), "waiting": waiting})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def dump(record: Record) -> str:
    return json.dumps({"mlflow-host": dataclasses.asdict(record)}, separators=(", ", ": "))


def read(opened: Any, database: str) -> Record | None:
    query = "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = %s"
    return parse(value(opened, query, (database,)))


def write(opened: Any, database: str, record: Record) -> None:
    run(opened, sql.SQL("COMMENT ON DATABASE {} IS %s").format(sql.Identifier(database)), (dump(record),))


def all_records(cluster: Cluster) -> dict[str, Record]:
    """Of every database in the cluster that has one, by name."""
    query = "SELECT datname, shobj_description(oid, 'pg_database') FROM pg_database"
    with connection(cluster) as opened:
        found = {name: parse(text) for name, text in rows(opened, query)}
    return {name: record for name, record in found.items() if record}


def _known(kind: Any, raw: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {key: content for key, content in raw.items() if key in names}
