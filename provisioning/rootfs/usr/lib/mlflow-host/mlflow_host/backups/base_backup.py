"""Timer: take base backups with pgBackRest, the first soon after the start of a new stanza, then one each night.

The timer runs every ten minutes and takes a backup if a backup is due. The first backup, the first backup after a gap
in the archived log, and one backup per week are full. All other backups are differential. After a backup, pgBackRest
deletes backups that are older than the retention.

    python -m mlflow_host.backups.base_backup            as the OS user postgres, while PostgreSQL runs
    python -m mlflow_host.backups.base_backup --now      take a backup even if none is due
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg2

from mlflow_host.backups.last_runs import LastRuns, is_due, stamp, time_of
from mlflow_host.machine import config
from mlflow_host.postgres.cluster import Cluster, connection, value
from mlflow_host.postgres.pgbackrest import (
    EMPTY_ANNOTATION,
    BackupError,
    Repository,
    Stanza,
    archives,
    last_line,
    stanza_of,
)

FULL_EVERY = timedelta(days=7)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mlflow_host.backups.base_backup", description=__doc__)
    parser.add_argument("--now", action="store_true", help="take a backup even if none is due")
    arguments = parser.parse_args()
    document = config.load().launch
    cluster = config.cluster()
    try:
        if not archives(document):
            raise BackupError(
                "no base backup: the endpoint of the backups bucket is http://, but pgBackRest needs https://"
            )
        retention = timedelta(days=document.backups.retention_days)
        print(take(Repository(cluster), LastRuns(), retention, datetime.now(UTC), is_empty, at_once=arguments.now))
    except (BackupError, OSError) as error:
        print(f"mlflow-host: {error}", file=sys.stderr)
        return 2
    return 0


def take(
    repository: Repository,
    history: LastRuns,
    retention: timedelta,
    now: datetime,
    has_no_data: Callable[[], bool],
    *,
    at_once: bool,
) -> str:
    """Take a base backup if one is due. Returns a sentence for the journal. Raises BackupError."""
    stanza = stanza_of(repository.cluster)
    if stanza is None:
        raise BackupError(f"{repository.cluster} has no stanza yet: the start of PostgreSQL creates it")
    kind = kind_due(history, stanza, retention, now, at_once=at_once)
    if kind is None:
        return "no base backup is due"
    note = [f"--annotation={EMPTY_ANNOTATION}=yes"] if has_no_data() else []
    arguments = [*repository.server_arguments(), f"--type={kind}", *note, "backup"]
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


def is_empty() -> bool:
    """Return True if the database in service contains no run, model, trace or experiment of a user. A restore of
    "latest" ignores backups without data.

    Raises BackupError if PostgreSQL does not answer."""
    cluster = Cluster(host=str(config.POSTGRESQL_SOCKETS))
    try:
        with connection(cluster, cluster.database) as opened:
            for table, limit in (("runs", 0), ("registered_models", 0), ("trace_info", 0), ("experiments", 1)):
                there = value(opened, "SELECT to_regclass(%s)::text", (f"public.{table}",))
                if there and value(opened, f"SELECT count(*) FROM (SELECT 1 FROM {table} LIMIT 2) few") > limit:
                    return False
    except psycopg2.Error as error:
        raise BackupError(f"the database could not be read: {str(error).strip()}") from None
    return True


def kind_due(
    history: LastRuns, stanza: Stanza, retention: timedelta, now: datetime, *, at_once: bool = False
) -> str | None:
    """The kind of base backup that is due now: "full" or "diff". None: no backup is due."""
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
