"""Tables, columns, keys and constraints of one database, read from PostgreSQL's catalog."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlflow_host.postgres.cluster import rows

BOOKKEEPING = "alembic_version"


@dataclass(frozen=True)
class Column:
    name: str
    type: str
    """The type as PostgreSQL's format_type() writes it, for example "character varying(250)"."""
    required: bool
    """NOT NULL."""
    default: str | None
    """The SQL expression of the column's default, or None."""
    generated: bool


@dataclass(frozen=True)
class ForeignKey:
    name: str
    table: str
    columns: tuple[str, ...]
    parent: str
    parent_columns: tuple[str, ...]
    on_delete: str
    """Value of pg_constraint.confdeltype: a (no action), r (restrict), c (cascade), n (set null) or d (set default)."""


@dataclass(frozen=True)
class Constraint:
    table: str
    name: str
    kind: str
    """Kind: p (primary key), u (unique), c (check), f (foreign key), x (exclusion) or i (index, no constraint)."""
    definition: str


@dataclass(frozen=True)
class Catalog:
    tables: Mapping[str, Mapping[str, Column]]
    keys: Mapping[str, tuple[str, ...]]
    """The columns of each table's primary key. If a table has no primary key, the value contains all columns of the
    table."""
    unique: Mapping[str, frozenset[str]]
    """The columns of each table that are part of a primary key, a unique constraint, a unique index or a foreign key.
    The value also contains the columns to which a foreign key refers."""
    foreign_keys: tuple[ForeignKey, ...]
    constraints: tuple[Constraint, ...]
    sequences: Mapping[tuple[str, str], str]
    """Sequence name by (table, column)."""

    def stored(self, table: str) -> list[Column]:
        """The columns of a table, without generated columns, sorted by name."""
        return [column for _, column in sorted(self.tables[table].items()) if not column.generated]


_COLUMNS = """
SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
       CASE WHEN a.attgenerated = '' THEN pg_get_expr(d.adbin, d.adrelid) END, a.attgenerated <> ''
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p') ORDER BY c.relname, a.attnum"""

_CONSTRAINTS = """
SELECT c.relname, k.conname, k.contype::text, pg_get_constraintdef(k.oid),
       ARRAY(SELECT a.attname::text FROM unnest(k.conkey) WITH ORDINALITY AS u(num, place)
             JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.num ORDER BY u.place),
       p.relname,
       ARRAY(SELECT a.attname::text FROM unnest(k.confkey) WITH ORDINALITY AS u(num, place)
             JOIN pg_attribute a ON a.attrelid = k.confrelid AND a.attnum = u.num ORDER BY u.place),
       k.confdeltype::text
FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid LEFT JOIN pg_class p ON p.oid = k.confrelid
WHERE k.connamespace = 'public'::regnamespace AND k.contype IN ('p', 'u', 'c', 'f', 'x')
ORDER BY c.relname, k.conname"""

_INDEXES = """
SELECT c.relname, i.relname, pg_get_indexdef(x.indexrelid), x.indisunique,
       ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = x.indrelid AND a.attnum = ANY (x.indkey))
FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid JOIN pg_class c ON c.oid = x.indrelid
WHERE c.relnamespace = 'public'::regnamespace AND NOT EXISTS (
    SELECT 1 FROM pg_constraint k WHERE k.conindid = x.indexrelid AND k.contype IN ('p', 'u', 'x'))
ORDER BY c.relname, i.relname"""

_SEQUENCES = """
SELECT c.relname, a.attname, pg_get_serial_sequence(quote_ident(c.relname), a.attname)
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r'
  AND pg_get_serial_sequence(quote_ident(c.relname), a.attname) IS NOT NULL"""


def read_catalog(opened: Any) -> Catalog:
    tables: dict[str, dict[str, Column]] = {}
    for table, *column in rows(opened, _COLUMNS):
        tables.setdefault(table, {})[column[0]] = Column(*column)
    keys = {table: tuple(columns) for table, columns in tables.items()}
    unique: dict[str, set[str]] = {table: set() for table in tables}
    foreign: list[ForeignKey] = []
    constraints: list[Constraint] = []
    for table, name, kind, definition, columns, parent, parent_columns, on_delete in rows(opened, _CONSTRAINTS):
        constraints.append(Constraint(table, name, kind, definition))
        if kind == "p":
            keys[table] = tuple(columns)
        if kind in "puf":
            unique[table].update(columns)
        if kind == "f":
            unique[parent].update(parent_columns)
            foreign.append(ForeignKey(name, table, tuple(columns), parent, tuple(parent_columns), on_delete))
    for table, name, definition, is_unique, columns in rows(opened, _INDEXES):
        constraints.append(Constraint(table, name, "i", definition))
        if is_unique:
            unique[table].update(columns)
    sequences = {(table, column): name for table, column, name in rows(opened, _SEQUENCES)}
    return Catalog(
        tables, keys, {t: frozenset(c) for t, c in unique.items()}, tuple(foreign), tuple(constraints), sequences
    )


def head(opened: Any) -> str | None:
    """Return the migration head of the database, or None if Alembic's table is missing or empty.

    Raises ValueError if Alembic's table has more than one revision."""
    if not rows(opened, "SELECT 1 WHERE to_regclass('public.alembic_version') IS NOT NULL"):
        return None
    found = [revision for (revision,) in rows(opened, f"SELECT version_num FROM {BOOKKEEPING}")]
    if len(found) > 1:
        raise ValueError(
            f"the table {BOOKKEEPING} has {len(found)} revisions ({', '.join(sorted(found))}), but needs exactly one"
        )
    return found[0] if found else None
