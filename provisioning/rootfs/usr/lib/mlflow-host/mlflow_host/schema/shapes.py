"""How one column of the source schema fits into the same column of the target schema: SQL text, nothing executed.

Names in these expressions are the source table's own. What does not fit is never an error: it is shortened, filled or
left behind, counted, and kept in full in the database that was replaced.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlflow_host.schema.catalog import Column

WHOLE_NUMBERS = {"smallint": 2**15, "integer": 2**31, "bigint": 2**63}
TEXTS = ("character varying", "character", "text")

_BLANKS = (
    (re.compile("character|text"), "''"),
    (re.compile("smallint|integer|bigint|numeric|real|double precision"), "0"),
    (re.compile("boolean"), "false"),
    (re.compile("json"), "'{}'"),
    (re.compile("timestamp|date"), "'epoch'"),
    (re.compile("bytea"), "''"),
)


@dataclass(frozen=True)
class Fit:
    """`sql` gives the value for the target's column, None leaves the column to its default.

    `misfits` are (condition, remedy): true for source rows whose value the target cannot hold as it is, and what
    becomes of them: "shortened", "emptied", "filled" (the row is carried with another value) or "left behind" (the row
    is not carried, as the column identifies it)."""

    sql: str | None
    misfits: tuple[tuple[str, str], ...] = ()


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def fit(source: Column | None, target: Column, *, identifies: bool) -> Fit:
    """`identifies` says that the target's column is part of a key or a reference, so that it cannot be altered."""
    if source is None:
        if not target.required or target.default is not None:
            return Fit(None)
        return Fit(f"{blank(target.type)}::{target.type}", (("true", "filled"),))
    name = quoted(source.name)
    cast, misfit = converted(name, source.type, target.type)
    missing = f"{name} IS NULL" if target.required and not source.required else None
    if identifies:
        return Fit(cast, tuple((condition, "left behind") for condition in (missing, misfit) if condition))
    misfits = []
    if missing:
        misfits.append((missing, "filled"))
    if misfit:
        remedy = "shortened" if base(target.type) in TEXTS else "filled" if target.required else "emptied"
        misfits.append((misfit, remedy))
    if target.required and misfits:
        cast = f"coalesce({cast}, {target.default or f'{blank(target.type)}::{target.type}'})"
    return Fit(cast, tuple(misfits))


def converted(name: str, source: str, target: str) -> tuple[str, str | None]:
    """(expression of type `target`, condition for the rows whose value does not survive it)."""
    if source == target:
        return name, None
    if base(source) in TEXTS and base(target) in TEXTS:
        room, held = length(target), length(source)
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


def base(type_: str) -> str:
    return type_.split("(")[0]


def length(type_: str) -> int | None:
    """The most characters a text type holds; None where it has no limit."""
    found = re.search(r"\((\d+)\)", type_)
    return int(found[1]) if found else 1 if type_ == "character" else None


def blank(type_: str) -> str:
    """A literal of that type that says nothing, for a column that must not be NULL."""
    for pattern, literal in _BLANKS:
        if pattern.match(type_):
            return literal
    return "''"
