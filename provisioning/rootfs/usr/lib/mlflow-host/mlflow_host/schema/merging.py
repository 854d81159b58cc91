"""Merge: after a rollback and an upgrade, restore the data from the kept database that the older schema could not hold.

It is a three-way merge of three databases at one schema:

    kept    the newer database as it was when it was replaced
    base    the part of it that was carried to the older release, migrated forward again
    work    the older release's database with its later changes, migrated forward

If kept and base are equal, the older release held everything, so `work` stays as it is, deletions included. If they
differ, some data did not fit: a row missing in base is inserted if its parents still exist, and a value that differs is
restored unless it was changed since. No release, table or column is named in the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from psycopg2 import sql

from mlflow_host.postgres.catalog import BOOKKEEPING, Catalog, Column, ForeignKey, read_catalog
from mlflow_host.postgres.cluster import Cluster, connection, rows, run, value
from mlflow_host.schema.column_fit import quoted
from mlflow_host.schema.conversions import DERIVED, SOFT_REFERENCES, TRANSIENT, SoftReference
from mlflow_host.schema.copying import parent_is_missing, stream
from mlflow_host.schema.reporting import MergedTable

NAMED_AT_MOST = 10
"""Rows of each table that are named in the report."""

BUCKETS = 4096
"""Tables are compared by checksums of this many groups of rows; only groups that differ are compared row by row."""


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


def merge(cluster: Cluster, kept: str, base: str, work: str) -> tuple[MergedTable, ...]:
    """Insert into `work`, in one transaction, the data that `kept` has and `base` lacks. All three have one schema."""
    with (
        connection(cluster, kept) as from_kept,
        connection(cluster, base) as from_base,
        connection(cluster, work) as writer,
    ):
        from_kept.set_session(isolation_level="REPEATABLE READ", readonly=True)
        return merge_rows(from_kept, from_base, writer)


def merge_rows(from_kept: Any, from_base: Any, writer: Any) -> tuple[MergedTable, ...]:
    """`merge` in open transactions; the caller commits. `compare_rows` can then count the rows that are in place."""
    catalog, source = read_catalog(writer), read_catalog(from_kept)
    differing = []
    for table in _tables(source, catalog):
        buckets = _differing_buckets(from_kept, from_base, table)
        if buckets:
            _load(from_kept, writer, table, buckets, temporary(table, "kept"))
            _load(from_base, writer, table, buckets, temporary(table, "base"))
            differing.append(table)
    returned = merge_loaded(from_kept, writer, catalog, differing)
    _raise_sequences(from_kept, writer, source, catalog)
    return returned


def merge_loaded(from_kept: Any, writer: Any, catalog: Catalog, differing: list[Table]) -> tuple[MergedTable, ...]:
    """Merge the rows in the temporary tables "…_kept" and "…_base" of each table; the caller commits."""
    run(writer, "SET LOCAL session_replication_role = replica")
    offered = {table.name: _insert(writer, table) for table in differing}
    refused = {table.name: _refused(writer, table) for table in differing}
    _remove_orphans(from_kept, writer, catalog, differing)
    values = {table.name: _update(writer, table, catalog) for table in differing}
    if any(count for count, _ in refused.values()):  # a row may have had their key until its own values were restored
        for table in differing:
            _insert(writer, table)
        refused = {table.name: _refused(writer, table) for table in differing}
        _remove_orphans(from_kept, writer, catalog, differing)
    returned = []
    for table in differing:
        present = int(value(writer, f"SELECT count(*) FROM {temporary(table, 'back')}"))
        given, restored, (count, keys) = offered[table.name], values[table.name], refused[table.name]
        if given or restored:
            returned.append(MergedTable(table.name, present, restored, given - present - count, count, keys))
    return tuple(returned)


def compare_rows(from_kept: Any, writer: Any) -> dict[str, tuple[int, int, int]]:
    """By table: (number of rows of `kept` that differ from `base`, of those missing in `work`, of those that differ in
    `work`). Call it after `merge_rows`, in the same transaction."""
    found = {}
    for table in _tables(read_catalog(from_kept), read_catalog(writer)):
        kept = temporary(table, "kept")
        if value(writer, "SELECT to_regclass(%s) IS NULL", (f"pg_temp.{kept}",)):
            continue
        same = " AND ".join(
            f"{comparable('kept', column)} IS NOT DISTINCT FROM {comparable('work', column)}" for column in table.others
        )
        key = table.keys[0]
        counted = rows(
            writer,
            f"SELECT count(*), count(*) FILTER (WHERE work.{quoted(key)} IS NULL), "
            f"count(*) FILTER (WHERE work.{quoted(key)} IS NOT NULL AND NOT ({same or 'true'})) "
            f"FROM {kept} AS kept LEFT JOIN {quoted(table.name)} AS work ON {table.same_key('kept', 'work')}",
        )[0]
        found[table.name] = (int(counted[0]), int(counted[1]), int(counted[2]))
    return found


def rows_gone(from_kept: Any, writer: Any) -> dict[str, int]:
    """By table: number of rows of `base` that `kept` lacks and `work` still has. Call it after `merge_rows` as well."""
    found = {}
    for table in _tables(read_catalog(from_kept), read_catalog(writer)):
        kept, base = temporary(table, "kept"), temporary(table, "base")
        if value(writer, "SELECT to_regclass(%s) IS NULL", (f"pg_temp.{base}",)):
            continue
        count = value(
            writer,
            f"SELECT count(*) FROM {base} AS base JOIN {quoted(table.name)} AS work "
            f"ON {table.same_key('base', 'work')} "
            f"WHERE NOT EXISTS (SELECT 1 FROM {kept} AS kept WHERE {table.same_key('base', 'kept')})",
        )
        if count:
            found[table.name] = int(count)
    return found


def _tables(source: Catalog, target: Catalog) -> list[Table]:
    names = set(source.tables) & set(target.tables) - DERIVED - TRANSIENT - {BOOKKEEPING}
    found = []
    for name in sorted(names):
        shared = [column for column in target.stored(name) if column.name in source.tables[name]]
        found.append(Table(name, tuple(shared), target.keys[name]))
    return found


def _differing_buckets(from_kept: Any, from_base: Any, table: Table) -> list[int]:
    """Groups of rows that are missing or different on one side."""
    query = (
        f"SELECT {table.bucket}, count(*), sum(hashtextextended(ROW({table.listed()})::text, 1)::numeric) "
        f"FROM {quoted(table.name)} GROUP BY 1"
    )
    kept, base = ({bucket: sums for bucket, *sums in rows(reader, query)} for reader in (from_kept, from_base))
    return sorted(bucket for bucket in kept.keys() | base.keys() if kept.get(bucket) != base.get(bucket))


def temporary(table: Table, what: str) -> str:
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
    """Insert the rows that were not carried to the older release. Returns their number; the keys of those that could be
    inserted are in the temporary table "…_back"."""
    kept, base, back = (temporary(table, what) for what in ("kept", "base", "back"))
    keys = ", ".join(map(quoted, table.keys))
    run(writer, f"CREATE TEMPORARY TABLE IF NOT EXISTS {back} AS SELECT {keys} FROM {quoted(table.name)} LIMIT 0")
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


def _refused(writer: Any, table: Table) -> tuple[int, tuple[str, ...]]:
    """Rows that were not carried to the older release and were not inserted now, because another row has their key or a
    value that must be unique: their number, and the keys of the first ones. A row that is in place already is not one.
    """
    kept, base, back = (temporary(table, what) for what in ("kept", "base", "back"))
    same = " AND ".join(
        f"{comparable('kept', column)} IS NOT DISTINCT FROM {comparable('work', column)}" for column in table.columns
    )
    key = ", ".join(f"kept.{quoted(name)}" for name in table.keys)
    where = (
        f"FROM {kept} AS kept WHERE NOT EXISTS (SELECT 1 FROM {base} AS base WHERE {table.same_key('base', 'kept')}) "
        f"AND NOT EXISTS (SELECT 1 FROM {back} AS back WHERE {table.same_key('back', 'kept')}) "
        f"AND NOT EXISTS (SELECT 1 FROM {quoted(table.name)} AS work WHERE {table.same_key('work', 'kept')} AND {same})"
    )
    count = int(value(writer, f"SELECT count(*) {where}"))
    named = rows(writer, f"SELECT concat_ws('/', {key}) {where} ORDER BY 1 LIMIT {NAMED_AT_MOST}") if count else []
    return count, tuple(name for (name,) in named)


def _remove_orphans(from_kept: Any, writer: Any, catalog: Catalog, differing: list[Table]) -> None:
    """Delete the inserted rows whose parent was deleted since, or set the foreign key to NULL where it is defined so.
    Repeats until no row is deleted, as a deleted row may be a parent itself."""
    tables = {table.name: table for table in differing}
    references = [(reference, "true") for reference in catalog.foreign_keys if reference.table in tables]
    softs = [soft for soft in SOFT_REFERENCES if soft.table in tables and soft.parent in catalog.tables]
    references += [(_deleted_parents(from_kept, writer, tables[soft.table], soft)) for soft in softs]
    taken = True
    while taken:
        taken = False
        for reference, condition in references:
            table = tables[reference.table]
            back, name = temporary(table, "back"), quoted(table.name)
            missing = parent_is_missing(reference, "child")
            where = f"{table.same_key('back', 'child')} AND {condition} AND {missing}"
            if reference.on_delete == "n" and not set(reference.columns) & set(table.keys):
                cleared = ", ".join(f"{quoted(column)} = NULL" for column in reference.columns)
                run(writer, f"UPDATE {name} AS child SET {cleared} FROM {back} AS back WHERE {where}")
            elif run(writer, f"DELETE FROM {name} AS child USING {back} AS back WHERE {where}"):
                taken = True
                absent = f"NOT EXISTS (SELECT 1 FROM {name} AS child WHERE {table.same_key('child', 'back')})"
                run(writer, f"DELETE FROM {back} AS back WHERE {absent}")


def _deleted_parents(from_kept: Any, writer: Any, table: Table, soft: SoftReference) -> tuple[ForeignKey, str]:
    """A soft reference as a foreign key, and the condition for rows whose parent `kept` has. PostgreSQL does not guard
    such a reference, so a row may have lacked its parent before, too; then it comes back as it was."""
    reference = ForeignKey("", table.name, (soft.column,), soft.parent, (soft.parent_column,), "c")
    column, back = quoted(soft.column), temporary(table, "back")
    query = (
        f"SELECT DISTINCT child.{column}::text FROM {quoted(table.name)} AS child JOIN {back} AS back "
        f"ON {table.same_key('back', 'child')} WHERE child.{soft.when}"
    )
    parents = [name for (name,) in rows(writer, query)]
    there = (
        f"SELECT {quoted(soft.parent_column)} FROM {quoted(soft.parent)} WHERE {quoted(soft.parent_column)} = ANY (%s)"
    )
    in_kept = [str(name) for (name,) in rows(from_kept, there, (parents,))]
    with writer.cursor() as cursor:
        listed = cursor.mogrify("%s::text[]", (in_kept,)).decode()
    return reference, f"child.{soft.when} AND child.{column}::text = ANY ({listed})"


def _update(writer: Any, table: Table, catalog: Catalog) -> int:
    """Restore values that the older release could not hold and that are unchanged since. Returns the number of rows."""
    if not table.others:
        return 0
    name, kept, base = quoted(table.name), temporary(table, "kept"), temporary(table, "base")
    references = [reference for reference in catalog.foreign_keys if reference.table == table.name]
    conditions = {column.name: _is_lost_value(column, references) for column in table.others}
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


def _is_lost_value(column: Column, references: list[ForeignKey]) -> str:
    """SQL condition: the value did not fit the older release, and is unchanged since it was carried."""
    differs = f"{comparable('kept', column)} IS DISTINCT FROM {comparable('base', column)}"
    untouched = f"{comparable('work', column)} IS NOT DISTINCT FROM {comparable('base', column)}"
    parents = [f"NOT ({parent_is_missing(r, 'kept')})" for r in references if column.name in r.columns]
    return " AND ".join((differs, untouched, *parents))


def comparable(alias: str, column: Column) -> str:
    name = f"{alias}.{quoted(column.name)}"
    return f"{name}::text" if column.type in ("json", "xml", "point") else name


def _raise_sequences(from_kept: Any, writer: Any, source: Catalog, target: Catalog) -> None:
    """Continue each sequence after the values that the newer release used."""
    for (table, column), sequence in target.sequences.items():
        statement = sql.SQL("SELECT max({}) FROM {}").format(sql.Identifier(column), sql.Identifier(table))
        numbers = [value(writer, statement) or 0, _last_value(writer, sequence)]
        if (table, column) in source.sequences:
            numbers.append(_last_value(from_kept, source.sequences[table, column]))
        if max(numbers) > 0:
            run(writer, "SELECT setval(%s::regclass, %s)", (sequence, max(numbers)))


def _last_value(opened: Any, sequence: str) -> int:
    last, called = rows(opened, f"SELECT last_value, is_called FROM {sequence}")[0]
    return int(last if called else last - 1)
