"""Permanently remove items that users deleted in MLflow more than deletedRetentionDays (the grace period) ago. Runs,
logged models and artifacts are kept if a registered model version uses them. Without --delete, only print a report.

    mlflow-host-gc                      report what would be removed
    mlflow-host-gc --delete             remove, as the weekly timer does
    mlflow-host-gc --older-than 0       use another grace period, in days
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

from mlflow_host.contract.launch import LaunchDocument
from mlflow_host.garbage import plan, removal, report
from mlflow_host.garbage.plan import Item, OwnBuckets
from mlflow_host.garbage.report import RemovalReport
from mlflow_host.machine import config
from mlflow_host.postgres import dump_file, ownership, pgbackrest
from mlflow_host.postgres.catalog import head
from mlflow_host.postgres.cluster import Cluster, connection, in_service, major
from mlflow_host.server import environment

FAILURES = 5
"""After this number of consecutive failures, the remaining items are left for the next garbage collection."""

MOST_DAYS = 3650
"""Maximum of --older-than. The setting deletedRetentionDays has the same maximum."""


@dataclass(frozen=True)
class CollectSettings:
    """The inputs of a garbage collection. Tests pass their own cluster and their own artifact store."""

    cluster: Cluster
    environment: dict[str, str]
    """The environment variables with which the server finds the artifacts."""
    buckets: OwnBuckets
    grace: timedelta
    reports: Path
    dump: dump_file.Dumper | None
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="mlflow-host-gc", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--delete", action="store_true", help="remove the items; without it nothing is changed")
    parser.add_argument(
        "--older-than", type=days, metavar="DAYS", help="grace period instead of the stack's deletedRetentionDays"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args()
    document = config.load().launch
    grace = arguments.older_than
    if grace is None:
        if document.mlflow.deleted_retention_days == 0:
            print("nothing is removed: deletedRetentionDays is 0, so deleted items are kept forever")
            return 0
        grace = timedelta(days=document.mlflow.deleted_retention_days)
    try:
        done = collect(from_machine(document, grace), delete=arguments.delete)
    except (removal.RemovalRefused, dump_file.DumpError, psycopg2.OperationalError) as error:
        print(f"mlflow-host: nothing was removed: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(report.as_mapping(done)) if arguments.json else report.as_text(done), end="\n" * arguments.json)
    if done.failed:
        print(f"mlflow-host: {done.summary()}", file=sys.stderr)
    return 2 if done.failed else 0


def days(text: str) -> timedelta:
    number = float(text)
    if not 0 <= number <= MOST_DAYS:
        raise argparse.ArgumentTypeError(f"must be 0 to {MOST_DAYS} days")
    return timedelta(days=number)


def from_machine(document: LaunchDocument, grace: timedelta) -> CollectSettings:
    cluster = in_service()
    return CollectSettings(
        cluster,
        environment.artifact_environment(document),
        OwnBuckets(frozenset({document.buckets.artifacts, document.buckets.models})),
        grace,
        config.DATA / "reports",
        dump_file.dumper_to(cluster, pgbackrest.bucket(document)),
    )


def collect(settings: CollectSettings, *, delete: bool) -> RemovalReport:
    """Plan the removal. With `delete`, also dump the database, remove the items and write the report. RemovalRefused,
    DumpError and OperationalError are raised only before the first removal. The report lists failed removals."""
    begun, now = time.monotonic(), settings.now()
    cluster = settings.cluster
    waiting = plan.waiting_versions(cluster)
    with connection(cluster, cluster.database) as opened:
        criteria = plan.read_criteria(opened, settings.buckets, now - settings.grace, waiting)
        items = plan.plan(opened, criteria)
    due, kept = [item for item in items if not item.kept], tuple(item for item in items if item.kept)
    made = RemovalReport(now, not delete, settings.grace / timedelta(days=1), tuple(due), kept)
    if not delete:
        return replace(made, seconds=time.monotonic() - begun)
    if due:
        with removal.remover(cluster, settings.environment, criteria, waiting) as remover:
            made = replace(made, dump=dump_database(settings, now))
            made = remove_items(made, remover)
    made = replace(made, seconds=time.monotonic() - begun)
    report.write(settings.reports, made)
    return made


def dump_database(settings: CollectSettings, now: datetime) -> str | None:
    """Dump the database and return the dump's s3:// address. Without a bucket, return None. Raises DumpError."""
    if settings.dump is None:
        return None
    cluster = settings.cluster
    with connection(cluster, cluster.database) as opened:
        owner, revision = ownership.read(opened, cluster.database), head(opened)
    described = dump_file.dump_metadata(revision, owner, major(cluster))
    return settings.dump(cluster.database, dump_file.dump_key(now, "gc", revision), described)


def remove_items(planned: RemovalReport, remover: removal.Remover) -> RemovalReport:
    """Remove each item in its own transaction. Stop after FAILURES consecutive failures."""
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
