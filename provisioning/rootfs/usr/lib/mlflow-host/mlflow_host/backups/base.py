"""Base backups by pgBackRest: the first one soon after a cluster's history has begun, then one each night.

Run every ten minutes, it looks whether one is due: in full for the first, after a gap in the archived log, and once a
week; otherwise what has changed since the last full one. pgBackRest then drops what the retention no longer asks for.

    python -m mlflow_host.backups.base            as the OS user postgres, PostgreSQL running
    python -m mlflow_host.backups.base --now      whether due or not
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg2

from mlflow_host import config
from mlflow_host.backups.history import History, is_due, stamp, time_of
from mlflow_host.backups.repository import EMPTY, BackupError, Repository, Stanza, archives, last_line, stanza_of
from mlflow_host.schema.cluster import Cluster, connection, value

FULL_EVERY = timedelta(days=7)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mlflow_host.backups.base", description=__doc__)
    parser.add_argument("--now", action="store_true", help="take one whether one is due or not")
    arguments = parser.parse_args()
    document = config.load().launch
    cluster = config.cluster()
    try:
        if not archives(document):
            raise BackupError("there are no base backups: the store of the backups bucket is asked by plain HTTP")
        retention = timedelta(days=document.backups.retention_days)
        print(take(Repository(cluster), History(), retention, datetime.now(UTC), holds_nothing, at_once=arguments.now))
    except (BackupError, OSError) as error:
        print(f"mlflow-host: {error}", file=sys.stderr)
        return 2
    return 0


def take(
    repository: Repository,
    history: History,
    retention: timedelta,
    now: datetime,
    is_empty: Callable[[], bool],
    *,
    at_once: bool,
) -> str:
    """Back up if that is due, and say what was done. Raises BackupError."""
    stanza = stanza_of(repository.cluster)
    if stanza is None:
        raise BackupError(f"{repository.cluster} has no name for its history: it gets one when PostgreSQL starts")
    kind = wanted(history, stanza, retention, now, at_once=at_once)
    if kind is None:
        return "no base backup is due"
    note = [f"--annotation={EMPTY}=yes"] if is_empty() else []
    arguments = [*repository.running(), f"--type={kind}", *note, "backup"]
    done = repository.run(stanza.name, *arguments)
    if done.returncode and "stanza-create" in done.stdout:
        repository.create_stanza(stanza)
        done = repository.run(stanza.name, *arguments)
    if done.returncode:
        raise BackupError(f"the base backup failed: {last_line(done.stdout)}")
    made = repository.info(stanza.name)[0]["backup"][-1]
    full = made if made["type"] == "full" else {"label": made["label"].split("_")[0]}
    full_at = stamp(now) if made["type"] == "full" else history.read("base").get("full_at", stamp(now))
    content = {"at": stamp(now), "stanza": stanza.name, "label": made["label"], "full": full["label"]}
    history.write("base", {**content, "full_at": full_at, "bytes": made["info"]["size"]})
    return f"base backup {made['label']} of {made['info']['size'] >> 20} MiB"


def holds_nothing() -> bool:
    """Whether the database in service is as it was made: then its backups are not what somebody means by the latest.

    Raises BackupError when PostgreSQL does not answer."""
    cluster = Cluster(host=str(config.POSTGRESQL_SOCKETS))
    try:
        with connection(cluster, cluster.database) as opened:
            for table, limit in (("runs", 0), ("registered_models", 0), ("trace_info", 0), ("experiments", 1)):
                there = value(opened, "SELECT to_regclass(%s)::text", (f"public.{table}",))
                if there and value(opened, f"SELECT count(*) FROM (SELECT 1 FROM {table} LIMIT 2) few") > limit:
                    return False
    except psycopg2.Error as error:
        raise BackupError(f"the database could not be looked at: {str(error).strip()}") from None
    return True


def wanted(
    history: History, stanza: Stanza, retention: timedelta, now: datetime, *, at_once: bool = False
) -> str | None:
    """ "full", "diff", or None while none is due."""
    last: dict[str, Any] = history.read("base")
    gap = time_of(history.read("gap"))
    at = time_of(last)
    if at is None or last.get("stanza") != stanza.name or (gap and gap >= at):
        return "full"
    if not at_once and not is_due(at, now):
        return None
    full_at = time_of({"at": last.get("full_at")})
    return "diff" if full_at and now - full_at < min(FULL_EVERY, retention) else "full"


if __name__ == "__main__":
    raise SystemExit(main())
