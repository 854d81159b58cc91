"""The dump to the backups bucket that comes before any change: pg_dump's custom format, streamed, never on disk."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, Any

from mlflow_host.backups.naming import DUMPS
from mlflow_host.schema.cluster import Cluster
from mlflow_host.schema.record import Record
from mlflow_host.schema.record import dump as dump_record


class DumpError(Exception):
    """One sentence: what went wrong with the dump, and what to do."""


@dataclass(frozen=True)
class Bucket:
    """Where dumps go; `endpoint` is for an S3-compatible store, "" for AWS itself, and `authority` a file with the
    certificate it is verified by, "" for the public ones."""

    name: str
    region: str
    endpoint: str = ""
    authority: str = ""


class _Output:
    """pg_dump's output as something boto3 can upload: reading to the end checks that pg_dump ended well, so that a
    dump that broke off is never completed in the bucket."""

    def __init__(self, process: subprocess.Popen[bytes], complaints: IO[bytes]):
        self._process, self._complaints = process, complaints
        self.bytes = 0

    def read(self, size: int = -1) -> bytes:
        assert self._process.stdout
        data = self._process.stdout.read(size)
        self.bytes += len(data)
        if (size < 0 or len(data) < size) and self._process.wait() != 0:
            self._complaints.seek(0)
            said = self._complaints.read().decode(errors="replace").strip().splitlines()
            raise DumpError(f"pg_dump ended with exit status {self._process.returncode}: {said[-1] if said else ''}")
        return data


def dump_command(cluster: Cluster, database: str) -> list[str]:
    """zstd where this pg_dump has it (16 and later), else gzip at its fastest: the outage waits for the dump."""
    program = cluster.program("pg_dump")
    version = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
    major = int(version.split()[2].split(".")[0])
    compress = "--compress=zstd:3" if major >= 16 else "--compress=1"
    return [program, "--format=custom", compress, *cluster.arguments, database]


def key(now: datetime, occasion: str, head: str | None) -> str:
    """What a dump is called in the bucket; `head` is that of the schema it holds."""
    return f"{DUMPS}{now.astimezone(UTC):%Y%m%dT%H%M%SZ}-{occasion}-{head}.dump"


def dump(cluster: Cluster, database: str, bucket: Bucket, key: str, metadata: dict[str, str]) -> str:
    """Stream a dump of `database` into the bucket; its s3:// address. Raises DumpError."""
    from boto3.s3.transfer import TransferConfig

    address = f"s3://{bucket.name}/{key}"
    parts = TransferConfig(multipart_chunksize=16 << 20, max_concurrency=4)
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(dump_command(cluster, database), stdout=subprocess.PIPE, stderr=complaints)
        try:
            output = _Output(process, complaints)
            client(bucket).upload_fileobj(output, bucket.name, key, ExtraArgs={"Metadata": metadata}, Config=parts)
        except DumpError:
            raise
        except Exception as error:
            raise DumpError(f"{address} could not be written: {type(error).__name__}: {error}") from error
        finally:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()
    return address


def load(cluster: Cluster, database: str, dump: IO[bytes]) -> None:
    """Restore a dump into an empty database; everything in it belongs to MLflow's role. Raises DumpError."""
    what = ["--no-owner", "--no-privileges", f"--role={cluster.owner}", "--single-transaction", f"--dbname={database}"]
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [cluster.program("pg_restore"), *cluster.arguments, *what],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=complaints,
        )
        try:
            assert process.stdin
            try:
                shutil.copyfileobj(dump, process.stdin, 1 << 20)
                process.stdin.close()
            except BrokenPipeError:
                pass  # its complaint says more
            if process.wait():
                complaints.seek(0)
                said = complaints.read().decode(errors="replace").strip().splitlines()
                raise DumpError(f"pg_restore does not take the dump: {said[0] if said else 'no reason given'}")
        finally:
            process.kill()
            process.wait()


def client(bucket: Bucket) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        s3={"addressing_style": "path" if bucket.endpoint else "auto"},
        retries={"mode": "standard", "max_attempts": 6},
        connect_timeout=5,
        read_timeout=60,
    )
    return boto3.client(
        "s3",
        region_name=bucket.region or None,
        endpoint_url=bucket.endpoint or None,
        verify=bucket.authority or None,
        config=config,
    )


def description(head: str | None, owner: Record | None, postgresql_major: int) -> dict[str, str]:
    """The metadata of a dump: whose schema it holds, which a restore gives the database back as its record."""
    said = {
        "head": head or "",
        "count": str(owner.count if owner else ""),
        "mlflow-version": owner.mlflow_version if owner else "",
        "image-version": owner.image_version if owner else "",
        "postgresql-major": str(postgresql_major),
    }
    whole = dump_record(owner) if owner else ""
    # S3 takes 2 KB of metadata in all.
    return {**said, "record": whole} if whole and len(whole) < 1500 and whole.isascii() else said


Dumper = Callable[[str, str, dict[str, str]], str]
"""(database, key, metadata) → address."""


def into(cluster: Cluster, bucket: Bucket) -> Dumper:
    return lambda database, key, metadata: dump(cluster, database, bucket, key, metadata)
