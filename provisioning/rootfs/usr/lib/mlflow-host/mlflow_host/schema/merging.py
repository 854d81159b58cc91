"""Forward again: what the older release could not hold comes back from the kept database, under what was written since.

Three databases at one schema take part, as in a merge of three versions of a text:

    kept    the newer database as it was when it was replaced
    base    what of it the older release was given, brought forward again by the same migrations
    work    what the older release made of that, brought forward

Where kept and base agree the older release had it all, and `work` stands, deletions included. Where they differ
something did not fit: a row that base lacks is put back if what it belongs to is still there; a value that differs is
put back unless it was changed since. So nothing here knows any particular release or column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from psycopg2 import sql

from mlflow_host.schema.catalog import BOOKKEEPING, Catalog, Column, ForeignKey, read_catalog
from mlflow_host.schema.cluster import Cluster, connection, rows, run, value
from mlflow_host.schema.conversions import DERIVED, PASSING
from mlflow_host.schema.copying import orphaned, stream
from mlflow_host.schema.reporting import Returned
from mlflow_host.schema.shapes import quoted

BUCKETS = 4096
"""Rows are compared by sums over this many groups of keys, and only groups that differ are looked at row by row."""


@dataclass(frozen=True)
class Table:
    name: str
    columns: tuple[Column, ...]
    keys: tuple[str, ...]

    @property
    def others(self) -> tuple[Column, ...]:
        return tuple(column for column in self.columns if column.name not in self.keys)

    def listed(self, alias: str = "") -> str:
        return ", ".join(f"{alias}{quoted(column.name)}" for column in self.columns)

    def same_key(self, left: str, right: str) -> str:
        return " AND ".join(f"{left}.{quoted(key)} = {right}.{quoted(key)}" for key in self.keys)

    @property
    def bucket(self) -> str:
        return f"(hashtextextended(ROW({', '.join(map(quoted, self.keys))})::text, 0) & {BUCKETS - 1})"


def merge(cluster: Cluster, kept: str, base: str, work: str) -> tuple[Returned, ...]:
    """Put back into `work` what `kept` holds and `base` does not, in one transaction. All three are at one schema."""
    with (
        connection(cluster, kept) as from_kept,
        connection(cluster, base) as from_base,
        connection(cluster, work) as writer,
    ):
        from_kept.set_session(isolation_level="REPEATABLE READ", readonly=True)
        catalog, source = read_catalog(writer), read_catalog(from_kept)
        run(writer, "SET LOCAL session_replication_role = replica")
        differing = []
        for table in _tables(source, catalog):
            buckets = _differing_buckets(from_kept, from_base, table)
            if buckets:
                _load(from_kept, writer, table, buckets, _aside(table, "kept"))
                _load(from_base, writer, table, buckets, _aside(table, "base"))
                differing.append(table)
        offered = {table.name: _insert(writer, table) for table in differing}
        _remove_orphans(writer, catalog, differing)
        returned = []
        for table in differing:
            present = int(value(writer, f"SELECT count(*) FROM {_aside(table, 'back')}"))
            values = _update(writer, table, catalog)
            if offered[table.name] or values:
                returned.append(Returned(table.name, present, values, offered[table.name] - present))
        _raise_sequences(from_kept, writer, source, catalog)
    return tuple(returned)


def _tables(source: Catalog, target: Catalog) -> list[Table]:
    names = set(source.tables) & set(target.tables) - DERIVED - PASSING - {BOOKKEEPING}
    found = []
    for name in sorted(names):
        shared = [column for column in target.stored(name) if column.name in source.tables[name]]
        found.append(Table(name, tuple(shared), target.keys[name]))
    return found


def _differing_buckets(from_kept: Any, from_base: Any, table: Table) -> list[int]:
    """Groups of keys whose rows are not the same in both; groups that only `base` has do not count."""
    query = (
        f"SELECT {table.bucket}, count(*), sum(hashtextextended(ROW({table.listed()})::text, 1)::numeric) "
        f"FROM {quoted(table.name)} GROUP BY 1"
    )
    there = {bucket: sums for bucket, *sums in rows(from_base, query)}
    return [bucket for bucket, *sums in rows(from_kept, query) if there.get(bucket) != sums]


def _aside(table: Table, what: str) -> str:
    return quoted(f"{table.name[:50]}_{what}")


def _load(reader: Any, writer: Any, table: Table, buckets: list[int], into: str) -> None:
    into = f"pg_temp.{into}"
    run(writer, f"CREATE TEMPORARY TABLE {into} AS SELECT {table.listed()} FROM public.{quoted(table.name)} LIMIT 0")
    chosen = f"SELECT {table.listed()} FROM public.{quoted(table.name)} WHERE {table.bucket} = ANY (%s)"
    with reader.cursor() as cursor:
        query = cursor.mogrify(chosen, (buckets,)).decode()
    stream(reader, f"COPY ({query}) TO STDOUT (FORMAT binary)", writer, f"COPY {into} FROM STDIN (FORMAT binary)")
    run(writer, f"ANALYZE {into}")


def _insert(writer: Any, table: Table) -> int:
    """Put back the rows that the older release was never given. Returns how many there were; those that found their
    place are listed by key in the table "…_back"."""
    kept, base, back = (_aside(table, what) for what in ("kept", "base", "back"))
    keys = ", ".join(map(quoted, table.keys))
    run(writer, f"CREATE TEMPORARY TABLE {back} AS SELECT {keys} FROM {quoted(table.name)} LIMIT 0")
    never_given = (
        f"FROM {kept} AS kept WHERE NOT EXISTS (SELECT 1 FROM {base} AS base WHERE {table.same_key('base', 'kept')})"
    )
    run(
        writer,
        f"WITH put AS (INSERT INTO {quoted(table.name)} ({table.listed()}) OVERRIDING SYSTEM VALUE "
        f"SELECT {table.listed('kept.')} {never_given} ON CONFLICT DO NOTHING RETURNING {keys}) "
        f"INSERT INTO {back} SELECT {keys} FROM put",
    )
    return int(value(writer, f"SELECT count(*) {never_given}"))


def _remove_orphans(writer: Any, catalog: Catalog, differing: list[Table]) -> None:
    """Take out again what belongs to something that was deleted since; a reference that MLflow clears on deletion is
    cleared instead. In rounds, as what is taken out may itself have been referred to."""
    tables = {table.name: table for table in differing}
    references = [reference for reference in catalog.foreign_keys if reference.table in tables]
    taken = True
    while taken:
        taken = False
        for reference in references:
            table = tables[reference.table]
            back, name = _aside(table, "back"), quoted(table.name)
            where = f"{table.same_key('back', 'child')} AND {orphaned(reference, 'child')}"
            if reference.on_delete == "n" and not set(reference.columns) & set(table.keys):
                cleared = ", ".join(f"{quoted(column)} = NULL" for column in reference.columns)
                run(writer, f"UPDATE {name} AS child SET {cleared} FROM {back} AS back WHERE {where}")
            elif run(writer, f"DELETE FROM {name} AS child USING {back} AS back WHERE {where}"):
                taken = True
                absent = f"NOT EXISTS (SELECT 1 FROM {name} AS child WHERE {table.same_key('child', 'back')})"
                run(writer, f"DELETE FROM {back} AS back WHERE {absent}")


def _update(writer: Any, table: Table, catalog: Catalog) -> int:
    """Put back values that the older release could not hold and nobody changed since. Returns the number of rows."""
    if not table.others:
        return 0
    name, kept, base = quoted(table.name), _aside(table, "kept"), _aside(table, "base")
    references = [reference for reference in catalog.foreign_keys if reference.table == table.name]
    conditions = {column.name: _comes_back(column, references) for column in table.others}
    values = ", ".join(
        f"{quoted(column)} = CASE WHEN {condition} THEN kept.{quoted(column)} ELSE work.{quoted(column)} END"
        for column, condition in conditions.items()
    )
    return run(
        writer,
        f"UPDATE {name} AS work SET {values} FROM {kept} AS kept "
        f"JOIN {base} AS base ON {table.same_key('base', 'kept')} "
        f"WHERE {table.same_key('work', 'kept')} AND ({' OR '.join(f'({c})' for c in conditions.values())})",
    )


def _comes_back(column: Column, references: list[ForeignKey]) -> str:
    """Condition: the value was lost on the way back and is as the older release was given it."""
    differs = f"{_comparable('kept', column)} IS DISTINCT FROM {_comparable('base', column)}"
    untouched = f"{_comparable('work', column)} IS NOT DISTINCT FROM {_comparable('base', column)}"
    parents = [f"NOT ({orphaned(r, 'kept')})" for r in references if column.name in r.columns]
    return " AND ".join((differs, untouched, *parents))


def _comparable(alias: str, column: Column) -> str:
    name = f"{alias}.{quoted(column.name)}"
    return f"{name}::text" if column.type in ("json", "xml", "point") else name


def _raise_sequences(from_kept: Any, writer: Any, source: Catalog, target: Catalog) -> None:
    """No number that the newer release gave out is given out again."""
    for (table, column), sequence in target.sequences.items():
        statement = sql.SQL("SELECT max({}) FROM {}").format(sql.Identifier(column), sql.Identifier(table))
        numbers = [value(writer, statement) or 0, _last(writer, sequence)]
        if (table, column) in source.sequences:
            numbers.append(_last(from_kept, source.sequences[table, column]))
        if max(numbers) > 0:
            run(writer, "SELECT setval(%s::regclass, %s)", (sequence, max(numbers)))


def _last(opened: Any, sequence: str) -> int:
    last, called = rows(opened, f"SELECT last_value, is_called FROM {sequence}")[0]
    return int(last if called else last - 1)
