"""Check a copy before the flip: its migration head, its foreign keys, its row counts, and MLflow's stores."""

from __future__ import annotations

from typing import Any

from mlflow_host.postgres.catalog import BOOKKEEPING, Catalog, head, read_catalog
from mlflow_host.postgres.cluster import Cluster, connection, value
from mlflow_host.schema.column_fit import quoted
from mlflow_host.schema.copying import CarryError, parent_is_missing
from mlflow_host.schema.release import Release, StoreAnswers

MOVED = frozenset({"trace_tags", "trace_request_metadata", "trace_metrics", "span_metrics"})
"""Tables whose rows MLflow's migration 75868b020152 moves to other tables or deletes."""


def verify(cluster: Cluster, database: str, release: Release, expected_head: str) -> StoreAnswers:
    """What MLflow's stores return, and what they cannot read. Raises CarryError, or ReleaseError from MLflow."""
    with connection(cluster, database) as opened:
        if head(opened) != expected_head:
            raise CarryError(f"the copy is at migration {head(opened)}; expected {expected_head}")
        broken = broken_references(opened, read_catalog(opened))
    if broken:
        listed = ", ".join(f"{name} ({count})" for name, count in broken.items())
        raise CarryError(f"rows of the copy refer to missing rows: {listed}")
    return release.query_stores(database)


def broken_references(opened: Any, catalog: Catalog) -> dict[str, int]:
    """Number of rows with a missing parent by foreign key; empty when there are none."""
    found = {}
    for reference in catalog.foreign_keys:
        condition = parent_is_missing(reference, "child")
        count = value(opened, f"SELECT count(*) FROM {quoted(reference.table)} AS child WHERE {condition}")
        if count:
            found[f"{reference.table}.{reference.name}"] = int(count)
    return found


def row_counts(opened: Any) -> dict[str, int]:
    """Number of rows of every table except Alembic's."""
    tables = sorted(set(read_catalog(opened).tables) - {BOOKKEEPING})
    return {table: int(value(opened, f"SELECT count(*) FROM {quoted(table)}")) for table in tables}


def check_row_counts(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Sentences for the report about tables that have fewer rows after the migrations.

    Raises CarryError unless such a table is in MOVED."""
    fewer = {t: (n, after.get(t, 0)) for t, n in before.items() if after.get(t, 0) < n}
    for table, (was, now) in fewer.items():
        if table not in MOVED and table in after:
            raise CarryError(f"the migrations left table {table} with {now} of {was} rows")
    return [f"MLflow's migrations left {table} with {now} of {was} rows" for table, (was, now) in fewer.items()]
