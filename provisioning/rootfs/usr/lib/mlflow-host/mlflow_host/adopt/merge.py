"""Merge the prepared rows into the database in service, in one transaction; the server stays up.

The rows of the previous adoption of the same source are the base of a three-way merge (`schema.merging`): later changes
in the source are merged, and later changes on this server stay. The same transaction renames the prepared database, so
it becomes the next base if, and only if, its rows are in service.
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
    """The prepared rows. A boot drops it, as any database under construction."""
    return f"{WORK_PREFIX}adopt_{name.replace('-', '_')}"


def base_database(name: str) -> str:
    """The rows of the last adoption of that source."""
    return f"mlflow_adopted_{name.replace('-', '_')}"


@dataclass(frozen=True)
class Loaded:
    """By table: (number of rows that are new or changed in the source, that are missing here, that differ here).
    `gone`: number of rows that the source no longer has and that stay here."""

    tables: dict[str, tuple[int, int, int]]
    gone: dict[str, int]
    inserted: int
    updated: int
    first: bool


def load(cluster: Cluster, name: str, image: ImageSchema, mlflow: Release, blank: Path | None, say: Say) -> Loaded:
    """Raises AdoptionError, with the database in service unchanged."""
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
                disconnect(cluster, each)  # the session of a killed unit ends only when PostgreSQL detects it
            if base in databases(cluster):
                run(writer, rename.format(sql.Identifier(base), sql.Identifier(old)))
            run(writer, rename.format(sql.Identifier(work), sql.Identifier(base)))
    drop(cluster, old)
    return Loaded(counted, gone, sum(table.rows for table in merged), sum(table.values for table in merged), first)


@contextmanager
def base_or_empty(
    cluster: Cluster, base: str, empty: str, image: ImageSchema, mlflow: Release, blank: Path | None, say: Say
) -> Iterator[tuple[str, bool]]:
    """(the database to compare with, whether it is empty). A base of another schema is not used. Then only rows that
    are missing in the database in service are carried; rows adopted before stay as they are, even if the source has
    changed them since."""
    if base in databases(cluster):
        with connection(cluster, base) as opened:
            revision = head(opened)
        if revision == image.head:
            yield base, False
            return
        say(f"{base} is of another MLflow release: only rows that are missing here are carried")
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
    """Whether the database holds nothing but the default experiment that MLflow creates."""
    tables = ("runs", "trace_info", "logged_models", "registered_models", "experiment_tags")
    if any(value(opened, f"SELECT EXISTS (SELECT 1 FROM {table})") for table in tables):
        return False
    return set(rows(opened, "SELECT experiment_id, name FROM experiments")) <= {(0, "Default")}


def take_over_default_experiment(source: Any, writer: Any) -> None:
    """In an empty server, experiment 0 becomes the source's."""
    if not is_empty(writer):
        return
    columns = ("name", "artifact_location", "lifecycle_stage", "creation_time", "last_update_time")
    found = rows(source, f"SELECT {', '.join(columns)} FROM experiments WHERE experiment_id = 0")
    if found:
        listed = ", ".join(f"{column} = %s" for column in columns)
        run(writer, f"UPDATE experiments SET {listed} WHERE experiment_id = 0", found[0])
