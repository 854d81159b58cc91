"""The last word before a copy goes into service: references hold, the schema is at its head, MLflow answers."""

from __future__ import annotations

from typing import Any

from mlflow_host.schema.catalog import BOOKKEEPING, Catalog, head, read_catalog
from mlflow_host.schema.cluster import Cluster, connection, value
from mlflow_host.schema.copying import CarryError, orphaned
from mlflow_host.schema.release import Release
from mlflow_host.schema.shapes import quoted

MOVED = frozenset({"trace_tags", "trace_request_metadata", "trace_metrics", "span_metrics"})
"""Tables whose rows MLflow's own migrations move elsewhere or thin out (75868b020152)."""


def verify(cluster: Cluster, database: str, release: Release, expected_head: str) -> dict[str, int]:
    """What MLflow's stores answered, in numbers. Raises CarryError, or ReleaseError where MLflow cannot open it."""
    with connection(cluster, database) as opened:
        if head(opened) != expected_head:
            raise CarryError(f"the copy is at migration {head(opened)} where {expected_head} was expected")
        broken = broken_references(opened, read_catalog(opened))
    if broken:
        listed = ", ".join(f"{name} ({count})" for name, count in broken.items())
        raise CarryError(f"rows of the copy refer to rows that are not there: {listed}")
    return release.answer(database)


def broken_references(opened: Any, catalog: Catalog) -> dict[str, int]:
    """Rows by foreign key whose parent is missing; empty where all is well."""
    found = {}
    for reference in catalog.foreign_keys:
        condition = orphaned(reference, "child")
        count = value(opened, f"SELECT count(*) FROM {quoted(reference.table)} AS child WHERE {condition}")
        if count:
            found[f"{reference.table}.{reference.name}"] = int(count)
    return found


def counts(opened: Any) -> dict[str, int]:
    """Rows of every table but MLflow's bookkeeping."""
    tables = sorted(set(read_catalog(opened).tables) - {BOOKKEEPING})
    return {table: int(value(opened, f"SELECT count(*) FROM {quoted(table)}")) for table in tables}


def nothing_shrank(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Sentences about tables that the migrations left with fewer rows, for the report.

    Raises CarryError where that happened to a table whose rows MLflow is not known to move."""
    fewer = {t: (n, after.get(t, 0)) for t, n in before.items() if after.get(t, 0) < n}
    for table, (was, now) in fewer.items():
        if table not in MOVED and table in after:
            raise CarryError(f"the migrations left table {table} with {now} of {was} rows")
    return [f"MLflow's migrations left {table} with {now} of {was} rows" for table, (was, now) in fewer.items()]
