"""Merge: an upgrade after a rollback restores, from the kept database, the data that the older schema could not hold.

The merge compares three databases with the same schema.

- `kept` is the newer release's database at the time of the rollback.
- `base` is the part of `kept` that the older release could hold, migrated to the newer schema.
- `work` is the older release's database with the users' later changes, migrated to the newer schema.

If a table has the same rows in `kept` and `base`, the older release held all rows, so the merge does not change the
table in `work`. A row that `kept` has and `base` lacks is inserted into `work` if the row's parents exist in `work`. A
value that differs between `kept` and `base` is restored in `work` if no user changed the value (`work` has the value of
`base`). The code contains no names of releases or tables.
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
"""The report lists the keys of at most this number of refused rows per table."""

BUCKETS = 4096
"""Each table is divided into this number of groups. Only groups whose checksums differ are compared row by row."""


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
    """Restore in `work` the data that `kept` has and `base` lacks, in one transaction. The schemas must be equal."""
    with (
        connection(cluster, kept) as from_kept,
        connection(cluster, base) as from_base,
        connection(cluster, work) as writer,
    ):
        from_kept.set_session(isolation_level="REPEATABLE READ", readonly=True)
        return merge_rows(from_kept, from_base, writer)


def merge_rows(from_kept: Any, from_base: Any, writer: Any) -> tuple[MergedTable, ...]:
    """Run `merge` in the caller's transactions, without a commit. `compare_rows` can count the merged rows
    afterwards."""
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
    """Merge each table's rows from its temporary tables "…_kept" and "…_base". The caller commits."""
    run(writer, "SET LOCAL session_replication_role = replica")
    offered = {table.name: _insert(writer, table) for table in differing}
    refused = {table.name: _refused(writer, table) for table in differing}
    _remove_orphans(from_kept, writer, catalog, differing)
    values = {table.name: _update(writer, table, catalog) for table in differing}
    # A row may be refused because another row has the same unique value. `_update` may have changed that value.
    if any(count for count, _ in refused.values()):
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
    """Return three numbers per table: the rows of `kept` in the groups that differ from `base`, how many of these rows
    are missing in `work`, and how many differ in `work`. Call `merge_rows` first, in the same transaction."""
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
    """Count, per table, the rows that `base` and `work` have and `kept` lacks. Call `merge_rows` first."""
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
    """Return the numbers of the groups of rows that differ between `kept` and `base`."""
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
    """Insert the rows that were not carried to the older release. Returns the number of such rows, including rows that
    PostgreSQL refused. The temporary table "…_back" contains the keys of the inserted rows."""
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
    """Return the number of refused rows, and the keys of the first NAMED_AT_MOST refused rows. `_insert` refuses a row
    if another row has its key or one of its unique values. A row that exists unchanged in `work` is not counted."""
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
    """Delete each inserted row whose parent no longer exists. If the foreign key is ON DELETE SET NULL, set the column
    to NULL instead. Repeats until no row is deleted, because a deleted row may be another row's parent."""
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
    """Return a soft reference as a ForeignKey, and the SQL condition for rows whose parent exists in `kept`. Rows whose
    parent is missing in `kept` are not deleted, because PostgreSQL permits soft references to missing rows."""
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
    """Restore the values that the older release could not hold. Values that users changed after the rollback are not
    restored. Returns the number of updated rows."""
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
    """SQL condition: the older release could not hold the value, and no user changed the value after the rollback."""
    differs = f"{comparable('kept', column)} IS DISTINCT FROM {comparable('base', column)}"
    untouched = f"{comparable('work', column)} IS NOT DISTINCT FROM {comparable('base', column)}"
    parents = [f"NOT ({parent_is_missing(r, 'kept')})" for r in references if column.name in r.columns]
    return " AND ".join((differs, untouched, *parents))


def comparable(alias: str, column: Column) -> str:
    name = f"{alias}.{quoted(column.name)}"
    return f"{name}::text" if column.type in ("json", "xml", "point") else name


def _raise_sequences(from_kept: Any, writer: Any, source: Catalog, target: Catalog) -> None:
    """Set each sequence, so that its next number is higher than all numbers that the newer release used."""
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
