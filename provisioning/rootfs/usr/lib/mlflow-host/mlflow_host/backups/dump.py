"""The nightly dump to the backups bucket: what any PostgreSQL, or a person, can read without this image.

Run every hour, it looks whether one is due; afterwards dumps older than the retention go, but never the newest.

    python -m mlflow_host.backups.dump            as the OS user postgres, PostgreSQL running
    python -m mlflow_host.backups.dump --now      whether due or not
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from mlflow_host import config
from mlflow_host.backups import repository
from mlflow_host.backups.history import History, is_due, stamp, time_of
from mlflow_host.backups.naming import DUMPS
from mlflow_host.schema import dumping, record
from mlflow_host.schema.catalog import head
from mlflow_host.schema.cluster import Cluster, connection, major


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mlflow_host.backups.dump", description=__doc__)
    parser.add_argument("--now", action="store_true", help="take one whether one is due or not")
    arguments = parser.parse_args()
    history, now = History(), datetime.now(UTC)
    if not arguments.now and not is_due(time_of(history.read("dump")), now):
        print("no dump is due")
        return 0
    document = config.load().launch
    cluster = Cluster(host=str(config.POSTGRESQL_SOCKETS))
    try:
        print(f"dumped to {take(cluster, repository.bucket(document), history, now)}")
        expire(repository.bucket(document), timedelta(days=document.backups.retention_days), now)
    except Exception as error:
        print(f"mlflow-host: the dump failed: {error}", file=sys.stderr)
        if isinstance(error, dumping.DumpError):
            return 2
        raise
    return 0


def take(cluster: Cluster, bucket: dumping.Bucket, history: History, now: datetime) -> str:
    """Where the dump is. Raises DumpError."""
    with connection(cluster, cluster.database) as opened:
        owner, revision = record.read(opened, cluster.database), head(opened)
    key = dumping.key(now, "nightly", revision)
    address = dumping.dump(cluster, cluster.database, bucket, key, dumping.description(revision, owner, major(cluster)))
    history.write("dump", {"at": stamp(now), "address": address})
    return address


def expire(bucket: dumping.Bucket, retention: timedelta, now: datetime) -> list[str]:
    """Hide dumps that are older than `retention`; the bucket keeps their versions for as long again."""
    client = dumping.client(bucket)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket.name, Prefix=DUMPS)
    found = [(each["LastModified"], each["Key"]) for page in pages for each in page.get("Contents", ())]
    outdated = beyond(found, retention, now)
    for key in outdated:
        client.delete_object(Bucket=bucket.name, Key=key)
    return outdated


def beyond(found: Iterable[tuple[Any, str]], retention: timedelta, now: datetime) -> list[str]:
    """Those older than `retention`, but never the newest of all."""
    return [key for at, key in sorted(found)[:-1] if now - at > retention]


if __name__ == "__main__":
    raise SystemExit(main())
