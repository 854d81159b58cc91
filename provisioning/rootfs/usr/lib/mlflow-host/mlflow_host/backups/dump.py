"""Dump the database to the backups bucket and print the dump's address. PostgreSQL of the same or a newer major version
can restore the dump without this image.

    mlflow-host-dump                  dump now
    mlflow-host-dump --if-due         dump if the nightly dump is due (the hourly timer uses this option)

After the dump, the command deletes dumps that are older than the retention, but never the newest dump.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from mlflow_host.backups.last_runs import LastRuns, is_due, stamp, time_of
from mlflow_host.contract.restore_request import DIGEST, DUMPS, is_dump
from mlflow_host.machine import config
from mlflow_host.postgres import dump_file, ownership, pgbackrest
from mlflow_host.postgres.catalog import head
from mlflow_host.postgres.cluster import Cluster, connection, in_service, major


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="mlflow-host-dump", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--if-due", action="store_true", help="only if the nightly dump is due")
    arguments = parser.parse_args()
    history, now = LastRuns(), datetime.now(UTC)
    occasion = "nightly" if arguments.if_due else "manual"
    if arguments.if_due and not is_due(time_of(history.read("dump")), now):
        print("no dump is due")
        return 0
    document = config.load().launch
    cluster = in_service()
    try:
        print(f"dumped to {take(cluster, pgbackrest.bucket(document), history, now, occasion)}")
        expire(pgbackrest.bucket(document), timedelta(days=document.backups.retention_days), now)
    except Exception as error:
        print(f"mlflow-host: the dump failed: {error}", file=sys.stderr)
        if isinstance(error, dump_file.DumpError):
            return 2
        raise
    return 0


def take(cluster: Cluster, bucket: dump_file.Bucket, history: LastRuns, now: datetime, occasion: str) -> str:
    """Dump the database, and return the dump's s3:// address. The dump's name contains `occasion` ("nightly",
    "manual"). Raises DumpError."""
    with connection(cluster, cluster.database) as opened:
        owner, revision = ownership.read(opened, cluster.database), head(opened)
    key = dump_file.dump_key(now, occasion, revision)
    address = dump_file.dump(
        cluster, cluster.database, bucket, key, dump_file.dump_metadata(revision, owner, major(cluster))
    )
    history.write("dump", {"at": stamp(now), "address": address})
    return address


def expire(bucket: dump_file.Bucket, retention: timedelta, now: datetime) -> list[str]:
    """Delete this stack's dumps that are older than `retention`, and the digests of these dumps. Return the keys of the
    deleted dumps. After the deletion, the bucket keeps the old versions of the objects for another retention time."""
    client = dump_file.s3_client(bucket)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket.name, Prefix=DUMPS)
    found = [(each["LastModified"], each["Key"]) for page in pages for each in page.get("Contents", ())]
    found = [(at, key) for at, key in found if is_dump(key)]
    outdated = beyond(found, retention, now)
    for key in outdated:
        for each in (key, key + DIGEST):
            client.delete_object(Bucket=bucket.name, Key=each)
    return outdated


def beyond(found: Iterable[tuple[Any, str]], retention: timedelta, now: datetime) -> list[str]:
    """The keys of all dumps that are older than `retention`. The newest dump is never included."""
    return [key for at, key in sorted(found)[:-1] if now - at > retention]


if __name__ == "__main__":
    raise SystemExit(main())
