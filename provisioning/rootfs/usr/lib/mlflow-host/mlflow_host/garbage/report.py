"""What a removal found and did: JSON and text on the data volume, one line for the journal and the status page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mlflow_host import durable
from mlflow_host.backups.history import stamp
from mlflow_host.garbage.plan import Item

NEWEST = "garbage.json"
"""The last one under a name of its own: what nginx serves and the status page tells of."""

SUFFIX = "-garbage"
KEPT_REPORTS = 60


@dataclass(frozen=True)
class Report:
    """`removed` is what would be removed in a dry run."""

    at: datetime
    dry_run: bool
    grace_days: float
    removed: tuple[Item, ...]
    kept: tuple[Item, ...]
    failed: tuple[Item, ...] = ()
    dump: str | None = None
    """s3:// address of the dump that was taken before."""
    seconds: float = 0.0

    def summary(self) -> str:
        """One line."""
        said = [f"{counted(self.removed)} {'would be removed' if self.dry_run else 'removed'} for good"]
        said += [f"{counted(self.kept)} kept"] if self.kept else []
        said += [f"{counted(self.failed)} could not be removed: {self.failed[0].kept}"] if self.failed else []
        return "; ".join(said)


def counted(items: Iterable[Item]) -> str:
    """ "2 runs, 1 experiment", or "nothing"."""
    numbers = Counter(item.kind for item in items)
    return ", ".join(f"{number:,} {kind}{'s' * (number != 1)}" for kind, number in numbers.items()) or "nothing"


def as_mapping(report: Report) -> dict[str, Any]:
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


def as_text(report: Report) -> str:
    verb = "would be removed" if report.dry_run else "removed"
    lines = [f"deleted more than {report.grace_days:g} days before {stamp(report.at)}: {report.summary()}"]
    lines += [f"dump taken before: {report.dump}"] if report.dump else []
    for title, items in ((verb, report.removed), ("kept", report.kept), ("not removed", report.failed)):
        lines += [f"{title}:"] if items else []
        lines += [f"  {item}, deleted {stamp(item.deleted)}" + f": {item.kept}" * bool(item.kept) for item in items]
    return "\n".join(lines) + "\n"


def write(folder: Path, report: Report) -> Path:
    """Report of a removal; the oldest beyond KEPT_REPORTS go. Returns the JSON file."""
    content = json.dumps(as_mapping(report), indent=2) + "\n"
    path = folder / f"{stamp(report.at).replace('-', '').replace(':', '')}{SUFFIX}.json"
    durable.write(path.with_suffix(".txt"), as_text(report))
    durable.write(path, content)
    durable.write(folder / NEWEST, content)
    for old in sorted(folder.glob(f"*{SUFFIX}.json"))[:-KEPT_REPORTS]:
        old.with_suffix(".txt").unlink(missing_ok=True)
        old.unlink()
    return path
