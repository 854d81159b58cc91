"""Removes for good what users deleted through MLflow longer ago than the grace period (deletedRetentionDays), but no
run, logged model or artifact behind a registered version. Without --delete it only tells what it would remove.

    mlflow-host-gc                      a dry run
    mlflow-host-gc --delete             what the weekly timer does
    mlflow-host-gc --older-than 0       with another grace period, in days
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg2

from mlflow_host import config, server
from mlflow_host.backups import repository
from mlflow_host.garbage import plan, removal, report
from mlflow_host.garbage.plan import Item, Places
from mlflow_host.garbage.report import Report
from mlflow_host.launch import LaunchDocument
from mlflow_host.schema import dumping, record
from mlflow_host.schema.catalog import head
from mlflow_host.schema.cluster import Cluster, connection, major

FAILURES = 5

MOST_DAYS = 3650
"""As of the setting."""


@dataclass(frozen=True)
class Settings:
    """Everything a removal depends on, so that tests run it on a cluster and a store of their own."""

    cluster: Cluster
    environment: dict[str, str]
    """What the server is told of the artifacts."""
    places: Places
    grace: timedelta
    reports: Path
    dump: dumping.Dumper | None
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="mlflow-host-gc", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--delete", action="store_true", help="remove it; without this nothing is changed")
    parser.add_argument("--older-than", type=days, metavar="DAYS", help="instead of the stack's deletedRetentionDays")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    arguments = parser.parse_args()
    document = config.load().launch
    grace = arguments.older_than
    if grace is None:
        if document.mlflow.deleted_retention_days == 0:
            print("nothing is removed: deletedRetentionDays is 0, so what users deleted is kept for ever")
            return 0
        grace = timedelta(days=document.mlflow.deleted_retention_days)
    try:
        done = collect(from_machine(document, grace), delete=arguments.delete)
    except (removal.Refusal, dumping.DumpError, psycopg2.OperationalError) as error:
        print(f"mlflow-host: nothing was removed: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(report.as_mapping(done)) if arguments.json else report.as_text(done), end="\n" * arguments.json)
    if done.failed:
        print(f"mlflow-host: {done.summary()}", file=sys.stderr)
    return 2 if done.failed else 0


def days(text: str) -> timedelta:
    found = float(text)
    if not 0 <= found <= MOST_DAYS:
        raise argparse.ArgumentTypeError(f"must be 0 to {MOST_DAYS} days")
    return timedelta(days=found)


def from_machine(document: LaunchDocument, grace: timedelta) -> Settings:
    cluster = Cluster(host=str(config.POSTGRESQL_SOCKETS))
    return Settings(
        cluster,
        server.artifact_environment(document),
        Places(frozenset({document.buckets.artifacts, document.buckets.models})),
        grace,
        config.DATA / "reports",
        dumping.into(cluster, repository.bucket(document)),
    )


def collect(settings: Settings, *, delete: bool) -> Report:
    """Plan, and with `delete` dump, remove and report. Raises removal.Refusal, DumpError or OperationalError before
    anything was removed; what cannot be removed by itself is in the report."""
    begun, now = time.monotonic(), settings.now()
    cluster = settings.cluster
    waiting = plan.waiting_versions(cluster)
    with connection(cluster, cluster.database) as opened:
        found = plan.look(opened, settings.places, now - settings.grace, waiting)
        items = plan.plan(opened, found)
    due, kept = [item for item in items if not item.kept], tuple(item for item in items if item.kept)
    made = Report(now, not delete, settings.grace / timedelta(days=1), tuple(due), kept)
    if not delete:
        return replace(made, seconds=time.monotonic() - begun)
    if due:
        with removal.remover(cluster, settings.environment, found, waiting) as remover:
            made = replace(made, dump=dumped(settings, now))
            made = carried_out(made, remover)
    made = replace(made, seconds=time.monotonic() - begun)
    report.write(settings.reports, made)
    return made


def dumped(settings: Settings, now: datetime) -> str | None:
    """Where the database was dumped to. Raises DumpError."""
    if settings.dump is None:
        return None
    cluster = settings.cluster
    with connection(cluster, cluster.database) as opened:
        owner, revision = record.read(opened, cluster.database), head(opened)
    described = dumping.description(revision, owner, major(cluster))
    return settings.dump(cluster.database, dumping.key(now, "gc", revision), described)


def carried_out(planned: Report, remover: removal.Remover) -> Report:
    """Each by itself; after FAILURES in a row the rest is left for the next time."""
    removed: list[Item] = []
    kept, failed, in_a_row = list(planned.kept), [], 0
    for item in planned.removed:
        if in_a_row == FAILURES:
            failed.append(replace(item, kept=f"not tried after {FAILURES} failures in a row"))
            continue
        try:
            reason = remover.remove(item)
            in_a_row = 0
        except Exception as error:
            failed.append(removal.failed(item, error))
            in_a_row += 1
            continue
        kept += [replace(item, kept=reason)] if reason else []
        removed += [] if reason else [item]
    return replace(planned, removed=tuple(removed), kept=tuple(kept), failed=tuple(failed))


if __name__ == "__main__":
    raise SystemExit(main())
