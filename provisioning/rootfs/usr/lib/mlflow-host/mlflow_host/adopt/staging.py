"""Load a source's rows into an empty database at the source's schema, and count values that a column cannot store.

The rows are first loaded as text, into tables of the schema `arrived`. The source may be SQLite, which does not check
lengths or types, so every value is converted to its column's type and length (`schema.column_fit`). Rows whose parent
row is missing are left out. The changed values and the rows that are left out are counted.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import IO, Any

import psycopg2
from psycopg2 import sql

from mlflow_host.contract.adoption import AdoptionError, Manifest
from mlflow_host.postgres.catalog import BOOKKEEPING, Catalog, Column
from mlflow_host.postgres.cluster import run, value
from mlflow_host.schema.column_fit import TEXTS, base_type, fit, placeholder, quoted
from mlflow_host.schema.conversions import DERIVED, TRANSIENT
from mlflow_host.schema.copying import parent_is_missing, parents_first
from mlflow_host.schema.reporting import LeftBehind

SCHEMA = "arrived"
NOT_MLFLOWS = frozenset({BOOKKEEPING, "alembic_version_auth"})

OpenRows = Callable[[str], AbstractContextManager[IO[bytes]]]
"""A function that opens the compressed file with the rows of a table, after it has checked the file's digest."""

_FITS = f"""
CREATE FUNCTION {SCHEMA}.fits(given text, type text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('SELECT %L::%s', given, type);
    RETURN true;
EXCEPTION WHEN data_exception THEN
    RETURN false;
END $$"""


def stage(opened: Any, manifest: Manifest, open_rows: OpenRows) -> None:
    """Load each file of rows into a table with text columns. Raises AdoptionError."""
    run(opened, f"CREATE SCHEMA {SCHEMA}")
    run(opened, _FITS)
    for name, table in manifest.tables.items():
        where = sql.Identifier(SCHEMA, name)
        columns = sql.SQL(", ").join(sql.SQL("{} text").format(sql.Identifier(column)) for column in table.columns)
        run(opened, sql.SQL("CREATE UNLOGGED TABLE {} ({})").format(where, columns))
        with open_rows(name) as packed, gzip.open(packed) as lines, opened.cursor() as cursor:
            listed = sql.SQL(", ").join(map(sql.Identifier, table.columns))
            try:
                cursor.copy_expert(sql.SQL("COPY {} ({}) FROM STDIN").format(where, listed).as_string(opened), lines)
            except (psycopg2.DataError, OSError) as error:
                raise AdoptionError(f"the rows of {name} cannot be read: {str(error).splitlines()[0]}") from None
            count = int(cursor.rowcount)
        if count != table.rows:
            raise AdoptionError(
                f"{count} rows of {name} were loaded, but the manifest has {table.rows}: run adopt.py again"
            )


def fill(opened: Any, catalog: Catalog, manifest: Manifest) -> list[LeftBehind]:
    """Copy the staged rows into the tables of the schema `public`. Returns the values that were changed and the rows
    that were left out. Raises AdoptionError.

    The caller drops the foreign keys before this call, and adds them after its last call of `remove_orphans`."""
    left: list[LeftBehind] = []
    known = [table for table in sorted(catalog.tables) if table != BOOKKEEPING]
    run(opened, f"TRUNCATE {', '.join(map(quoted, known))}")  # because some migrations insert rows
    for table in known:
        if table not in manifest.tables or table in DERIVED | TRANSIENT:
            continue
        held = manifest.tables[table].columns
        run(opened, "SAVEPOINT before")
        try:
            left += _fill_table(opened, catalog, table, held, check=False)
        except psycopg2.DataError:
            run(opened, "ROLLBACK TO SAVEPOINT before")
            left += _fill_table(opened, catalog, table, held, check=True)
        except psycopg2.IntegrityError as error:
            raise AdoptionError(
                f"the rows of {table} violate a constraint of MLflow's schema: {' '.join(str(error).split())[:300]}"
            ) from None
        left += _unknown_columns(opened, table, [c for c in held if c not in catalog.tables[table]])
    for table in sorted(manifest.tables.keys() - catalog.tables.keys() - NOT_MLFLOWS):
        if manifest.tables[table].rows:
            left.append(LeftBehind(table, None, manifest.tables[table].rows, "left behind", "MLflow has no such table"))
    return [*left, *remove_orphans(opened, catalog)]


def _fill_table(opened: Any, catalog: Catalog, table: str, held: Iterable[str], *, check: bool) -> list[LeftBehind]:
    """Copy the staged rows of one table. With `check`, test each value in the columns that are not text, because
    PostgreSQL has failed to convert one of these values to its column's type."""
    columns, expressions = [], []
    misfits: list[tuple[str, str, str, str]] = []
    for column in catalog.stored(table):
        identifies = column.name in catalog.unique[table]
        source = Column(column.name, "text", False, None, False) if column.name in held else None
        if source is None and column.name == "workspace" and not column.default:
            continue
        fitted = fit(source, column, identifies=identifies)
        if fitted.sql is None:
            continue
        expression, found = fitted.sql, [(*each, "") for each in fitted.misfits]
        if check and source and base_type(column.type) not in TEXTS:
            name = quoted(column.name)
            bad = f"({name} IS NOT NULL AND NOT {SCHEMA}.fits({name}, '{column.type}'))"
            instead = f"{placeholder(column.type)}::{column.type}" if column.required else "NULL"
            expression = f"CASE WHEN {bad} THEN {instead} ELSE {expression} END"
            remedy = "left behind" if identifies else "filled" if column.required else "emptied"
            found.append((bad, remedy, f"the value is not of type {column.type}"))
        columns.append(quoted(column.name))
        expressions.append(expression)
        misfits += [(column.name, *each) for each in found]
    staged = f"{SCHEMA}.{quoted(table)}"
    out = [condition for _, condition, remedy, _ in misfits if remedy == "left behind"]
    where = f" WHERE NOT coalesce({' OR '.join(f'({c})' for c in out)}, false)" if out else ""
    run(
        opened,
        f"INSERT INTO {quoted(table)} ({', '.join(columns)}) SELECT {', '.join(expressions)} FROM {staged}{where}",
    )
    if not misfits:
        return []
    counts = ", ".join(f"count(*) FILTER (WHERE {condition})" for _, condition, _, _ in misfits)
    with opened.cursor() as cursor:
        cursor.execute(f"SELECT {counts} FROM {staged}")
        counted = cursor.fetchone()
    found_here = zip(misfits, counted, strict=True)
    return [LeftBehind(table, m[0], int(n), m[2], m[3] or _too_long(m[1])) for m, n in found_here if n]


def _too_long(condition: str) -> str:
    return f"longer than {condition.rpartition('>')[2].strip()} characters" if "char_length" in condition else ""


def _unknown_columns(opened: Any, table: str, columns: list[str]) -> list[LeftBehind]:
    left = []
    for column in columns:
        count = value(opened, f"SELECT count({quoted(column)}) FROM {SCHEMA}.{quoted(table)}")
        if count:
            left.append(LeftBehind(table, column, int(count), "left behind", "MLflow has no such column"))
    return left


def remove_orphans(opened: Any, catalog: Catalog, reason: str = "the parent row is missing") -> list[LeftBehind]:
    """Delete rows that refer to a missing row, and repeat the deletion until no row refers to a missing row. Returns
    the numbers of deleted rows."""
    counts: dict[tuple[str, str], int] = {}
    taken = True
    while taken:
        taken = False
        for reference in parents_first(catalog):
            missing = parent_is_missing(reference, "child")
            table = quoted(reference.table)
            if reference.on_delete == "n":
                cleared = ", ".join(f"{quoted(column)} = NULL" for column in reference.columns)
                run(opened, f"UPDATE {table} AS child SET {cleared} WHERE {missing}")
                continue
            count = run(opened, f"DELETE FROM {table} AS child WHERE {missing}")
            if count:
                taken = True
                key = (reference.table, f"{reason}: {', '.join(reference.columns)} → {reference.parent}")
                counts[key] = counts.get(key, 0) + count
    return [LeftBehind(table, None, count, "left behind", why) for (table, why), count in counts.items()]
