"""The report of one change of schema: what was carried, converted, shortened, filled and left behind.

It goes to the data volume as JSON and as text, to the journal and, in one line, to the status page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PENDING = ".pending"
"""Suffix of a report whose database is not in service yet."""


@dataclass(frozen=True)
class Carried:
    table: str
    rows: int


@dataclass(frozen=True)
class Left:
    """`count` rows of `table` (of `column`, None for whole rows) that were "left behind", "shortened", "emptied" or
    "filled" with a value that says nothing; and why."""

    table: str
    column: str | None
    count: int
    remedy: str
    reason: str = ""

    def __str__(self) -> str:
        where = f"{self.table}.{self.column}" if self.column else self.table
        return f"{where}: {self.count} {self.remedy}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class Returned:
    """What came back from one kept database into one table."""

    table: str
    rows: int
    """Rows put back that the older release could not hold."""
    values: int
    """Rows in which values came back that the older release could not hold."""
    dropped: int
    """Rows not put back, as what they belong to was deleted since, or their place was taken."""


@dataclass(frozen=True)
class Report:
    """`action` is "create", "upgrade" or "carry back"; `at` an RFC 3339 time in UTC."""

    action: str
    at: str
    from_head: str | None
    to_head: str
    from_version: str
    to_version: str
    kept_database: str | None
    dump: str | None
    """s3:// address of the dump that was taken before."""
    carried: tuple[Carried, ...] = ()
    left: tuple[Left, ...] = ()
    returned: dict[str, tuple[Returned, ...]] = dataclasses.field(default_factory=dict)
    """By kept database."""
    conversions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    answers: dict[str, int] = dataclasses.field(default_factory=dict)
    """How much of what MLflow's stores answered with before the flip."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(entry.rows for entry in self.carried)

    def summary(self) -> str:
        """One line for the console and the status page."""
        said = [f"{self.action} from MLflow {self.from_version or '?'} to {self.to_version} done"]
        if self.carried:
            said.append(f"{self.rows:,} rows carried")
        back = sum(entry.rows + entry.values for found in self.returned.values() for entry in found)
        if back:
            said.append(f"{back:,} rows came back from kept databases")
        if self.left:
            tables = len({entry.table for entry in self.left})
            held = sum(entry.count for entry in self.left)
            said.append(f"{held:,} entries of {tables} tables do not fit this release and wait in {self.kept_database}")
        return ", ".join(said)


def as_text(report: Report) -> str:
    lines = [
        f"{report.action}: MLflow {report.from_version or '?'} ({report.from_head}) "
        f"to {report.to_version} ({report.to_head}), {report.at}",
        f"replaced database, kept as: {report.kept_database or 'none'}",
        f"dump taken before: {report.dump or 'none'}",
    ]
    lines += _section("carried", (f"{entry.table}: {entry.rows}" for entry in report.carried if entry.rows))
    lines += _section("converted", report.conversions)
    lines += _section("this release cannot hold (all of it is in the kept database)", map(str, report.left))
    for database, found in report.returned.items():
        lines += _section(
            f"came back from {database}",
            (f"{r.table}: {r.rows} rows, values in {r.values}, {r.dropped} not put back" for r in found),
        )
    lines += _section("notes", report.notes)
    lines += _section("MLflow answered", (f"{name}: {number}" for name, number in report.answers.items()))
    lines += _section("seconds", (f"{name}: {taken:.1f}" for name, taken in report.seconds.items()))
    return "\n".join(lines) + "\n"


def as_mapping(report: Report) -> dict[str, Any]:
    return dataclasses.asdict(report)


def write_pending(folder: Path, report: Report) -> Path:
    """Before the flip: the report is on disk, under a name that says it has not come true yet."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{report.at.replace(':', '').replace('-', '')}-{report.action.replace(' ', '-')}"
    path = folder / f"{name}.json{PENDING}"
    path.write_text(json.dumps(as_mapping(report), indent=2) + "\n")
    return path


def settle(folder: Path, present: Iterable[str]) -> None:
    """Reports whose kept database is `present` came true and get their name and text; the others are removed."""
    names = set(present)
    for path in folder.glob(f"*{PENDING}"):
        try:
            raw = json.loads(path.read_text())
        except ValueError:
            raw = {}
        if raw.get("kept_database") in names:
            come_true(path)
        else:
            path.unlink()


def come_true(path: Path) -> None:
    """Give a pending report its name, and its text beside it."""
    report = from_mapping(json.loads(path.read_text()))
    path.with_suffix("").with_suffix(".txt").write_text(as_text(report))
    path.rename(path.with_suffix(""))


def from_mapping(raw: dict[str, Any]) -> Report:
    return Report(
        **{
            **raw,
            "carried": tuple(Carried(**entry) for entry in raw["carried"]),
            "left": tuple(Left(**entry) for entry in raw["left"]),
            "returned": {k: tuple(Returned(**entry) for entry in v) for k, v in raw["returned"].items()},
            "conversions": tuple(raw["conversions"]),
            "notes": tuple(raw["notes"]),
        }
    )


def _section(title: str, entries: Iterable[str]) -> list[str]:
    listed = list(entries)
    return [f"{title}:", *(f"  {entry}" for entry in listed)] if listed else []
