"""How a column of the source schema fits the same column of the target schema. Returns SQL text, runs nothing.

The expressions use the source table's column names. A value that does not fit is never an error: it is shortened,
emptied, filled or left behind, and counted. The kept database still has the original value.
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
    """`sql`: expression for the target's column; None uses the column's default.

    `misfits`: (condition, remedy) pairs. The condition holds for source rows whose value the target cannot store
    unchanged. The remedy is "shortened", "emptied" or "filled" (the row is carried with another value), or
    "left behind" (the row is not carried, because the column identifies it)."""

    sql: str | None
    misfits: tuple[tuple[str, str], ...] = ()


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def fit(source: Column | None, target: Column, *, identifies: bool) -> Fit:
    """`identifies`: the target's column is part of a key or a foreign key, so its values must not change."""
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
    """(expression of type `target`, condition for rows whose value it would change)."""
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
    """Maximum number of characters of a text type; None without a limit."""
    found = re.search(r"\((\d+)\)", type_)
    return int(found[1]) if found else 1 if type_ == "character" else None


def placeholder(type_: str) -> str:
    """A neutral literal of that type (empty, zero, false, epoch), for a NOT NULL column without a value."""
    for pattern, literal in _PLACEHOLDERS:
        if pattern.match(type_):
            return literal
    return "''"


def unreadable(column: str, values: Iterable[str]) -> str:
    """SQL condition: the column has one of the values."""
    return f"{quoted(column)}::text IN ({', '.join(map(literal, values))})"


def literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
