"""The flip: rename the database in service, and give its name to its successor, in one transaction.

PostgreSQL renames databases transactionally, so at any moment either the old or the new database is in service. The
replaced one stays as a kept database until `drop_kept_for_space` drops it. Databases under construction have
names with WORK_PREFIX.
"""

from __future__ import annotations

import re
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from psycopg2 import errors, sql

from mlflow_host.postgres import ownership as records
from mlflow_host.postgres.cluster import WORK_PREFIX, Cluster, connection, databases, disconnect, drop, run, value
from mlflow_host.postgres.ownership import OwnershipRecord

NEWEST_KEPT = 3
MINIMUM_AGE = timedelta(days=30)
FREE_SHARE = 0.15
"""The volume has enough space while this share of it is free."""

RENAME_ATTEMPTS = 20

_KEPT = re.compile(r"_kept_(?P<head>\w+)_(?P<at>\d{8}t\d{6}z)(?:_\d+)?$")


def kept_name(cluster: Cluster, head: str | None, at: datetime) -> str:
    """ "mlflow_kept_dc11669786a5_20261122t101500z"; with "_2" and so on appended where that name exists."""
    name = f"{cluster.database}_kept_{head or 'none'}_{at.astimezone(UTC):%Y%m%dt%H%M%Sz}"
    taken = set(databases(cluster))
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, 1000))) if n not in taken)


def kept_databases(cluster: Cluster) -> list[tuple[datetime, str]]:
    """(time of the flip, name) of every kept database, oldest first."""
    found = []
    for name in databases(cluster):
        match = _KEPT.search(name)
        if match and name.startswith(f"{cluster.database}_kept_"):
            found.append((datetime.strptime(match["at"], "%Y%m%dt%H%M%Sz").replace(tzinfo=UTC), name))
    return sorted(found)


def flip(
    cluster: Cluster, work: str, record: OwnershipRecord, replaced: str, replaced_record: OwnershipRecord | None
) -> None:
    """Rename the database in service to `replaced`, and `work` to the name of the database in service. Either both or
    neither happens."""
    live = cluster.database
    for attempt in range(RENAME_ATTEMPTS):
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
            if attempt == RENAME_ATTEMPTS - 1:
                raise
            time.sleep(0.25)


def drop_orphans(cluster: Cluster) -> list[str]:
    """Drop the databases that a killed step left under construction. Returns their names."""
    found = [name for name in databases(cluster) if name.startswith(WORK_PREFIX)]
    for name in found:
        drop(cluster, name)
    return found


def drop_kept(cluster: Cluster, database: str) -> None:
    """Rename before dropping, so a crash leaves a database that the next boot drops, never a half-dropped kept one."""
    doomed = f"{WORK_PREFIX}dropping"
    drop(cluster, doomed)
    disconnect(cluster, database)
    with connection(cluster) as opened:
        names = sql.Identifier(database), sql.Identifier(doomed)
        run(opened, sql.SQL("ALTER DATABASE {} RENAME TO {}").format(*names))
    drop(cluster, doomed)


def droppable(found: list[tuple[datetime, str]], waiting: set[str], now: datetime, *, has_room: bool) -> list[str]:
    """Kept databases that may be dropped, oldest first. Never the three newest, never one in `waiting` (its data is
    still to be merged back), and none younger than 30 days while the volume has enough space."""
    older = found[:-NEWEST_KEPT] if len(found) > NEWEST_KEPT else []
    return [name for at, name in older if name not in waiting and (not has_room or now - at >= MINIMUM_AGE)]


def disk_space(cluster: Cluster) -> tuple[int, int] | None:
    """Free and total bytes of PostgreSQL's data volume; None when the cluster is not on this machine."""
    with connection(cluster) as opened:
        folder = Path(str(value(opened, "SHOW data_directory")))
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free, usage.total


def drop_kept_for_space(
    cluster: Cluster, needed: int, waiting: set[str], now: datetime
) -> tuple[int, list[str]] | None:
    """Drop kept databases older than 30 days, and younger ones too while less than `needed` bytes or FREE_SHARE are
    free. The three newest always stay. Returns free bytes and dropped names; None where free space is unknown."""
    dropped: list[str] = []
    while (usage := disk_space(cluster)) is not None:
        free, total = usage
        candidates = droppable(kept_databases(cluster), waiting, now, has_room=free >= max(needed, FREE_SHARE * total))
        if not candidates:
            return free, dropped
        drop_kept(cluster, candidates[0])
        dropped.append(candidates[0])
    return None
