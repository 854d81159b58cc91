"""The flip is one transaction: it renames the database in service, and gives the old name to the new database.

PostgreSQL renames databases transactionally, so at any moment either the old or the new database is in service. The
replaced database becomes a kept database, which `drop_kept_for_space` may drop later. The names of unfinished
databases start with WORK_PREFIX.
"""

from __future__ import annotations

import re
import shutil
from datetime import UTC, datetime, timedelta

from psycopg2 import sql

from mlflow_host.postgres import ownership as records
from mlflow_host.postgres.cluster import (
    WORK_PREFIX,
    Cluster,
    command,
    connection,
    databases,
    drop,
    run,
    value,
    without_sessions,
)
from mlflow_host.postgres.ownership import OwnershipRecord

NEWEST_KEPT = 3
MINIMUM_AGE = timedelta(days=30)
FREE_SHARE = 0.15
"""The data volume has enough space if at least this share of the volume is free."""

_KEPT = re.compile(r"_kept_(?P<head>\w+)_(?P<at>\d{8}t\d{6}z)(?:_\d+)?$")


def kept_name(cluster: Cluster, head: str | None, at: datetime) -> str:
    """A new name like "mlflow_kept_dc11669786a5_20261122t101500z". If the name exists, a suffix like "_2" is added."""
    name = f"{cluster.database}_kept_{head or 'none'}_{at.astimezone(UTC):%Y%m%dt%H%M%Sz}"
    taken = set(databases(cluster))
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, 1000))) if n not in taken)


def kept_databases(cluster: Cluster) -> list[tuple[datetime, str]]:
    """The time of the flip and the name of every kept database. The oldest is first."""
    found = []
    for name in databases(cluster):
        match = _KEPT.search(name)
        if match and name.startswith(f"{cluster.database}_kept_"):
            found.append((datetime.strptime(match["at"], "%Y%m%dt%H%M%Sz").replace(tzinfo=UTC), name))
    return sorted(found)


def flip(
    cluster: Cluster, work: str, record: OwnershipRecord, replaced: str, replaced_record: OwnershipRecord | None
) -> None:
    """Rename the database in service to `replaced`, and rename `work` to the name of the database in service. Both
    renames are in one transaction."""
    live = cluster.database

    def rename() -> None:
        with connection(cluster) as opened:
            names = {name: sql.Identifier(name) for name in (live, work, replaced)}
            if live in databases(cluster):
                run(opened, sql.SQL("ALTER DATABASE {} RENAME TO {}").format(names[live], names[replaced]))
                run(opened, sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(names[replaced]))
                if replaced_record:
                    records.write(opened, replaced, replaced_record)
            run(opened, sql.SQL("ALTER DATABASE {} RENAME TO {}").format(names[work], names[live]))
            records.write(opened, live, record)

    without_sessions(cluster, (work, live), rename)


def drop_orphans(cluster: Cluster) -> list[str]:
    """Drop the unfinished databases that a killed boot step left. Returns the names of the dropped databases."""
    found = [name for name in databases(cluster) if name.startswith(WORK_PREFIX)]
    for name in found:
        drop(cluster, name)
    return found


def drop_kept(cluster: Cluster, database: str) -> None:
    """Rename a kept database to a name with WORK_PREFIX, and drop it. If the machine crashes, the next boot repeats the
    drop."""
    doomed = f"{WORK_PREFIX}dropping"
    drop(cluster, doomed)
    rename = "ALTER DATABASE {} RENAME TO {}"
    without_sessions(cluster, (database,), lambda: command(cluster, rename, database, doomed))
    drop(cluster, doomed)


def droppable(found: list[tuple[datetime, str]], waiting: set[str], now: datetime, *, has_room: bool) -> list[str]:
    """The kept databases that may be dropped, oldest first. The three newest databases are never dropped. An upgrade
    needs the databases in `waiting`, so they are never dropped. If the volume has enough space, only databases that are
    at least 30 days old may be dropped."""
    older = found[:-NEWEST_KEPT] if len(found) > NEWEST_KEPT else []
    return [name for at, name in older if name not in waiting and (not has_room or now - at >= MINIMUM_AGE)]


def disk_space(cluster: Cluster) -> tuple[int, int] | None:
    """Return the free and total bytes of the volume with PostgreSQL's data. For another host with a known size of its
    storage, the free bytes are computed from the sizes of the databases and of the write-ahead log. For another host
    whose size is unknown, return None."""
    with connection(cluster) as opened:
        if not cluster.remote:
            usage = shutil.disk_usage(str(value(opened, "SHOW data_directory")))
            return usage.free, usage.total
        if cluster.storage_bytes is None:
            return None
        query = "SELECT sum(pg_database_size(oid)) + (SELECT sum(size) FROM pg_ls_waldir()) FROM pg_database"
        return max(0, cluster.storage_bytes - int(value(opened, query))), cluster.storage_bytes


def drop_kept_for_space(
    cluster: Cluster, needed: int, waiting: set[str], now: datetime
) -> tuple[int, list[str]] | None:
    """Drop kept databases that are at least 30 days old. If the volume has fewer than `needed` free bytes, or a smaller
    free share than FREE_SHARE, also drop younger databases, but never the three newest. Returns the free bytes and the
    names of the dropped databases, or None if the free space is unknown."""
    dropped: list[str] = []
    while True:
        usage = disk_space(cluster)
        has_room = usage is None or usage[0] >= max(needed, FREE_SHARE * usage[1])
        candidates = droppable(kept_databases(cluster), waiting, now, has_room=has_room)
        if not candidates:
            return (usage[0], dropped) if usage else None
        drop_kept(cluster, candidates[0])
        dropped.append(candidates[0])
