"""Carry the content of one database into another of a different schema: every table and column that both know.

Indexes and constraints of the target are taken off, the rows stream through COPY from connection to connection, and
the constraints come back afterwards, which is both the fast order and the proof that they hold: PostgreSQL validates
every key, check and reference as it puts it back.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import psycopg2
from psycopg2 import errors, sql

from mlflow_host.schema.catalog import BOOKKEEPING, Catalog, Constraint, ForeignKey, read_catalog
from mlflow_host.schema.cluster import Cluster, connection, rows, run, value
from mlflow_host.schema.conversions import DERIVED, PASSING, RECOMPUTED, Conversion, conversions
from mlflow_host.schema.reporting import Carried, Left
from mlflow_host.schema.shapes import fit, quoted

WORKERS = 2
"""Tables copied side by side; the smallest machine has two cores."""


class CarryError(Exception):
    """The copy is not what it should be; one sentence."""


@dataclass(frozen=True)
class TablePlan:
    """How one table is carried: `select` on the source yields `columns` of the target, in that order."""

    table: str
    columns: tuple[str, ...]
    select: str
    added: str | None = None
    """SELECT of the rows that a conversion adds, columns as in `select`; None where there are none."""
    misfits: tuple[tuple[str, str, str], ...] = ()
    """(column, condition, remedy) for the source's rows that do not fit as they are."""
    unknown: tuple[tuple[str, str], ...] = ()
    """(column, condition) for the source's columns that the target lacks: the rows that hold something there."""
    converted: tuple[str, ...] = ()
    """Names of the conversions that take part."""

    @property
    def query(self) -> str:
        return f"{self.select} UNION ALL {self.added}" if self.added else self.select


@dataclass(frozen=True)
class Plan:
    tables: tuple[TablePlan, ...]
    lost_tables: tuple[str, ...]
    """Tables of the source that the target lacks and that hold what cannot be computed again."""
    conversions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    carried: tuple[Carried, ...]
    left: tuple[Left, ...]
    conversions: tuple[str, ...] = field(default=())


def plan(source: Catalog, target: Catalog) -> Plan:
    applied = conversions(source, target)
    tables = [
        _table_plan(table, source, target, applied)
        for table in sorted(target.tables)
        if table in source.tables and table != BOOKKEEPING
    ]
    lost = sorted(set(source.tables) - set(target.tables) - DERIVED - PASSING - {BOOKKEEPING})
    return Plan(tuple(tables), tuple(lost), tuple(conversion.name for conversion in applied))


def _table_plan(table: str, source: Catalog, target: Catalog, applied: Sequence[Conversion]) -> TablePlan:
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
    left_behind = [condition for _, condition, remedy in misfits if remedy == "left behind"]
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
    ]
    names = tuple(c.name for c in applied if table in c.rows or any(t == table for t, _ in c.columns))
    return TablePlan(table, tuple(columns), select, added, tuple(misfits), tuple(unknown), names)


def carry(cluster: Cluster, source: str, target: str, say: Callable[[str], None] = lambda message: None) -> Outcome:
    """Fill `target`, a database fresh from MLflow, with what `source` holds.

    `source` is read in one snapshot and may be in use by readers. Raises CarryError where counts or constraints do
    not come out, psycopg2.Error where PostgreSQL fails."""
    with connection(cluster, source) as reader, connection(cluster, target, autocommit=True) as writer:
        reader.set_session(isolation_level="REPEATABLE READ", readonly=True)
        snapshot = value(reader, "SELECT pg_export_snapshot()")
        catalog, wanted = read_catalog(reader), read_catalog(writer)
        planned = plan(catalog, wanted)
        say(f"copying {len(planned.tables)} tables")
        left = _left_behind(reader, planned, catalog)
        sizes = dict(
            rows(reader, "SELECT relname, pg_table_size(oid) FROM pg_class WHERE relnamespace = 'public'::regnamespace")
        )
        order = sorted(planned.tables, key=lambda table: -sizes.get(table.table, 0))
        _take_off_references(writer, wanted)
        sent = _copy_side_by_side(cluster, source, target, snapshot, order, wanted)
        say("putting constraints back")
        removed = [entry for _, entries in sent.values() for entry in entries]
        removed += _put_back_references(writer, wanted)
        _set_sequences(reader, writer, catalog, wanted)
        run(writer, "ANALYZE")
        changed = sorted(c.name for c in _worded(wanted) ^ _worded(read_catalog(writer)))
        if changed:
            raise CarryError(f"the constraints {', '.join(changed)} of the copy are not what MLflow made them")
        carried = _count(reader, writer, planned, sent, removed)
    return Outcome(carried, (*left, *removed), planned.conversions)


def _copy_side_by_side(
    cluster: Cluster, source: str, target: str, snapshot: str, order: Iterable[TablePlan], wanted: Catalog
) -> dict[str, tuple[int, list[Left]]]:
    queue, lock, failed = list(order), threading.Lock(), threading.Event()
    sent: dict[str, tuple[int, list[Left]]] = {}

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


def _copy_table(reader: Any, writer: Any, table: TablePlan, wanted: Catalog) -> tuple[int, list[Left]]:
    """Number of rows that came through, and those that a key or a check of the target then had no room for.

    Checks stay on, as PostgreSQL words them anew when they are put back; they come off only where a row fails one."""
    off = [c for c in wanted.constraints if c.table == table.table and c.kind in "puxi"]
    for constraint in off:
        _take_off(writer, constraint)
    run(writer, "SAVEPOINT empty")
    try:
        count = _copy_rows(reader, writer, table)
    except errors.CheckViolation:
        run(writer, "ROLLBACK TO SAVEPOINT empty")
        checks = [c for c in wanted.constraints if c.table == table.table and c.kind == "c"]
        for constraint in checks:
            _take_off(writer, constraint)
        off += checks
        count = _copy_rows(reader, writer, table)
    left: list[Left] = []
    for constraint in sorted(off, key=lambda c: "cpuxi".index(c.kind)):
        left += _put_back(writer, constraint)
    return count, left


def _copy_rows(reader: Any, writer: Any, table: TablePlan) -> int:
    name = sql.Identifier(table.table)
    run(writer, sql.SQL("TRUNCATE {}").format(name))
    columns = sql.SQL(", ").join(map(sql.Identifier, table.columns))
    out = f"COPY ({table.query}) TO STDOUT (FORMAT binary)"
    into = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary, FREEZE)").format(name, columns).as_string(writer)
    return stream(reader, out, writer, into)


def stream(reader: Any, out: str, writer: Any, into: str) -> int:
    """Run COPY … TO STDOUT on one connection and COPY … FROM STDIN on the other, the one feeding the other.

    Returns the number of rows written. Whichever side fails, the other is ended and the first error is raised."""
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
        with os.fdopen(receive, "rb", 1 << 18) as fountain, writer.cursor() as cursor:
            cursor.copy_expert(into, fountain, 1 << 18)
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


def _take_off_references(writer: Any, wanted: Catalog) -> None:
    for constraint in wanted.constraints:
        if constraint.kind == "f":
            _take_off(writer, constraint)


def _take_off(writer: Any, constraint: Constraint) -> None:
    if constraint.kind == "i":
        run(writer, sql.SQL("DROP INDEX {}").format(sql.Identifier(constraint.name)))
    else:
        names = map(sql.Identifier, (constraint.table, constraint.name))
        run(writer, sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}").format(*names))


def _put_back(writer: Any, constraint: Constraint) -> list[Left]:
    """Rows that the constraint has no room for are taken out of the copy and listed; they stay in the source."""
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
    count = _remove_offenders(writer, constraint)
    run(writer, statement)
    return [Left(constraint.table, None, count, "left behind", f"{constraint.name}: {constraint.definition}")]


def _remove_offenders(writer: Any, constraint: Constraint) -> int:
    """Of rows that share a unique key all but one go; of rows that fail a check all go."""
    table = sql.Identifier(constraint.table)
    if constraint.kind == "c":
        check = constraint.definition.removeprefix("CHECK ").removesuffix(" NOT VALID")
        return run(writer, sql.SQL("DELETE FROM {} WHERE NOT ({})").format(table, sql.SQL(check)))
    columns = constraint.definition.split("(", 1)[1].split(")", 1)[0]
    return run(
        writer,
        sql.SQL(
            "DELETE FROM {} WHERE ctid IN (SELECT ctid FROM (SELECT ctid, row_number() OVER (PARTITION BY {}) AS n"
            " FROM {}) AS numbered WHERE n > 1)"
        ).format(table, sql.SQL(columns), table),
    )


def _put_back_references(writer: Any, wanted: Catalog) -> list[Left]:
    """Parents before children, so that a child whose parent had to go is found when its own reference comes back."""
    definitions = {(c.table, c.name): c for c in wanted.constraints if c.kind == "f"}
    removed: list[Left] = []
    waiting = in_order(wanted)
    while waiting:
        reference = waiting.pop(0)
        constraint = definitions[reference.table, reference.name]
        names = map(sql.Identifier, (constraint.table, constraint.name))
        statement = sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} ").format(*names) + sql.SQL(constraint.definition)
        try:
            run(writer, statement)
        except errors.ForeignKeyViolation:
            count = run(writer, f"DELETE FROM {quoted(reference.table)} AS child WHERE {orphaned(reference, 'child')}")
            removed.append(
                Left(reference.table, None, count, "left behind", f"{constraint.name}: its parent is not there")
            )
            run(writer, statement)
    return removed


def in_order(catalog: Catalog) -> list[ForeignKey]:
    """References sorted so that a table's own come before those that point at it, as far as there is no circle."""
    depth = dict.fromkeys(catalog.tables, 0)
    for _ in catalog.tables:
        changed = False
        for reference in catalog.foreign_keys:
            if reference.table != reference.parent and depth[reference.table] <= depth[reference.parent] < len(depth):
                depth[reference.table] = depth[reference.parent] + 1
                changed = True
        if not changed:
            break
    return sorted(catalog.foreign_keys, key=lambda r: (depth[r.table], r.table, r.name))


def orphaned(reference: ForeignKey, child: str) -> str:
    """Condition: the row `child` refers to a parent that is not there."""
    complete = " AND ".join(f"{child}.{quoted(column)} IS NOT NULL" for column in reference.columns)
    same = " AND ".join(
        f"parent.{quoted(there)} = {child}.{quoted(here)}"
        for here, there in zip(reference.columns, reference.parent_columns, strict=True)
    )
    return f"{complete} AND NOT EXISTS (SELECT 1 FROM {quoted(reference.parent)} AS parent WHERE {same})"


def _set_sequences(reader: Any, writer: Any, source: Catalog, target: Catalog) -> None:
    """No number is given out twice, those of deleted rows included: their artifacts may still lie under the old ids."""
    for (table, column), sequence in target.sequences.items():
        name, field_name = sql.Identifier(table), sql.Identifier(column)
        highest = value(writer, sql.SQL("SELECT max({}) FROM {}").format(field_name, name)) or 0
        if (table, column) in source.sequences:
            last, called = rows(reader, f"SELECT last_value, is_called FROM {source.sequences[table, column]}")[0]
            highest = max(highest, last if called else last - 1)
        if highest > 0:
            run(writer, "SELECT setval(%s::regclass, %s)", (sequence, highest))


def _worded(catalog: Catalog) -> set[Constraint]:
    """Constraints by definition; checks by name, as their wording changes when they are put back."""
    return {replace(c, definition="") if c.kind == "c" else c for c in catalog.constraints}


def _left_behind(reader: Any, planned: Plan, source: Catalog) -> tuple[Left, ...]:
    """What the target has no place for, by table, column and number of rows."""
    left = []
    for table in planned.lost_tables:
        count = int(value(reader, f"SELECT count(*) FROM {quoted(table)}"))
        left.append(Left(table, None, count, "left behind", "this release has no such table"))
    for planned_table in planned.tables:
        table = planned_table.table
        questions = [
            (c, condition, "left behind", "this release has no such column") for c, condition in planned_table.unknown
        ]
        questions += [(c, condition, remedy, "") for c, condition, remedy in planned_table.misfits]
        if not questions:
            continue
        counts = ", ".join(f"count(*) FILTER (WHERE {condition})" for _, condition, _, _ in questions)
        found = rows(reader, f"SELECT {counts} FROM {quoted(table)}")[0]
        left += [Left(table, q[0], int(n), q[2], q[3]) for q, n in zip(questions, found, strict=True)]
    return tuple(entry for entry in left if entry.count)


def _count(
    reader: Any, writer: Any, planned: Plan, sent: dict[str, tuple[int, list[Left]]], removed: list[Left]
) -> tuple[Carried, ...]:
    """Rows of every table, counted on both sides by queries of their own. Raises CarryError where they differ."""
    carried = []
    for table in planned.tables:
        count = sent[table.table][0]
        missing = sum(entry.count for entry in removed if entry.table == table.table)
        expected = int(value(reader, f"SELECT count(*) FROM ({table.query}) AS carried"))
        found = int(value(writer, f"SELECT count(*) FROM {quoted(table.table)}"))
        if expected != count or found != count - missing:
            raise CarryError(
                f"table {table.table} has {found} rows in the copy where {expected} less {missing} were expected"
            )
        carried.append(Carried(table.table, found))
    return tuple(carried)
