"""The exchange of databases by renames in one transaction, what becomes of the replaced ones, and clearing up.

At any moment there is either the old database in service or the new one: a rename of databases is transactional, and
everything before it happens under working names.
"""

from __future__ import annotations

import re
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from psycopg2 import errors, sql

from mlflow_host.schema import record as records
from mlflow_host.schema.cluster import WORK, Cluster, connection, databases, disconnect, drop, rows, run, value
from mlflow_host.schema.record import Record

NEWEST_KEPT = 3
YOUNG = timedelta(days=30)
ROOM_SHARE = 0.15
"""The volume "has room" while this share of it is free."""

TRIES = 20

_KEPT = re.compile(r"_kept_(?P<head>\w+)_(?P<at>\d{8}t\d{6}z)(?:_\d+)?$")


def kept_name(cluster: Cluster, head: str | None, at: datetime) -> str:
    """ "mlflow_kept_dc11669786a5_20261122t101500z", with a number after it where that is taken."""
    name = f"{cluster.database}_kept_{head or 'none'}_{at.astimezone(UTC):%Y%m%dt%H%M%Sz}"
    taken = set(databases(cluster))
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, 1000))) if n not in taken)


def kept(cluster: Cluster) -> list[tuple[datetime, str]]:
    """Time of replacement and name of every kept database, oldest first."""
    found = []
    for name in databases(cluster):
        match = _KEPT.search(name)
        if match and name.startswith(f"{cluster.database}_kept_"):
            found.append((datetime.strptime(match["at"], "%Y%m%dt%H%M%Sz").replace(tzinfo=UTC), name))
    return sorted(found)


def flip(cluster: Cluster, work: str, record: Record, replaced: str, replaced_record: Record | None) -> None:
    """Put `work` in service and the database in service aside as `replaced`, or do nothing at all."""
    live = cluster.database
    for attempt in range(TRIES):
        disconnect(cluster, work)
        disconnect(cluster, live)
        try:
            with connection(cluster) as opened:
                names = {name: sql.Identifier(name) for name in (live, work, replaced)}
                if live in databases(cluster):
                    run(opened, sql.SQL("ALTER DATABASE {} RENAME TO {}").format(names[live], names[replaced]))
                    run(
                        opened,
                        sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(names[replaced]),
                    )
                    if replaced_record:
                        records.write(opened, replaced, replaced_record)
                run(opened, sql.SQL("ALTER DATABASE {} RENAME TO {}").format(names[work], names[live]))
                records.write(opened, live, record)
            return
        except errors.ObjectInUse:
            if attempt == TRIES - 1:
                raise
            time.sleep(0.25)


def drop_orphans(cluster: Cluster) -> list[str]:
    """Databases under construction when an earlier step was killed; their names, now free again."""
    found = [name for name in databases(cluster) if name.startswith(WORK)]
    for name in found:
        drop(cluster, name)
    return found


def put_away(cluster: Cluster, database: str) -> None:
    """Drop a kept database so that a crash half-way leaves an orphan, which the next start clears, and no ruin."""
    doomed = f"{WORK}dropping"
    drop(cluster, doomed)
    disconnect(cluster, database)
    with connection(cluster) as opened:
        names = sql.Identifier(database), sql.Identifier(doomed)
        run(opened, sql.SQL("ALTER DATABASE {} RENAME TO {}").format(*names))
    drop(cluster, doomed)


def droppable(found: list[tuple[datetime, str]], waiting: set[str], now: datetime, *, has_room: bool) -> list[str]:
    """Kept databases that may go, oldest first: never the three newest, never one that still holds what is to come
    back, and never one younger than 30 days while the volume has room."""
    older = found[:-NEWEST_KEPT] if len(found) > NEWEST_KEPT else []
    return [name for at, name in older if name not in waiting and (not has_room or now - at >= YOUNG)]


def room(cluster: Cluster) -> tuple[int, int] | None:
    """Free and total bytes where PostgreSQL stores its data; None where that is not on this machine."""
    with connection(cluster) as opened:
        folder = Path(str(value(opened, "SHOW data_directory")))
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free, usage.total


def make_room(cluster: Cluster, needed: int, waiting: set[str], now: datetime) -> tuple[int, list[str]] | None:
    """Drop kept databases that are beyond their time, then, while `needed` bytes are not free or the volume is close to
    full, those beyond the three newest. Returns the free bytes and what was dropped; None where room is unknown."""
    dropped: list[str] = []
    while (usage := room(cluster)) is not None:
        free, total = usage
        candidates = droppable(kept(cluster), waiting, now, has_room=free >= max(needed, ROOM_SHARE * total))
        if not candidates:
            return free, dropped
        put_away(cluster, candidates[0])
        dropped.append(candidates[0])
    return None


def sizes(cluster: Cluster) -> dict[str, Any]:
    """Bytes of every database by name."""
    with connection(cluster) as opened:
        return dict(rows(opened, "SELECT datname, pg_database_size(oid) FROM pg_database WHERE datallowconn"))
