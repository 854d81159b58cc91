"""Write SQL that converts a column of the source schema to the same column of the target schema. No SQL is run here.

The expressions use the column names of the source table. A misfit is never an error. The value is shortened, replaced
by NULL ("emptied") or by a default ("filled"), or the row is not carried ("left behind"). Misfits are counted. The kept
database has the original value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mlflow_host.postgres.catalog import Column

WHOLE_NUMBERS = {"smallint": 2**15, "integer": 2**31, "bigint": 2**63}
TEXTS = ("character varying", "character", "text")

_PLACEHOLDERS = (
    (re.compile("character|text"), "''"),
    (re.compile("smallint|integer|bigint|numeric|real|double precision"), "0"),
    (re.compile("boolean"), "false"),
    (re.compile("json"), "'{}'"),
    (re.compile("timestamp|date"), "'epoch'"),
    (re.compile("bytea"), "''"),
)


@dataclass(frozen=True)
class Fit:
    """`sql` is the expression for the target's column. If `sql` is None, the column gets its default.

    `misfits` contains pairs: an SQL condition and a remedy. The condition selects source rows whose value the target
    cannot store unchanged. With the remedies "shortened", "emptied" and "filled", the row is carried with another
    value. With the remedy "left behind", the row is not carried, because the column identifies the row."""

    sql: str | None
    misfits: tuple[tuple[str, str], ...] = ()


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def fit(source: Column | None, target: Column, *, identifies: bool) -> Fit:
    """Convert a column. `identifies` means that the target's column is part of a key or of a foreign key, so its values
    must not change."""
    if source is None:
        if not target.required or target.default is not None:
            return Fit(None)
        return Fit(f"{placeholder(target.type)}::{target.type}", (("true", "filled"),))
    name = quoted(source.name)
    cast, misfit = convert(name, source.type, target.type)
    missing = f"{name} IS NULL" if target.required and not source.required else None
    if identifies:
        return Fit(cast, tuple((condition, "left behind") for condition in (missing, misfit) if condition))
    misfits = []
    if missing:
        misfits.append((missing, "filled"))
    if misfit:
        remedy = "shortened" if base_type(target.type) in TEXTS else "filled" if target.required else "emptied"
        misfits.append((misfit, remedy))
    if target.required and misfits:
        cast = f"coalesce({cast}, {target.default or f'{placeholder(target.type)}::{target.type}'})"
    return Fit(cast, tuple(misfits))


def convert(name: str, source: str, target: str) -> tuple[str, str | None]:
    """Return an expression of type `target`, and a condition for the rows whose value the expression would change."""
    if source == target:
        return name, None
    if base_type(source) in TEXTS and base_type(target) in TEXTS:
        room, held = max_length(target), max_length(source)
        fits = room is None or (held is not None and held <= room)
        return f"{name}::{target}", None if fits else f"char_length({name}) > {room}"
    if source in WHOLE_NUMBERS and target in WHOLE_NUMBERS:
        limit = WHOLE_NUMBERS[target]
        if WHOLE_NUMBERS[source] <= limit:
            return f"{name}::{target}", None
        within = f"{name} BETWEEN {-limit} AND {limit - 1}"
        return f"CASE WHEN {within} THEN {name}::{target} END", f"NOT ({within})"
    if "boolean" in (source, target) and (source in WHOLE_NUMBERS or target in WHOLE_NUMBERS):
        return f"{name}::integer::{target}", None
    return f"{name}::text::{target}", None


def base_type(type_: str) -> str:
    return type_.split("(")[0]


def max_length(type_: str) -> int | None:
    """Return the maximum number of characters of a text type, or None if the type has no limit."""
    found = re.search(r"\((\d+)\)", type_)
    return int(found[1]) if found else 1 if type_ == "character" else None


def placeholder(type_: str) -> str:
    """A neutral literal of a type (empty, zero, false, epoch), for a NOT NULL column that has no value."""
    for pattern, literal in _PLACEHOLDERS:
        if pattern.match(type_):
            return literal
    return "''"


def unreadable(column: str, values: Iterable[str]) -> str:
    """Return the SQL condition for rows in which `column` has one of `values`."""
    return f"{quoted(column)}::text IN ({', '.join(map(literal, values))})"


def literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
