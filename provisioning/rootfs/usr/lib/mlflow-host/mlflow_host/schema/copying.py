"""Carry: copy rows to an empty database, for all tables and columns that the two schemas share.

First, the indexes and constraints of the target are dropped. Then COPY streams the rows from one connection to another.
At the end, the indexes and constraints are added again. A copy in this order is the fastest. When PostgreSQL adds a
key, check or foreign key, it validates all rows.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import psycopg2
from psycopg2 import errors, sql

from mlflow_host.postgres.catalog import BOOKKEEPING, Catalog, Constraint, ForeignKey, read_catalog
from mlflow_host.postgres.cluster import Cluster, connection, rows, run, value
from mlflow_host.schema import column_fit
from mlflow_host.schema.column_fit import fit, quoted
from mlflow_host.schema.conversions import DERIVED, RECOMPUTED, TRANSIENT, Conversion, conversions
from mlflow_host.schema.reporting import CarriedTable, LeftBehind

WORKERS = 2
"""Number of tables that are copied in parallel. The smallest machine has two cores."""


class CarryError(Exception):
    """A check of the copy failed. The message is one sentence."""


@dataclass(frozen=True)
class TablePlan:
    """The plan for carrying one table. `select` runs on the source and returns the values of the target's `columns`."""

    table: str
    columns: tuple[str, ...]
    select: str
    added: str | None = None
    """A SELECT of the rows that a conversion adds, with the columns of `select`. None if no conversion adds rows."""
    misfits: tuple[tuple[str, str, str], ...] = ()
    """Column, condition and remedy of each misfit. The condition selects source rows whose values must be changed."""
    unknown: tuple[tuple[str, str], ...] = ()
    """Each source column that the target lacks, and the SQL condition for rows that have a value in the column."""
    unreadable: tuple[tuple[str, str, str], ...] = ()
    """Column, condition and reason for source rows that are not carried: the target's release cannot read the rows, or
    the target lacks a key column that distinguishes the rows."""
    converted: tuple[str, ...] = ()
    """The names of the conversions that apply to this table."""

    @property
    def query(self) -> str:
        return f"{self.select} UNION ALL {self.added}" if self.added else self.select


@dataclass(frozen=True)
class Plan:
    tables: tuple[TablePlan, ...]
    lost_tables: tuple[str, ...]
    """Tables that only the source has, except the tables in DERIVED and TRANSIENT."""
    conversions: tuple[str, ...] = ()


@dataclass(frozen=True)
class CarryResult:
    carried: tuple[CarriedTable, ...]
    left: tuple[LeftBehind, ...]
    conversions: tuple[str, ...] = field(default=())


Unreadable = Mapping[str, Sequence[str]]
"""The values, by "table.column", that a release cannot read although the column can store them."""


def plan(source: Catalog, target: Catalog, unreadable: Unreadable | None = None) -> Plan:
    applied = conversions(source, target)
    tables = [
        _table_plan(table, source, target, applied, unreadable or {})
        for table in sorted(target.tables)
        if table in source.tables and table != BOOKKEEPING
    ]
    lost = sorted(set(source.tables) - set(target.tables) - DERIVED - TRANSIENT - {BOOKKEEPING})
    return Plan(tuple(tables), tuple(lost), tuple(conversion.name for conversion in applied))


def _table_plan(
    table: str, source: Catalog, target: Catalog, applied: Sequence[Conversion], unreadable: Unreadable
) -> TablePlan:
    held, identifying = source.tables[table], target.unique[table]
    made = {c: e for conversion in applied for (t, c), e in conversion.columns.items() if t == table}
    carried_over = {c for conversion in applied for (t, c) in conversion.carries if t == table}
    more = [conversion.rows[table] for conversion in applied if table in conversion.rows]
    columns: list[str] = []
    expressions: list[str] = []
    misfits: list[tuple[str, str, str]] = []
    for column in target.stored(table):
        if column.name in made:
            columns.append(column.name)
            expressions.append(f"({made[column.name]})::{column.type}")
            continue
        source_column = held.get(column.name)
        fitted = fit(source_column, column, identifies=column.name in identifying)
        if fitted.sql is None:
            continue
        columns.append(column.name)
        expressions.append(fitted.sql)
        misfits += [(column.name, condition, remedy) for condition, remedy in fitted.misfits]
    not_read = [
        (column.name, column_fit.unreadable(column.name, values), f"this release cannot read {', '.join(values)}")
        for column in source.stored(table)
        if (values := unreadable.get(f"{table}.{column.name}"))
    ]
    # Rows that lose a key column could become duplicates. Example: models of two workspaces with the same name.
    has_key = any(constraint.kind == "p" and constraint.table == table for constraint in source.constraints)
    key = set(source.keys[table]) - set(target.tables[table]) if has_key else set()
    mixed = [
        (
            column.name,
            f"{quoted(column.name)} IS DISTINCT FROM ({column.default})",
            "the column is part of the key, and this release has no such column",
        )
        for column in source.stored(table)
        if column.name in key and column.default
    ]
    left_behind = [condition for _, condition, remedy in misfits if remedy == "left behind"]
    left_behind += [condition for _, condition, _ in (*not_read, *mixed)]
    where = f" WHERE NOT coalesce({' OR '.join(f'({c})' for c in left_behind)}, false)" if left_behind else ""
    listed = ", ".join(f"{e} AS {quoted(c)}" for c, e in zip(columns, expressions, strict=True))
    select = f"SELECT {listed} FROM {quoted(table)}{where}"
    added = None
    if more:
        casts = ", ".join(f"{quoted(c)}::{target.tables[table][c].type}" for c in columns)
        added = f"SELECT {casts} FROM ({' UNION ALL '.join(more)}) AS added"
    unknown = [
        (column.name, f"{quoted(column.name)} IS DISTINCT FROM {f'({column.default})' if column.default else 'NULL'}")
        for column in source.stored(table)
        if column.name not in target.tables[table]
        and column.name not in carried_over
        and (table, column.name) not in RECOMPUTED
        and column.name not in {name for name, _, _ in mixed}
    ]
    names = tuple(c.name for c in applied if table in c.rows or any(t == table for t, _ in c.columns))
    return TablePlan(table, tuple(columns), select, added, tuple(misfits), tuple(unknown), (*not_read, *mixed), names)


def carry(
    cluster: Cluster,
    source: str,
    target: str,
    say: Callable[[str], None] = lambda message: None,
    unreadable: Unreadable | None = None,
) -> CarryResult:
    """Copy the rows of `source` into `target`, an empty database that MLflow created. Rows with an `unreadable` value
    are not copied.

    `source` is read in one snapshot, so other sessions may change the database. Raises CarryError if row counts or
    constraints are wrong at the end. Also raises psycopg2.Error."""
    with connection(cluster, source) as reader, connection(cluster, target, autocommit=True) as writer:
        reader.set_session(isolation_level="REPEATABLE READ", readonly=True)
        snapshot = value(reader, "SELECT pg_export_snapshot()")
        catalog, wanted = read_catalog(reader), read_catalog(writer)
        planned = plan(catalog, wanted, unreadable)
        say(f"copying {len(planned.tables)} tables")
        left = _count_misfits(reader, planned, catalog)
        sizes = dict(
            rows(reader, "SELECT relname, pg_table_size(oid) FROM pg_class WHERE relnamespace = 'public'::regnamespace")
        )
        order = sorted(planned.tables, key=lambda table: -sizes.get(table.table, 0))
        drop_foreign_keys(writer, wanted)
        sent = _copy_in_parallel(cluster, source, target, snapshot, order, wanted)
        say("adding constraints")
        removed = [entry for _, entries in sent.values() for entry in entries]
        removed += add_foreign_keys(writer, wanted)
        _set_sequences(reader, writer, catalog, wanted)
        run(writer, "ANALYZE")
        changed = sorted(
            c.name for c in _comparable_constraints(wanted) ^ _comparable_constraints(read_catalog(writer))
        )
        if changed:
            raise CarryError(f"the constraints {', '.join(changed)} of the copy differ from the constraints of MLflow")
        carried = _check_counts(reader, writer, planned, sent, removed)
    return CarryResult(carried, (*left, *removed), planned.conversions)


def _copy_in_parallel(
    cluster: Cluster, source: str, target: str, snapshot: str, order: Iterable[TablePlan], wanted: Catalog
) -> dict[str, tuple[int, list[LeftBehind]]]:
    queue, lock, failed = list(order), threading.Lock(), threading.Event()
    sent: dict[str, tuple[int, list[LeftBehind]]] = {}

    def work() -> None:
        with connection(cluster, source) as reader, connection(cluster, target) as writer:
            reader.set_session(isolation_level="REPEATABLE READ", readonly=True)
            run(reader, "SET TRANSACTION SNAPSHOT %s", (snapshot,))
            run(writer, "SET synchronous_commit = off")
            while not failed.is_set():
                with lock:
                    if not queue:
                        return
                    table = queue.pop(0)
                try:
                    sent[table.table] = _copy_table(reader, writer, table, wanted)
                    writer.commit()
                except BaseException:
                    failed.set()
                    raise

    with ThreadPoolExecutor(WORKERS) as pool:
        for finished in [pool.submit(work) for _ in range(WORKERS)]:
            finished.result()
    return sent


def _copy_table(reader: Any, writer: Any, table: TablePlan, wanted: Catalog) -> tuple[int, list[LeftBehind]]:
    """Return the number of copied rows, and the rows that were deleted because they violated a key or a check.

    Check constraints are dropped only if a row violates one of them, because PostgreSQL changes the text of a check
    constraint when the constraint is added again."""
    off = [c for c in wanted.constraints if c.table == table.table and c.kind in "puxi"]
    for constraint in off:
        _drop_constraint(writer, constraint)
    run(writer, "SAVEPOINT empty")
    try:
        count = _copy_rows(reader, writer, table)
    except errors.CheckViolation:
        run(writer, "ROLLBACK TO SAVEPOINT empty")
        checks = [c for c in wanted.constraints if c.table == table.table and c.kind == "c"]
        for constraint in checks:
            _drop_constraint(writer, constraint)
        off += checks
        count = _copy_rows(reader, writer, table)
    left: list[LeftBehind] = []
    for constraint in sorted(off, key=lambda c: "cpuxi".index(c.kind)):
        left += _add_constraint(writer, constraint)
    return count, left


def _copy_rows(reader: Any, writer: Any, table: TablePlan) -> int:
    name = sql.Identifier(table.table)
    run(writer, sql.SQL("TRUNCATE {}").format(name))
    columns = sql.SQL(", ").join(map(sql.Identifier, table.columns))
    out = f"COPY ({table.query}) TO STDOUT (FORMAT binary)"
    into = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary, FREEZE)").format(name, columns).as_string(writer)
    return stream(reader, out, writer, into)


def stream(reader: Any, out: str, writer: Any, into: str) -> int:
    """Pipe COPY … TO STDOUT on `reader` into COPY … FROM STDIN on `writer`.

    Returns the number of written rows. If one COPY fails, the other COPY also ends, and the first error is raised."""
    receive, send = os.pipe()
    problem: list[BaseException] = []

    def feed() -> None:
        with os.fdopen(send, "wb", 1 << 18) as sink, reader.cursor() as cursor:
            try:
                cursor.copy_expert(out, sink, 1 << 18)
            except BrokenPipeError:
                pass
            except BaseException as error:
                problem.append(error)

    feeder = threading.Thread(target=feed, name="copy-out")
    feeder.start()
    try:
        with os.fdopen(receive, "rb", 1 << 18) as pipe, writer.cursor() as cursor:
            cursor.copy_expert(into, pipe, 1 << 18)
            count = int(cursor.rowcount)
    except psycopg2.Error:
        feeder.join()
        if problem:
            raise problem[0] from None
        raise
    feeder.join()
    if problem:
        raise problem[0]
    return count


def drop_foreign_keys(writer: Any, wanted: Catalog) -> None:
    """Drop all foreign keys of `wanted`. `add_foreign_keys` adds them again."""
    for constraint in wanted.constraints:
        if constraint.kind == "f":
            _drop_constraint(writer, constraint)


def _drop_constraint(writer: Any, constraint: Constraint) -> None:
    if constraint.kind == "i":
        run(writer, sql.SQL("DROP INDEX {}").format(sql.Identifier(constraint.name)))
    else:
        names = map(sql.Identifier, (constraint.table, constraint.name))
        run(writer, sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}").format(*names))


def _add_constraint(writer: Any, constraint: Constraint) -> list[LeftBehind]:
    """Add the constraint. Rows that violate the constraint are deleted from the copy and counted in the result. The
    rows remain in the source."""
    if constraint.kind == "i":
        statement = sql.SQL(constraint.definition.replace("%", "%%"))
    else:
        names = map(sql.Identifier, (constraint.table, constraint.name))
        statement = sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} ").format(*names) + sql.SQL(constraint.definition)
    run(writer, "SAVEPOINT before")
    try:
        run(writer, statement)
        run(writer, "RELEASE SAVEPOINT before")
        return []
    except (errors.UniqueViolation, errors.CheckViolation):
        run(writer, "ROLLBACK TO SAVEPOINT before")
    count = _delete_violations(writer, constraint)
    run(writer, statement)
    return [LeftBehind(constraint.table, None, count, "left behind", f"{constraint.name}: {constraint.definition}")]


def _delete_violations(writer: Any, constraint: Constraint) -> int:
    """Delete the rows that violate a check. For a unique constraint, keep one row for each key value. Only the content
    of the rows decides which row is kept, because a second carry (for the merge) must keep the same row."""
    table = sql.Identifier(constraint.table)
    if constraint.kind == "c":
        check = constraint.definition.removeprefix("CHECK ").removesuffix(" NOT VALID")
        return run(writer, sql.SQL("DELETE FROM {} WHERE NOT ({})").format(table, sql.SQL(check)))
    columns = constraint.definition.split("(", 1)[1].split(")", 1)[0]
    return run(
        writer,
        sql.SQL(
            "DELETE FROM {} WHERE ctid IN (SELECT ctid FROM (SELECT ctid, row_number() OVER (PARTITION BY {} "
            "ORDER BY doubled::text) AS n FROM {} AS doubled) AS numbered WHERE n > 1)"
        ).format(table, sql.SQL(columns), table),
    )


def add_foreign_keys(writer: Any, wanted: Catalog) -> list[LeftBehind]:
    """Add the foreign keys of parent tables before the foreign keys of child tables. If a violation deletes a row of a
    parent table, the foreign keys of the child tables detect the missing row later."""
    definitions = {(c.table, c.name): c for c in wanted.constraints if c.kind == "f"}
    removed: list[LeftBehind] = []
    unchecked = parents_first(wanted)
    while unchecked:
        reference = unchecked.pop(0)
        constraint = definitions[reference.table, reference.name]
        names = map(sql.Identifier, (constraint.table, constraint.name))
        statement = sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} ").format(*names) + sql.SQL(constraint.definition)
        try:
            run(writer, statement)
        except errors.ForeignKeyViolation:
            count = run(
                writer, f"DELETE FROM {quoted(reference.table)} AS child WHERE {parent_is_missing(reference, 'child')}"
            )
            removed.append(
                LeftBehind(reference.table, None, count, "left behind", f"{constraint.name}: the parent row is missing")
            )
            run(writer, statement)
    return removed


def parents_first(catalog: Catalog) -> list[ForeignKey]:
    """Sort foreign keys. A table's own foreign keys come before foreign keys of other tables that refer to the table,
    except in cycles."""
    depth = depths(catalog.tables, catalog.foreign_keys)
    return sorted(catalog.foreign_keys, key=lambda r: (depth[r.table], r.table, r.name))


def depths(tables: Iterable[str], references: Sequence[ForeignKey]) -> dict[str, int]:
    """Return a number for each table that is higher than the numbers of its parents, except in cycles."""
    depth = dict.fromkeys(tables, 0)
    for _ in depth:
        changed = False
        for reference in references:
            if reference.table != reference.parent and depth[reference.table] <= depth[reference.parent] < len(depth):
                depth[reference.table] = depth[reference.parent] + 1
                changed = True
        if not changed:
            break
    return depth


def parent_is_missing(reference: ForeignKey, child: str) -> str:
    """SQL condition for a row `child` that refers to a missing parent."""
    complete = " AND ".join(f"{child}.{quoted(column)} IS NOT NULL" for column in reference.columns)
    same = " AND ".join(
        f"parent.{quoted(there)} = {child}.{quoted(here)}"
        for here, there in zip(reference.columns, reference.parent_columns, strict=True)
    )
    return f"{complete} AND NOT EXISTS (SELECT 1 FROM {quoted(reference.parent)} AS parent WHERE {same})"


def _set_sequences(reader: Any, writer: Any, source: Catalog, target: Catalog) -> None:
    """Continue each sequence after its highest used value. IDs of deleted rows count: their artifacts may exist."""
    for (table, column), sequence in target.sequences.items():
        name, field_name = sql.Identifier(table), sql.Identifier(column)
        highest = value(writer, sql.SQL("SELECT max({}) FROM {}").format(field_name, name)) or 0
        if (table, column) in source.sequences:
            last, called = rows(reader, f"SELECT last_value, is_called FROM {source.sequences[table, column]}")[0]
            highest = max(highest, last if called else last - 1)
        if highest > 0:
            run(writer, "SELECT setval(%s::regclass, %s)", (sequence, highest))


def _comparable_constraints(catalog: Catalog) -> set[Constraint]:
    """Return the constraints to compare. PostgreSQL rewrites checks, so checks are compared only by name."""
    return {replace(c, definition="") if c.kind == "c" else c for c in catalog.constraints}


def _count_misfits(reader: Any, planned: Plan, source: Catalog) -> tuple[LeftBehind, ...]:
    """Count the rows that the target cannot hold unchanged, by table and column."""
    left = []
    for table in planned.lost_tables:
        count = int(value(reader, f"SELECT count(*) FROM {quoted(table)}"))
        left.append(LeftBehind(table, None, count, "left behind", "this release has no such table"))
    for planned_table in planned.tables:
        table = planned_table.table
        questions = [
            (c, condition, "left behind", "this release has no such column") for c, condition in planned_table.unknown
        ]
        questions += [(c, condition, remedy, "") for c, condition, remedy in planned_table.misfits]
        questions += [(c, condition, "left behind", reason) for c, condition, reason in planned_table.unreadable]
        if not questions:
            continue
        counts = ", ".join(f"count(*) FILTER (WHERE {condition})" for _, condition, _, _ in questions)
        found = rows(reader, f"SELECT {counts} FROM {quoted(table)}")[0]
        left += [LeftBehind(table, q[0], int(n), q[2], q[3]) for q, n in zip(questions, found, strict=True)]
    return tuple(entry for entry in left if entry.count)


def _check_counts(
    reader: Any, writer: Any, planned: Plan, sent: dict[str, tuple[int, list[LeftBehind]]], removed: list[LeftBehind]
) -> tuple[CarriedTable, ...]:
    """Count the rows of every table in the source and in the copy. Raises CarryError if the counts differ."""
    carried = []
    for table in planned.tables:
        count = sent[table.table][0]
        missing = sum(entry.count for entry in removed if entry.table == table.table)
        expected = int(value(reader, f"SELECT count(*) FROM ({table.query}) AS carried"))
        found = int(value(writer, f"SELECT count(*) FROM {quoted(table.table)}"))
        if expected != count or found != count - missing:
            raise CarryError(
                f"the copy of table {table.table} has {found} rows, but should have {expected} rows minus {missing}"
            )
        carried.append(CarriedTable(table.table, found))
    return tuple(carried)


def unreadable_values(cluster: Cluster, database: str, readable: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the values in `database` that are not in `readable`; the keys are "table.column"."""
    found = {}
    with connection(cluster, database) as opened:
        tables = read_catalog(opened).tables
        for place, values in readable.items():
            table, column = place.split(".")
            if column in tables.get(table, {}):
                query = (
                    f"SELECT DISTINCT {quoted(column)}::text FROM {quoted(table)} WHERE {quoted(column)} IS NOT NULL"
                )
                if others := sorted({text for (text,) in rows(opened, query)} - set(values)):
                    found[place] = others
    return found
