"""Merge the prepared rows into the database in service, in one transaction, while the server stays up.

The rows of the previous adoption of the same source are the base of a three-way merge (`schema.merging`). Changes that
the source made after the previous adoption are merged; changes that this server made after it stay. The transaction of
the merge also renames the prepared database, which becomes the base of the next merge. The prepared database therefore
becomes the base only if its rows are in service.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psycopg2 import sql

from mlflow_host.contract.adoption import AdoptionError
from mlflow_host.postgres.catalog import head
from mlflow_host.postgres.cluster import (
    WORK_PREFIX,
    Cluster,
    connection,
    create_empty,
    databases,
    disconnect,
    drop,
    rows,
    run,
    value,
)
from mlflow_host.schema import empty_database
from mlflow_host.schema.merging import compare_rows, merge_rows, rows_gone
from mlflow_host.schema.release import ImageSchema, Release

Say = Callable[[str], None]


def work_database(name: str) -> str:
    """The database with the prepared rows. Each boot drops this database with all other unfinished databases."""
    return f"{WORK_PREFIX}adopt_{name.replace('-', '_')}"


def base_database(name: str) -> str:
    """The database with the rows of the last adoption of the source `name`."""
    return f"mlflow_adopted_{name.replace('-', '_')}"


@dataclass(frozen=True)
class Loaded:
    """The result of a merge. For each table, `tables` contains the number of rows that the source added or changed, how
    many of them are missing on this server, and how many of them differ on this server. `gone` contains the number of
    rows that the source deleted; this server keeps these rows."""

    tables: dict[str, tuple[int, int, int]]
    gone: dict[str, int]
    inserted: int
    updated: int
    first: bool


def load(cluster: Cluster, name: str, image: ImageSchema, mlflow: Release, blank: Path | None, say: Say) -> Loaded:
    """Merge the prepared rows. Raises AdoptionError; the database in service is then unchanged."""
    work, base = work_database(name), base_database(name)
    old, empty = f"{work}_old", f"{work}_empty"
    drop(cluster, old)
    with base_or_empty(cluster, base, empty, image, mlflow, blank, say) as (compared, first):
        with connection(cluster, work, autocommit=True) as opened:
            prepared = head(opened)
        if prepared != image.head:
            raise AdoptionError(f"the prepared rows are at migration {prepared}, not {image.head}: run adopt.py again")
        with connection(cluster, cluster.database) as writer:
            with connection(cluster, work) as from_work, connection(cluster, compared) as from_base:
                from_work.set_session(isolation_level="REPEATABLE READ", readonly=True)
                take_over_default_experiment(from_work, writer)
                say("merging the rows into the database in service")
                merged = merge_rows(from_work, from_base, writer)
                counted = compare_rows(from_work, writer)
                gone = {} if first else rows_gone(from_work, writer)
            lost = {table: numbers[1] for table, numbers in counted.items() if numbers[1]}
            if first and lost:
                listed = ", ".join(f"{table} ({count})" for table, count in lost.items())
                raise AdoptionError(
                    f"rows could not be inserted, because their names or IDs are now in use: {listed}; nothing "
                    "was changed: run adopt.py again"
                )
            rename = sql.SQL("ALTER DATABASE {} RENAME TO {}")
            for each in (base, work):
                disconnect(cluster, each)  # the session of a killed unit stays open until PostgreSQL detects the kill
            if base in databases(cluster):
                run(writer, rename.format(sql.Identifier(base), sql.Identifier(old)))
            run(writer, rename.format(sql.Identifier(work), sql.Identifier(base)))
    drop(cluster, old)
    return Loaded(counted, gone, sum(table.rows for table in merged), sum(table.values for table in merged), first)


@contextmanager
def base_or_empty(
    cluster: Cluster, base: str, empty: str, image: ImageSchema, mlflow: Release, blank: Path | None, say: Say
) -> Iterator[tuple[str, bool]]:
    """(the database to compare with, whether this is the first adoption of the source). A base with another schema is
    replaced by an empty database. With an empty base, the merge inserts only rows that are missing on this server. Rows
    from an earlier adoption stay unchanged, even if the source has changed these rows later."""
    if base in databases(cluster):
        with connection(cluster, base) as opened:
            revision = head(opened)
        if revision == image.head:
            yield base, False
            return
        say(f"{base} has the schema of another MLflow release: only rows that are missing here are inserted")
    if blank:
        empty_database.load(cluster, empty, blank)
    else:
        create_empty(cluster, empty)
        mlflow.create(empty, image.head)
    try:
        yield empty, base not in databases(cluster)
    finally:
        drop(cluster, empty)


def is_empty(opened: Any) -> bool:
    """Whether the database contains only the default experiment that MLflow creates."""
    tables = ("runs", "trace_info", "logged_models", "registered_models", "experiment_tags")
    if any(value(opened, f"SELECT EXISTS (SELECT 1 FROM {table})") for table in tables):
        return False
    return set(rows(opened, "SELECT experiment_id, name FROM experiments")) <= {(0, "Default")}


def take_over_default_experiment(source: Any, writer: Any) -> None:
    """If this server is empty, give its experiment 0 the values of the source's experiment 0."""
    if not is_empty(writer):
        return
    columns = ("name", "artifact_location", "lifecycle_stage", "creation_time", "last_update_time")
    found = rows(source, f"SELECT {', '.join(columns)} FROM experiments WHERE experiment_id = 0")
    if found:
        listed = ", ".join(f"{column} = %s" for column in columns)
        run(writer, f"UPDATE experiments SET {listed} WHERE experiment_id = 0", found[0])
