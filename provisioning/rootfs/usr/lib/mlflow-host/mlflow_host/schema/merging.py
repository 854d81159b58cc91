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

from dataclasses import dataclass, replace
from typing import Any

from psycopg2 import sql

from mlflow_host.postgres.catalog import BOOKKEEPING, Catalog, Column, ForeignKey, read_catalog
from mlflow_host.postgres.cluster import Cluster, connection, rows, run, value
from mlflow_host.schema.column_fit import quoted
from mlflow_host.schema.conversions import DERIVED, SOFT_REFERENCES, TRANSIENT, SoftReference
from mlflow_host.schema.copying import depths, parent_is_missing, stream
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
    """Merge each table's rows from its temporary tables "…_kept" and "…_base". The caller commits.

    PostgreSQL enforces the foreign keys, so parents are inserted before children, and a row without its parent is not
    inserted."""
    references = _references(from_kept, writer, catalog, differing)
    depth = depths(catalog.tables, [each.key for found in references.values() for each in found])
    order = sorted(differing, key=lambda table: (depth[table.name], table.name))
    offered = {table.name: int(value(writer, f"SELECT count(*) {_never_given(table)}")) for table in differing}
    _insert_all(writer, order, references, depth)
    refused = {table.name: _refused(writer, table, references[table.name]) for table in differing}
    values = {table.name: _update(writer, table, catalog) for table in order}
    # A row may be refused because another row has the same unique value. `_update` may have changed that value.
    if any(count for count, _ in refused.values()):
        _insert_all(writer, order, references, depth)
        refused = {table.name: _refused(writer, table, references[table.name]) for table in differing}
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


@dataclass(frozen=True)
class Reference:
    """A foreign key or a soft reference. `missing` is an SQL condition for a row of "…_kept" whose parent is missing in
    `work`."""

    key: ForeignKey
    missing: str

    @property
    def clears(self) -> bool:
        """Whether a row without its parent is inserted with NULL (ON DELETE SET NULL)."""
        return self.key.on_delete == "n"


def _references(from_kept: Any, writer: Any, catalog: Catalog, differing: list[Table]) -> dict[str, list[Reference]]:
    """Return the references of each table in `differing`. A row that refers to itself has its parent."""
    found: dict[str, list[Reference]] = {table.name: [] for table in differing}
    keys = {table.name: table.keys for table in differing}
    for key in catalog.foreign_keys:
        if key.table not in found:
            continue
        missing = parent_is_missing(key, "kept")
        if key.table == key.parent:
            pairs = zip(key.columns, key.parent_columns, strict=True)
            missing += f" AND NOT ({' AND '.join(f'kept.{quoted(a)} = kept.{quoted(b)}' for a, b in pairs)})"
        if set(key.columns) & set(keys[key.table]):  # a column of the table's key cannot be NULL
            key = replace(key, on_delete="a")
        found[key.table].append(Reference(key, missing))
    for table in differing:
        for soft in SOFT_REFERENCES:
            if soft.table == table.name and soft.parent in catalog.tables:
                found[table.name].append(_soft_reference(from_kept, writer, table, soft))
    return found


def _soft_reference(from_kept: Any, writer: Any, table: Table, soft: SoftReference) -> Reference:
    """Rows whose parent is missing in `kept`, too, are inserted, because PostgreSQL permits soft references to missing
    rows."""
    key = ForeignKey("", table.name, (soft.column,), soft.parent, (soft.parent_column,), "c")
    column = f"kept.{quoted(soft.column)}::text"
    parents = [name for (name,) in rows(writer, f"SELECT DISTINCT {column} {_never_given(table)} AND kept.{soft.when}")]
    there = (
        f"SELECT {quoted(soft.parent_column)} FROM {quoted(soft.parent)} WHERE {quoted(soft.parent_column)} = ANY (%s)"
    )
    in_kept = [str(name) for (name,) in rows(from_kept, there, (parents,))]
    with writer.cursor() as cursor:
        listed = cursor.mogrify("%s::text[]", (in_kept,)).decode()
    return Reference(key, f"kept.{soft.when} AND {column} = ANY ({listed}) AND {parent_is_missing(key, 'kept')}")


def _never_given(table: Table) -> str:
    """SQL for the rows that were not carried to the older release."""
    kept, base = temporary(table, "kept"), temporary(table, "base")
    return f"FROM {kept} AS kept WHERE NOT EXISTS (SELECT 1 FROM {base} AS base WHERE {table.same_key('base', 'kept')})"


def _insert_all(writer: Any, order: list[Table], references: dict[str, list[Reference]], depth: dict[str, int]) -> None:
    """Insert the rows that were not carried to the older release, parents first. One pass inserts all rows, unless a
    table refers to itself or to a table that comes later: such a parent may be inserted by a later pass, so a child's
    column is set to NULL only after all parents were inserted."""
    late = any(
        depth[each.key.parent] >= depth[each.key.table] and each.key.parent in references
        for found in references.values()
        for each in found
    )
    for clear in (False, True) if late else (True,):
        while sum([_insert(writer, table, references[table.name], clear=clear) for table in order]) and late:
            pass


def _insert(writer: Any, table: Table, references: list[Reference], *, clear: bool) -> int:
    """Insert the rows whose parents exist, and return their number. The temporary table "…_back" contains the keys of
    all inserted rows. With `clear`, columns that may be NULL are set to NULL if the parent is missing."""
    back, keys = temporary(table, "back"), ", ".join(map(quoted, table.keys))
    run(writer, f"CREATE TEMPORARY TABLE IF NOT EXISTS {back} AS SELECT {keys} FROM {quoted(table.name)} LIMIT 0")
    values = [f"kept.{quoted(column.name)}" for column in table.columns]
    for each in references:
        if clear and each.clears:
            for at, column in enumerate(table.columns):
                if column.name in each.key.columns:
                    values[at] = f"CASE WHEN {each.missing} THEN NULL ELSE {values[at]} END"
    needed = "".join(f" AND NOT ({each.missing})" for each in references if not (clear and each.clears))
    return run(
        writer,
        f"WITH put AS (INSERT INTO {quoted(table.name)} ({table.listed()}) OVERRIDING SYSTEM VALUE "
        f"SELECT {', '.join(values)} {_never_given(table)}{needed} ON CONFLICT DO NOTHING RETURNING {keys}) "
        f"INSERT INTO {back} SELECT {keys} FROM put",
    )


def _refused(writer: Any, table: Table, references: list[Reference]) -> tuple[int, tuple[str, ...]]:
    """Return the number of refused rows, and the keys of the first NAMED_AT_MOST refused rows. `_insert` refuses a row
    if another row has its key or one of its unique values. A row that exists unchanged in `work`, or whose parent is
    missing, is not counted."""
    back = temporary(table, "back")
    same = " AND ".join(
        f"{comparable('kept', column)} IS NOT DISTINCT FROM {comparable('work', column)}" for column in table.columns
    )
    key = ", ".join(f"kept.{quoted(name)}" for name in table.keys)
    where = (
        f"{_never_given(table)}{''.join(f' AND NOT ({each.missing})' for each in references if not each.clears)} "
        f"AND NOT EXISTS (SELECT 1 FROM {back} AS back WHERE {table.same_key('back', 'kept')}) "
        f"AND NOT EXISTS (SELECT 1 FROM {quoted(table.name)} AS work WHERE {table.same_key('work', 'kept')} AND {same})"
    )
    count = int(value(writer, f"SELECT count(*) {where}"))
    named = rows(writer, f"SELECT concat_ws('/', {key}) {where} ORDER BY 1 LIMIT {NAMED_AT_MOST}") if count else []
    return count, tuple(name for (name,) in named)


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
