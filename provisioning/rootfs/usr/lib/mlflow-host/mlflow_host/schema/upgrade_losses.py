"""Record the data that an upgrade's migrations drop or change, so that a later rollback can restore this data.

For example, migration 75868b020152 cuts session IDs to 250 characters. The records are in the upgraded database, in a
PostgreSQL schema that is named after the migration head before the upgrade. For each MLflow table that lost data, this
schema has two tables: "…_kept" has the original rows, and "…_base" has the rows that a carry back without the records
would create. A carry back to the old head, or to an earlier head, merges the two tables into the new database. The
merge does not restore rows that users have deleted or changed. A carry back to a later head only copies the records.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from psycopg2 import sql

from mlflow_host.postgres.catalog import BOOKKEEPING, Catalog, Column, read_catalog
from mlflow_host.postgres.cluster import Cluster, connection, rows, run, value
from mlflow_host.schema.column_fit import convert, quoted
from mlflow_host.schema.conversions import DERIVED, TRANSIENT
from mlflow_host.schema.copying import TablePlan, plan, stream
from mlflow_host.schema.merging import Table, comparable, merge_loaded, temporary
from mlflow_host.schema.reporting import LeftBehind, MergedTable

_SCHEMA = re.compile(r"mlflow_host_before_(?P<count>\d{4})_(?P<head>\w+)")
AT_ONCE = 2
"""Tables that are compared at the same time, each in its own connection."""
_REASON = "by MLflow's migrations; restored if an MLflow release without these migrations is pinned"


def record(cluster: Cluster, before: str, after: str, head: str, count: int) -> tuple[LeftBehind, ...]:
    """Compare the database `before` with its migrated copy `after`, and record the lost data in `after`. `before` is at
    migration `head`, which has the number `count`. The function reads only tables and columns that the migrations
    narrowed, moved or removed. Most upgrades change none of these."""
    schema = sql.Identifier(f"mlflow_host_before_{count:04}_{head}")
    with connection(cluster, before) as reader, connection(cluster, after, autocommit=True) as writer:
        old, new = read_catalog(reader), read_catalog(writer)
        plans = {table.table: table for table in plan(new, old).tables}
        run(writer, sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(schema))
        tables = []
        for name in sorted(set(old.tables) - DERIVED - TRANSIENT - {BOOKKEEPING}):
            if columns := _affected(reader, writer, name, old, new, plans.get(name)):
                tables.append(Table(name, tuple(columns), old.keys[name]))
        if not tables:
            return ()
        run(writer, sql.SQL("CREATE SCHEMA {} AUTHORIZATION {}").format(schema, sql.Identifier(cluster.owner)))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            each = [pool.submit(_record, cluster, before, after, schema, t, plans.get(t.name)) for t in tables]
        found = tuple(lost for done in each for lost in done.result())
        if not found:
            run(writer, sql.SQL("DROP SCHEMA {}").format(schema))
    return found


def _record(
    cluster: Cluster, before: str, after: str, schema: sql.Identifier, table: Table, planned: TablePlan | None
) -> list[LeftBehind]:
    """Record the lost data of one table in `schema`."""
    with connection(cluster, before) as reader, connection(cluster, after) as writer:
        _load(reader, writer, table, planned)
        lost = _differences(writer, table)
        for what in ("kept", "base") if lost else ():
            place = sql.SQL("{}.{}").format(schema, sql.SQL(temporary(table, what)))
            run(writer, sql.SQL("CREATE TABLE {} AS TABLE {}").format(place, sql.SQL(temporary(table, what))))
            run(writer, sql.SQL("ALTER TABLE {} OWNER TO {}").format(place, sql.Identifier(cluster.owner)))
    return lost


def _affected(
    reader: Any, writer: Any, name: str, old: Catalog, new: Catalog, planned: TablePlan | None
) -> list[Column]:
    """Return the columns to compare: all columns if the table was removed, lost rows, or is rebuilt by a conversion.
    For any other table, return its key and the removed or narrowed columns (an empty list if it has no such
    columns)."""
    stored = old.stored(name)
    if name not in new.tables or planned is None or planned.added:
        return stored
    count = f"SELECT count(*) FROM {quoted(name)}"
    if int(value(writer, count)) < int(value(reader, count)):
        return stored
    changed = [column for column in stored if _is_narrower(column, new.tables[name].get(column.name))]
    keys = [column for column in stored if column.name in old.keys[name] and column not in changed]
    return [*keys, *changed] if changed else []


def _is_narrower(was: Column, now: Column | None) -> bool:
    if now is None:
        return True
    return convert(quoted(was.name), was.type, now.type)[1] is not None or (now.required and not was.required)


def _load(reader: Any, writer: Any, table: Table, planned: TablePlan | None) -> None:
    """Create two temporary tables in the migrated database: "…_kept" with the old rows, and "…_base" with the rows that
    a carry back would create. If `planned` is None, "…_base" is empty."""
    kept, base = temporary(table, "kept"), temporary(table, "base")
    columns = ", ".join(f"{quoted(column.name)} {column.type}" for column in table.columns)
    for each in (kept, base):
        run(writer, f"CREATE TEMPORARY TABLE {each} ({columns})")
    out = f"COPY (SELECT {table.listed()} FROM {quoted(table.name)}) TO STDOUT (FORMAT binary)"
    stream(reader, out, writer, f"COPY pg_temp.{kept} FROM STDIN (FORMAT binary)")
    if planned:
        rebuilt = ", ".join(
            quoted(column.name) if column.name in planned.columns else f"NULL::{column.type}"
            for column in table.columns
        )
        run(writer, f"INSERT INTO {base} SELECT {rebuilt} FROM ({planned.query}) AS rebuilt")
    for each in (kept, base):
        run(writer, f"ANALYZE {each}")


def _differences(writer: Any, table: Table) -> list[LeftBehind]:
    """Delete the rows that are equal in both temporary tables, and count the other rows by column."""
    kept, base = temporary(table, "kept"), temporary(table, "base")
    joined = f"{kept} AS kept JOIN {base} AS base ON {table.same_key('kept', 'base')}"
    other = {column.name: _is_other(column) for column in table.others}
    equal = " AND ".join(f"NOT ({condition})" for condition in other.values()) or "true"
    run(writer, f"DELETE FROM {kept} AS kept USING {base} AS base WHERE {table.same_key('kept', 'base')} AND {equal}")
    there = f"SELECT 1 FROM {kept} AS kept WHERE {table.same_key('kept', 'base')}"
    run(writer, f"DELETE FROM {base} AS base WHERE NOT EXISTS ({there})")
    found = []
    dropped = int(value(writer, f"SELECT (SELECT count(*) FROM {kept}) - (SELECT count(*) FROM {base})"))
    if dropped:
        found.append(LeftBehind(table.name, None, dropped, "dropped", _REASON))
    for column, condition in other.items():
        if changed := int(value(writer, f"SELECT count(*) FROM {joined} WHERE {condition}")):
            found.append(LeftBehind(table.name, column, changed, "changed", _REASON))
    return found


def _is_other(column: Column) -> str:
    """Return an SQL condition that is true if the two values of a column differ. JSON is compared as jsonb, which
    ignores the order of keys. JSON with \\u escapes is compared as text, because jsonb may reject \\u. JSON null
    (written by MLflow) equals SQL NULL (written by a conversion)."""
    kept, base = comparable("kept", column), comparable("base", column)
    if column.type != "json":
        return f"{kept} IS DISTINCT FROM {base}"
    kept, base = f"nullif({kept}, 'null')", f"nullif({base}, 'null')"
    escaped = f"position('\\u' IN concat({kept}, {base})) > 0"
    return (
        f"CASE WHEN {escaped} THEN {kept} IS DISTINCT FROM {base} "
        f"ELSE ({kept})::jsonb IS DISTINCT FROM ({base})::jsonb END"
    )


def put_back(
    cluster: Cluster, source: str, target: str, head: str, known: Collection[str]
) -> dict[str, tuple[MergedTable, ...]]:
    """`target` is a copy of `source` at migration `head`. Restore in `target` the data that earlier upgrades of
    `source` lost. `known` contains the migrations up to `head`. If an upgrade started from a migration before `head`,
    its records are only copied to `target`, for a later rollback. Returns the merged tables, by the name of the
    PostgreSQL schema."""
    with connection(cluster, source) as reader:
        schemas = _schemas(reader)
    returned = {}
    for schema in schemas:  # the latest upgrade is first
        named = _SCHEMA.fullmatch(schema)
        if named is None:
            continue
        with connection(cluster, source) as reader, connection(cluster, target) as writer:
            reader.set_session(isolation_level="REPEATABLE READ", readonly=True)
            if named["head"] in known and named["head"] != head:
                _copy(cluster, reader, writer, schema)
            elif found := _merge(reader, writer, schema):
                returned[schema] = found
    return returned


def copy(cluster: Cluster, source: str, target: str) -> None:
    """Copy the records of the kept database `source` to `target`, into which `source` was merged. `target` was upgraded
    from an older database, which does not have these records."""
    with connection(cluster, source) as reader, connection(cluster, target) as writer:
        existing = _schemas(writer)
        for schema in _schemas(reader):
            if schema not in existing:
                _copy(cluster, reader, writer, schema)


def _schemas(opened: Any) -> list[str]:
    """Return the PostgreSQL schemas with records; the schema of the latest upgrade is first."""
    query = "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'mlflow\\_host\\_before\\_%' ORDER BY 1 DESC"
    return [name for (name,) in rows(opened, query)]


def _merge(reader: Any, writer: Any, schema: str) -> tuple[MergedTable, ...]:
    catalog = read_catalog(writer)
    loaded = []
    for name, columns in _tables(reader, schema).items():
        if not name.endswith("_kept"):
            continue
        target = catalog.tables.get(name.removesuffix("_kept"), {})
        fitting = [c for c in target.values() if c.name in columns and convert("c", columns[c.name], c.type)[1] is None]
        table = Table(name.removesuffix("_kept"), tuple(fitting), catalog.keys.get(name.removesuffix("_kept"), ()))
        if not table.keys or not set(table.keys) <= {column.name for column in fitting}:
            continue
        for what in ("kept", "base"):
            typed = ", ".join(f"{quoted(column.name)} {column.type}" for column in fitting)
            casts = ", ".join(f"{convert(quoted(c.name), columns[c.name], c.type)[0]}" for c in fitting)
            run(writer, f"CREATE TEMPORARY TABLE {temporary(table, what)} ({typed})")
            out = f"COPY (SELECT {casts} FROM {quoted(schema)}.{temporary(table, what)}) TO STDOUT (FORMAT binary)"
            stream(reader, out, writer, f"COPY pg_temp.{temporary(table, what)} FROM STDIN (FORMAT binary)")
        names = {column.name for column in fitting}
        if any(c.required and c.default is None and c.name not in names for c in catalog.stored(table.name)):
            # The records lack a required column, so rows cannot be inserted. Only values are restored.
            kept, base = temporary(table, "kept"), temporary(table, "base")
            there = f"SELECT 1 FROM {base} AS base WHERE {table.same_key('base', 'kept')}"
            run(writer, f"DELETE FROM {kept} AS kept WHERE NOT EXISTS ({there})")
        loaded.append(table)
    return merge_loaded(reader, writer, catalog, loaded)


def _copy(cluster: Cluster, reader: Any, writer: Any, schema: str) -> None:
    owner = sql.Identifier(cluster.owner)
    run(writer, sql.SQL("CREATE SCHEMA {} AUTHORIZATION {}").format(sql.Identifier(schema), owner))
    for name, columns in _tables(reader, schema).items():
        place = f"{quoted(schema)}.{quoted(name)}"
        run(writer, f"CREATE TABLE {place} ({', '.join(f'{quoted(c)} {type_}' for c, type_ in columns.items())})")
        run(writer, sql.SQL("ALTER TABLE {} OWNER TO {}").format(sql.SQL(place), owner))
        stream(reader, f"COPY {place} TO STDOUT (FORMAT binary)", writer, f"COPY {place} FROM STDIN (FORMAT binary)")


def _tables(reader: Any, schema: str) -> dict[str, dict[str, str]]:
    """Return the tables of a PostgreSQL schema, each with its columns and their types."""
    query = (
        "SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod) FROM pg_class c JOIN pg_attribute a "
        "ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped "
        "WHERE c.relnamespace = %s::regnamespace AND c.relkind = 'r' ORDER BY c.relname, a.attnum"
    )
    found: dict[str, dict[str, str]] = {}
    for table, column, type_ in rows(reader, query, (quoted(schema),)):
        found.setdefault(table, {})[column] = type_
    return found
