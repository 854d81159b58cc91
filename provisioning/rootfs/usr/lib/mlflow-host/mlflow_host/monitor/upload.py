"""Timer `mlflow-host-audit`: compress the complete files of the audit trail, and upload them to the backups bucket.

Each upload has the header If-None-Match, so it cannot replace an object. The policy of the machine's role requires
If-None-Match for the audit trail's objects. If an upload fails, the next run of the timer repeats it.
"""

from __future__ import annotations

import gzip
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow_host.contract import audit_trail
from mlflow_host.machine import config
from mlflow_host.monitor import audit
from mlflow_host.monitor.run import STATE
from mlflow_host.postgres import dump_file, pgbackrest

LEVEL = 6


def main() -> int:
    spool = audit.Spool(STATE)
    if not spool.waiting():
        return 0
    document = config.load().launch
    bucket = pgbackrest.bucket(document)
    try:
        for key in send(spool, dump_file.s3_client(bucket), bucket.name, document.data_volume.id):
            print(f"added s3://{bucket.name}/{key}")
    except Exception as error:  # any error of boto3: the files are kept
        print(
            f"mlflow-host: {len(spool.waiting())} files of the audit trail are not in the backups bucket yet: {error}; "
            "check the bucket and the instance role's access to it",
            file=sys.stderr,
        )
        return 2
    return 0


def send(spool: audit.Spool, s3: Any, bucket: str, machine: str) -> list[str]:
    """Upload and delete all complete files. Returns the keys of the objects. Each key contains `machine`."""
    sent = []
    for path in spool.waiting():
        key = audit_trail.key(path.stem, machine)
        with suppress(FileNotFoundError):  # another run has sent it
            put(s3, bucket, key, path)
            path.unlink()
            sent.append(key)
    return sent


def put(s3: Any, bucket: str, key: str, path: Path) -> None:
    """Add an object. If the object exists, an earlier run added it, but was killed before it deleted the file."""
    with tempfile.TemporaryFile() as compressed:
        with path.open("rb") as plain, gzip.GzipFile(fileobj=compressed, mode="wb", compresslevel=LEVEL, mtime=0) as to:
            shutil.copyfileobj(plain, to)
        compressed.seek(0)
        try:
            s3.put_object(Bucket=bucket, Key=key, Body=compressed, IfNoneMatch="*", ContentType="application/gzip")
        except s3.exceptions.ClientError as error:
            if error.response["Error"]["Code"] != "PreconditionFailed":
                raise


if __name__ == "__main__":
    raise SystemExit(main())
