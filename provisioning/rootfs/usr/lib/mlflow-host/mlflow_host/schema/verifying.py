"""Check a copy before the flip: its migration head, its foreign keys, its row counts, and MLflow's stores."""

from __future__ import annotations

from typing import Any

from mlflow_host.postgres.catalog import BOOKKEEPING, Catalog, head, read_catalog
from mlflow_host.postgres.cluster import Cluster, connection, value
from mlflow_host.schema.column_fit import quoted
from mlflow_host.schema.copying import CarryError, parent_is_missing
from mlflow_host.schema.release import Release, StoreAnswers

MOVED = frozenset({"trace_tags", "trace_request_metadata", "trace_metrics", "span_metrics"})
"""Tables that may have fewer rows after an upgrade, because MLflow's migration 75868b020152 moves or deletes rows."""


def verify(cluster: Cluster, database: str, release: Release, expected_head: str) -> StoreAnswers:
    """Check the copy's migration and foreign keys, and query MLflow's stores. Raises CarryError or ReleaseError."""
    with connection(cluster, database) as opened:
        if head(opened) != expected_head:
            raise CarryError(f"the copy is at migration {head(opened)}; expected {expected_head}")
        broken = broken_references(opened, read_catalog(opened))
    if broken:
        listed = ", ".join(f"{name} ({count})" for name, count in broken.items())
        raise CarryError(f"rows of the copy refer to missing rows: {listed}")
    return release.query_stores(database)


def broken_references(opened: Any, catalog: Catalog) -> dict[str, int]:
    """Count the rows whose parent row is missing, by foreign key. Foreign keys with a count of 0 are omitted."""
    found = {}
    for reference in catalog.foreign_keys:
        condition = parent_is_missing(reference, "child")
        count = value(opened, f"SELECT count(*) FROM {quoted(reference.table)} AS child WHERE {condition}")
        if count:
            found[f"{reference.table}.{reference.name}"] = int(count)
    return found


def row_counts(opened: Any) -> dict[str, int]:
    """Return the number of rows of each table, except Alembic's own table."""
    tables = sorted(set(read_catalog(opened).tables) - {BOOKKEEPING})
    return {table: int(value(opened, f"SELECT count(*) FROM {quoted(table)}")) for table in tables}


def check_row_counts(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Return a sentence for the report about each table that has fewer rows after the migrations.

    Raises CarryError if a table with fewer rows still exists and is not in MOVED."""
    fewer = {t: (n, after.get(t, 0)) for t, n in before.items() if after.get(t, 0) < n}
    for table, (was, now) in fewer.items():
        if table not in MOVED and table in after:
            raise CarryError(f"after the migrations, table {table} has only {now} of its {was} rows")
    return [f"after MLflow's migrations, {table} has {now} of its {was} rows" for table, (was, now) in fewer.items()]
