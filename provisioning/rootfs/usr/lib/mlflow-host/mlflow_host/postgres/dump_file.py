"""Stream a dump of a database to the backups bucket, without a file on disk, and load a dump from the bucket."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import IO, Any

from mlflow_host.contract.restore_request import DIGEST, DUMPS
from mlflow_host.postgres.cluster import Cluster, password_file
from mlflow_host.postgres.ownership import OwnershipRecord
from mlflow_host.postgres.ownership import dump as dump_record

READ_SECONDS = 30
"""Read timeout of S3 requests. When AWS attaches the Elastic IP, existing connections receive no reset and hang. boto3
repeats the request after this timeout."""


class DumpError(Exception):
    """A dump failed. The message is one sentence with the reason."""


@dataclass(frozen=True)
class Bucket:
    """The bucket for dumps. `endpoint` is the address of an S3-compatible store, or "" for AWS. `ca_file` is the PEM
    file of the authority that signed the store's certificate, or "" for public authorities."""

    name: str
    region: str
    endpoint: str = ""
    ca_file: str = ""


class _CheckedOutput:
    """pg_dump's output as a file object for boto3. At the end of the output, `read` raises DumpError if pg_dump's exit
    status is not 0. Therefore an incomplete dump never becomes an object in the bucket."""

    def __init__(self, process: subprocess.Popen[bytes], stderr: IO[bytes]):
        self._process, self._stderr = process, stderr
        self.sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        assert self._process.stdout
        data = self._process.stdout.read(size)
        self.sha256.update(data)
        if (size < 0 or len(data) < size) and self._process.wait() != 0:
            self._stderr.seek(0)
            lines = self._stderr.read().decode(errors="replace").strip().splitlines()
            raise DumpError(f"pg_dump ended with exit status {self._process.returncode}: {lines[-1] if lines else ''}")
        return data


def dump_command(cluster: Cluster, database: str, passfile: str = "") -> list[str]:
    """The pg_dump command with the fastest compression: zstd for pg_dump 16 and later, else gzip -1. A fast dump makes
    the outage short. `passfile` is the path of a password file."""
    program = cluster.program("pg_dump")
    version = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
    major = int(version.split()[2].split(".")[0])
    compress = "--compress=zstd:3" if major >= 16 else "--compress=1"
    return [program, "--format=custom", compress, *cluster.client_arguments(database, passfile)]


def dump_key(now: datetime, occasion: str, head: str | None) -> str:
    """Object key of a dump in the bucket. `head` is the migration head of the dumped database."""
    return f"{DUMPS}{now.astimezone(UTC):%Y%m%dT%H%M%SZ}-{occasion}-{head}.dump"


def dump(cluster: Cluster, database: str, bucket: Bucket, key: str, metadata: dict[str, str]) -> str:
    """Stream a dump of `database` into the bucket, and return the dump's s3:// address. Raises DumpError.

    A second object has the dump's digest. The IAM role of MLflow's processes cannot access dumps and their digests."""
    from boto3.s3.transfer import TransferConfig

    address = f"s3://{bucket.name}/{key}"
    parts = TransferConfig(multipart_chunksize=16 << 20, max_concurrency=4)
    with tempfile.TemporaryFile() as stderr, password_file(cluster) as login:
        process = subprocess.Popen(
            dump_command(cluster, database, login.path),
            stdout=subprocess.PIPE,
            stderr=stderr,
            pass_fds=login.descriptors,
        )
        try:
            output = _CheckedOutput(process, stderr)
            s3_client(bucket).upload_fileobj(output, bucket.name, key, ExtraArgs={"Metadata": metadata}, Config=parts)
            digest = f"{output.sha256.hexdigest()}  {key.rpartition('/')[2]}\n"
            s3_client(bucket).put_object(Bucket=bucket.name, Key=key + DIGEST, Body=digest.encode())
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


def fetch(bucket: Bucket, key: str, file: IO[bytes], *, recorded: bool = True) -> dict[str, str]:
    """Download a dump to `file`, and return the dump's metadata. If a connection breaks, boto3 repeats a part of the
    file.

    Raises DumpError if the content does not have the recorded digest, unless `recorded` is False."""
    from_bucket = s3_client(bucket)
    from_bucket.download_fileobj(bucket.name, key, file)
    if recorded:
        written = from_bucket.get_object(Bucket=bucket.name, Key=key + DIGEST)["Body"].read(200).decode().split()
        found = digest_of(file)
        if written[:1] != [found]:
            raise DumpError(
                f"{key} does not match its digest: its SHA-256 digest is {found}, but {key}{DIGEST} has "
                f"{' '.join(written)[:80] or 'none'}: restore another backup"
            )
    file.seek(0)
    return dict(from_bucket.head_object(Bucket=bucket.name, Key=key)["Metadata"])


def digest_of(file: IO[bytes]) -> str:
    """SHA-256 digest of the whole file, in hexadecimal."""
    file.seek(0)
    found = hashlib.sha256()
    while data := file.read(1 << 20):
        found.update(data)
    return found.hexdigest()


def load(cluster: Cluster, database: str, dump: IO[bytes]) -> None:
    """Restore a dump into an empty database. MLflow's role owns the restored objects. Raises DumpError.

    A dump consists of SQL statements, so pg_restore connects as MLflow's role and not as a superuser. If a superuser
    only changed to MLflow's role (SET ROLE), a statement in the dump could reset the role and run any program."""
    options = ["--no-owner", "--no-privileges", "--single-transaction"]
    as_owner = replace(cluster, user=cluster.owner)
    with tempfile.TemporaryFile() as stderr, password_file(as_owner) as login:
        process = subprocess.Popen(
            [cluster.program("pg_restore"), *as_owner.client_arguments(database, login.path), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=login.descriptors,
        )
        try:
            assert process.stdin
            try:
                shutil.copyfileobj(dump, process.stdin, 1 << 20)
                process.stdin.close()
            except BrokenPipeError:
                pass  # the code below reads the reason from pg_restore's output
            if process.wait():
                stderr.seek(0)
                lines = stderr.read().decode(errors="replace").strip().splitlines()
                raise DumpError(f"pg_restore rejected the dump: {lines[0] if lines else 'no reason given'}")
        finally:
            process.kill()
            process.wait()


def s3_client(bucket: Bucket) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        s3={"addressing_style": "path" if bucket.endpoint else "auto"},
        retries={"mode": "standard", "max_attempts": 6},
        connect_timeout=5,
        read_timeout=READ_SECONDS,
    )
    return boto3.client(
        "s3",
        region_name=bucket.region or None,
        endpoint_url=bucket.endpoint or None,
        verify=bucket.ca_file or None,
        config=config,
    )


def dump_metadata(head: str | None, owner: OwnershipRecord | None, postgresql_major: int) -> dict[str, str]:
    """Metadata of a dump in the bucket: the MLflow release of the schema, which a restore needs for the ownership
    record."""
    metadata = {
        "head": head or "",
        "count": str(owner.count if owner else ""),
        "mlflow-version": owner.mlflow_version if owner else "",
        "image-version": owner.image_version if owner else "",
        "postgresql-major": str(postgresql_major),
    }
    record = dump_record(owner) if owner else ""
    # S3 limits the metadata of an object to 2 KB.
    return {**metadata, "record": record} if record and len(record) < 1500 and record.isascii() else metadata


Dumper = Callable[[str, str, dict[str, str]], str]
"""Dumps a database to an object key with metadata, and returns the dump's s3:// address."""


def dumper_to(cluster: Cluster, bucket: Bucket) -> Dumper:
    return lambda database, key, metadata: dump(cluster, database, bucket, key, metadata)
