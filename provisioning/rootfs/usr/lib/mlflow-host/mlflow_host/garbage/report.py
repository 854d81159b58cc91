"""Write the report of a garbage collection to the data volume, as JSON and as text. The status page shows a summary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mlflow_host.backups.last_runs import stamp
from mlflow_host.garbage.plan import Item
from mlflow_host.machine import atomic_file

NEWEST = "garbage.json"
"""Name of a copy of the newest report. nginx serves this copy, and the status page shows the copy's summary."""

SUFFIX = "-garbage"
KEPT_REPORTS = 60


@dataclass(frozen=True)
class RemovalReport:
    """A report. In the report of a dry run, `removed` lists the items that would be removed."""

    at: datetime
    dry_run: bool
    grace_days: float
    removed: tuple[Item, ...]
    kept: tuple[Item, ...]
    failed: tuple[Item, ...] = ()
    dump: str | None = None
    """s3:// address of the database dump that was taken before the removal."""
    seconds: float = 0.0

    def summary(self) -> str:
        """One line."""
        parts = [f"{counted(self.removed)} {'would be removed' if self.dry_run else 'removed'} permanently"]
        parts += [f"{counted(self.kept)} kept"] if self.kept else []
        parts += [f"{counted(self.failed)} could not be removed: {self.failed[0].kept}"] if self.failed else []
        return "; ".join(parts)


def counted(items: Iterable[Item]) -> str:
    """Count items by kind, for example "2 runs, 1 experiment". Without items, return "nothing"."""
    numbers = Counter(item.kind for item in items)
    return ", ".join(f"{number:,} {kind}{'s' * (number != 1)}" for kind, number in numbers.items()) or "nothing"


def as_mapping(report: RemovalReport) -> dict[str, Any]:
    def plain(item: Item) -> dict[str, Any]:
        return {**asdict(item), "deleted": stamp(item.deleted), "paths": list(item.paths)}

    lists = {name: [plain(item) for item in getattr(report, name)] for name in ("removed", "kept", "failed")}
    return {
        "at": stamp(report.at),
        "dry_run": report.dry_run,
        "grace_days": report.grace_days,
        "summary": report.summary(),
        "dump": report.dump,
        "seconds": round(report.seconds, 1),
        **lists,
    }


def as_text(report: RemovalReport) -> str:
    verb = "would be removed" if report.dry_run else "removed"
    lines = [f"deleted more than {report.grace_days:g} days before {stamp(report.at)}: {report.summary()}"]
    lines += [f"dump before the removal: {report.dump}"] if report.dump else []
    for title, items in ((verb, report.removed), ("kept", report.kept), ("not removed", report.failed)):
        lines += [f"{title}:"] if items else []
        lines += [f"  {item}, deleted {stamp(item.deleted)}" + f": {item.kept}" * bool(item.kept) for item in items]
    return "\n".join(lines) + "\n"


def write(folder: Path, report: RemovalReport) -> Path:
    """Write the report, and keep only the newest KEPT_REPORTS reports. Returns the path of the JSON file."""
    content = json.dumps(as_mapping(report), indent=2) + "\n"
    path = folder / f"{stamp(report.at).replace('-', '').replace(':', '')}{SUFFIX}.json"
    atomic_file.write(path.with_suffix(".txt"), as_text(report))
    atomic_file.write(path, content)
    atomic_file.write(folder / NEWEST, content)
    for old in sorted(folder.glob(f"*{SUFFIX}.json"))[:-KEPT_REPORTS]:
        old.with_suffix(".txt").unlink(missing_ok=True)
        old.unlink()
    return path
