"""The report of a schema change: the numbers of rows that were carried, converted, shortened, filled and left behind.

The report is written to the data volume as JSON and as text, and to the journal. The status page shows a short summary.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PENDING = ".pending"
"""Suffix of a report's file name until the flip has succeeded."""


@dataclass(frozen=True)
class CarriedTable:
    table: str
    rows: int


@dataclass(frozen=True)
class LeftBehind:
    """Data that a schema change changed or did not copy: `count` rows of `table`, or the values of these rows in
    `column`.

    `column` is None if whole rows are meant. `remedy` is, for example, "left behind", "shortened", "emptied" or
    "filled"."""

    table: str
    column: str | None
    count: int
    remedy: str
    reason: str = ""

    def __str__(self) -> str:
        where = f"{self.table}.{self.column}" if self.column else self.table
        return f"{where}: {self.count} {self.remedy}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class MergedTable:
    """The result of a merge of one table from a kept database."""

    table: str
    rows: int
    """Number of inserted rows."""
    values: int
    """Number of rows with at least one restored value."""
    dropped: int
    """Number of rows that were not inserted because their parent row no longer exists."""
    refused: int = 0
    """Number of rows that were not inserted because another row has the same key or the same unique value."""
    refused_keys: tuple[str, ...] = ()
    """The keys of the first refused rows."""


@dataclass(frozen=True)
class ChangeReport:
    """`action` is "create", "upgrade" or "carry back". `at` is the time of the change, in RFC 3339 format and UTC."""

    action: str
    at: str
    from_head: str | None
    to_head: str
    from_version: str
    to_version: str
    kept_database: str | None
    dump: str | None
    """The s3:// address of the dump that was taken before the change."""
    carried: tuple[CarriedTable, ...] = ()
    left: tuple[LeftBehind, ...] = ()
    returned: dict[str, tuple[MergedTable, ...]] = dataclasses.field(default_factory=dict)
    """The merged tables, by the name of the kept database or of the PostgreSQL schema (`upgrade_losses`)."""
    conversions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    answers: dict[str, int] = dataclasses.field(default_factory=dict)
    """The number of runs, traces and other objects that MLflow's stores found in the copy before the flip."""
    unread: tuple[str, ...] = ()
    """One sentence for each search that failed in the copy, and for each table with rows that MLflow could not read."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(entry.rows for entry in self.carried)

    def summary(self) -> str:
        """Return one line that summarizes the report for the console and the status page."""
        parts = [f"{self.action} from MLflow {self.from_version or '?'} to {self.to_version} done"]
        if self.carried:
            parts.append(f"{self.rows:,} rows carried")
        back = sum(entry.rows + entry.values for found in self.returned.values() for entry in found)
        if back:
            parts.append(f"{back:,} rows merged back from kept databases")
        if self.left:
            tables = len({entry.table for entry in self.left})
            held = sum(entry.count for entry in self.left)
            parts.append(f"{held:,} values of {tables} tables do not fit this release and stay in {self.kept_database}")
        refused = sum(entry.refused for found in self.returned.values() for entry in found)
        if refused:
            parts.append(f"{refused:,} rows stay in kept databases, because their key is in use: see the report")
        if self.unread:
            parts.append(f"MLflow {self.to_version} cannot read all data of {len(self.unread)} kinds: see the report")
        return ", ".join(parts)


def as_text(report: ChangeReport) -> str:
    lines = [
        f"{report.action}: MLflow {report.from_version or '?'} ({report.from_head}) "
        f"to {report.to_version} ({report.to_head}), {report.at}",
        f"replaced database, kept as: {report.kept_database or 'none'}",
        f"dump before the change: {report.dump or 'none'}",
    ]
    lines += _section("carried", (f"{entry.table}: {entry.rows}" for entry in report.carried if entry.rows))
    lines += _section("converted", report.conversions)
    lines += _section("does not fit this release (the kept database has all of it)", map(str, report.left))
    for database, found in report.returned.items():
        lines += _section(
            f"merged back from {database}",
            (
                f"{r.table}: {r.rows} rows inserted, {r.values} updated, {r.dropped} omitted (no parent row), "
                f"{r.refused} omitted (key in use)"
                for r in found
            ),
        )
    lines += _section("notes", report.notes)
    lines += _section("MLflow's stores returned", (f"{name}: {number}" for name, number in report.answers.items()))
    lines += _section("MLflow could not read", report.unread)
    lines += _section("seconds", (f"{name}: {taken:.1f}" for name, taken in report.seconds.items()))
    return "\n".join(lines) + "\n"


def as_mapping(report: ChangeReport) -> dict[str, Any]:
    return dataclasses.asdict(report)


def write_pending(folder: Path, report: ChangeReport) -> Path:
    """Write the report to a file with the suffix PENDING. Call this function before the flip."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{report.at.replace(':', '').replace('-', '')}-{report.action.replace(' ', '-')}"
    path = folder / f"{name}.json{PENDING}"
    path.write_text(json.dumps(as_mapping(report), indent=2) + "\n")
    return path


def settle_pending(folder: Path, present: Iterable[str]) -> None:
    """Publish each pending report whose kept database exists: `present` contains the names of all existing databases.
    Delete the other pending reports, because the flips that they describe failed."""
    names = set(present)
    for path in folder.glob(f"*{PENDING}"):
        try:
            raw = json.loads(path.read_text())
        except ValueError:
            raw = {}
        if raw.get("kept_database") in names:
            publish(path)
        else:
            path.unlink()


def publish(path: Path) -> None:
    """Rename a pending report to its final name, and write the report's text file."""
    report = from_mapping(json.loads(path.read_text()))
    path.with_suffix("").with_suffix(".txt").write_text(as_text(report))
    path.rename(path.with_suffix(""))


def from_mapping(raw: dict[str, Any]) -> ChangeReport:
    return ChangeReport(
        **{
            **raw,
            "carried": tuple(CarriedTable(**entry) for entry in raw["carried"]),
            "left": tuple(LeftBehind(**entry) for entry in raw["left"]),
            "returned": {k: tuple(map(_merged, v)) for k, v in raw["returned"].items()},
            "conversions": tuple(raw["conversions"]),
            "notes": tuple(raw["notes"]),
            "unread": tuple(raw.get("unread", ())),
        }
    )


def _merged(raw: dict[str, Any]) -> MergedTable:
    return MergedTable(**{**raw, "refused_keys": tuple(raw.get("refused_keys", ()))})


def _section(title: str, entries: Iterable[str]) -> list[str]:
    listed = list(entries)
    return [f"{title}:", *(f"  {entry}" for entry in listed)] if listed else []
