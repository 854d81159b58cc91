"""Timer: report the ages of backups, and exit with a non-zero status if a backup is too old.

If a backup is too old, the unit stays failed (`systemctl --failed`) until the next successful run. Users can read the
report at /mlflow-host/backups.json, and the status page shows it.

    python -m mlflow_host.backups.check
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from mlflow_host.backups.last_runs import LastRuns, time_of
from mlflow_host.machine import config, nginx, status
from mlflow_host.postgres.pgbackrest import Stanza, archives, stanza_of

ARCHIVE_PATIENCE = timedelta(minutes=2)
"""Longest time for which a finished segment may wait until it is archived. If a segment waits longer and the volume is
lost, the writes of more than a minute are lost."""
DAILY_PATIENCE = timedelta(hours=36)
FIRST_PATIENCE = timedelta(hours=1)
"""Longest time from the start of a stanza to its first base backup and its first dump."""
BOOT_PATIENCE = timedelta(minutes=10)
"""For this time after a boot, late base backups and dumps are not reported. In this time, the machine takes the backups
that were due while it was off."""


@dataclass(frozen=True)
class SegmentQueue:
    """Finished segments that are not archived yet: their number, and the time of the oldest."""

    count: int = 0
    since: datetime | None = None


def main() -> int:
    cluster = config.cluster()
    now, booted = datetime.now(UTC), datetime.fromtimestamp(config.CONFIG.stat().st_mtime, UTC)
    archiving = archives(config.load().launch)
    found = summary(LastRuns(), stanza_of(cluster), segment_queue(cluster), now, archiving, booted=booted)
    nginx.write_private(config.RUN / "web" / "backups.json", json.dumps(found) + "\n", mode=0o644)
    status.publish()
    for problem in found["problems"]:
        print(f"mlflow-host: {problem}", file=sys.stderr)
    return 2 if found["problems"] else 0


def segment_queue(cluster: Path) -> SegmentQueue:
    times = []
    for ready in (cluster / "pg_wal" / "archive_status").glob("*.ready"):
        try:
            times.append(ready.stat().st_mtime)
        except FileNotFoundError:
            continue
    return SegmentQueue(len(times), datetime.fromtimestamp(min(times), UTC)) if times else SegmentQueue()


def summary(
    history: LastRuns,
    stanza: Stanza | None,
    queue: SegmentQueue,
    now: datetime,
    archiving: bool,
    *,
    booted: datetime,
) -> dict[str, Any]:
    """{"state": "good" | "late", "problems": [sentence, …], "archive": {…}, "base": {…}, "dump": {…}, …}

    The waiting time of a segment does not begin before the boot (`booted`), because the machine may have been off for
    days."""
    kept = {what: history.read(what) for what in ("archive", "base", "dump", "gap", "restored")}
    problems = _archiving(queue, kept["archive"].get("at", "none yet"), now, archiving, booted)
    if now - booted > BOOT_PATIENCE:
        problems += [*(_gap(kept, stanza) if archiving else ()), *_daily(kept, stanza, now, archiving)]
    return {
        "state": "late" if problems else "good",
        "problems": problems,
        "segments_waiting": queue.count,
        **{what: content for what, content in kept.items() if content},
    }


def _archiving(queue: SegmentQueue, last: str, now: datetime, archiving: bool, booted: datetime) -> list[str]:
    if not archiving:
        return [
            "the write-ahead log is not archived, because the endpoint of the backups bucket is http:// and pgBackRest "
            "supports HTTPS only: set backupsEndpoint to an https:// address"
        ]
    if queue.since is None or now - max(queue.since, booted) <= ARCHIVE_PATIENCE:
        return []
    return [
        f"{queue.count} segments of the write-ahead log wait to be archived, the oldest for {_age(now, queue.since)} "
        f"(last archived: {last}): see `journalctl -u mlflow-host-archive`; check the backups bucket and the "
        "instance role's access to it"
    ]


def _gap(kept: dict[str, dict[str, Any]], stanza: Stanza | None) -> list[str]:
    gap, base = time_of(kept["gap"]), time_of(kept["base"])
    ours = stanza is not None and kept["gap"].get("stanza") == stanza.name
    if not (gap and ours and (base is None or base <= gap)):
        return []
    return [
        f"the archived write-ahead log has a gap at {kept['gap']['at']}, because the bucket was unreachable for "
        "too long: until the next base backup, which starts automatically, a restore ends at the gap"
    ]


def _daily(kept: dict[str, dict[str, Any]], stanza: Stanza | None, now: datetime, archiving: bool) -> list[str]:
    problems = []
    kinds = [("dump", "dump", "mlflow-host-dump"), ("base", "base backup", "mlflow-host-base-backup")]
    for what, name, unit in kinds if archiving else kinds[:1]:
        last = time_of(kept[what])
        if what == "base" and stanza and kept[what].get("stanza") != stanza.name:
            last = None
        see = f"see `journalctl -u {unit}`, and start it with `systemctl start {unit}`"
        if last and now - last > DAILY_PATIENCE:
            problems.append(f"the last {name} is {_age(now, last)} old, of {kept[what]['at']}: {see}")
        elif last is None and stanza and now - stanza.began > FIRST_PATIENCE:
            problems.append(f"there is no {name} yet: {see}")
    return problems


def _age(now: datetime, then: datetime) -> str:
    minutes = int((now - then).total_seconds() // 60)
    return f"{minutes} minutes" if minutes < 120 else f"{minutes // 60} hours"


if __name__ == "__main__":
    raise SystemExit(main())
