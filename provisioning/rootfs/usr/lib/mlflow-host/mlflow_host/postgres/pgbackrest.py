"""Configure pgBackRest, call pgBackRest, and name the stanza of a cluster's backups.

A stanza has the base backups and the write-ahead log of one cluster. Each new cluster gets a new stanza. A restored
cluster also gets a new stanza, because its write-ahead log must not mix with the later write-ahead log of the original
cluster.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mlflow_host.contract.launch import LaunchDocument
from mlflow_host.machine import atomic_file, config
from mlflow_host.machine.config import HostConfig

if TYPE_CHECKING:
    from mlflow_host.postgres.dump_file import Bucket

SETTINGS = config.RUN / "pgbackrest.conf"
AUTHORITY = config.RUN / "backups-authority.pem"
RESTORE_ASKED = config.RUN / "restore"
"""This file exists if the launch document sets restore_from, and makes systemd run the boot step `restore`."""

FOLDER = "pgbackrest"
"""Prefix of pgBackRest's repository in the bucket."""

EMPTY_ANNOTATION = "empty"
"""The key of the pgBackRest annotation that marks a base backup without users' data."""

STANZA_FILE = "mlflow-host-stanza"
"""Name of the file with the stanza's name. The file is in the cluster's folder."""

_STANZA = re.compile(r"pg(?P<major>\d+)-(?P<system>\d+)-(?P<began>\d{8}T\d{6}Z)")


class BackupError(Exception):
    """A backup or a restore failed. The message is one sentence with the reason and the remedy."""


@dataclass(frozen=True)
class Stanza:
    """A cluster's stanza: PostgreSQL's major version, the cluster's system identifier, and the time when the stanza
    began."""

    major: int
    system: int
    began: datetime

    @property
    def name(self) -> str:
        return f"pg{self.major}-{self.system}-{self.began:%Y%m%dT%H%M%SZ}"


def parse_stanza(name: str) -> Stanza | None:
    """Parse a stanza's name. Returns None if the name does not have the format of `Stanza.name`."""
    found = _STANZA.fullmatch(name)
    if not found:
        return None
    began = datetime.strptime(found["began"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    return Stanza(int(found["major"]), int(found["system"]), began)


def stanza_of(cluster: Path) -> Stanza | None:
    """Return the stanza to which a cluster archives its write-ahead log, or None if the cluster has no stanza yet."""
    try:
        return parse_stanza((cluster / STANZA_FILE).read_text().strip())
    except OSError:
        return None


def start_stanza(cluster: Path, now: datetime) -> Stanza:
    """Name a new stanza for a stopped cluster, and write the name to STANZA_FILE."""
    stanza = Stanza(int((cluster / "PG_VERSION").read_text()), system_identifier(cluster), now.replace(microsecond=0))
    atomic_file.write(cluster / STANZA_FILE, f"{stanza.name}\n")
    return stanza


def system_identifier(cluster: Path) -> int:
    """The cluster's system identifier: the first eight bytes of pg_control. initdb creates the identifier."""
    with (cluster / "global" / "pg_control").open("rb") as file:
        return int(struct.unpack("=Q", file.read(8))[0])


def s3_endpoint(document: LaunchDocument) -> str:
    """S3 endpoint of the backups bucket, or "" for AWS's public endpoint."""
    return document.backups.endpoint or document.endpoints.s3


def bucket(document: LaunchDocument) -> Bucket:
    """The backups bucket in the form that `dump_file` needs."""
    from mlflow_host.postgres.dump_file import Bucket

    authority = str(AUTHORITY) if document.backups.authority else ""
    return Bucket(document.buckets.backups, document.stack.region, s3_endpoint(document), authority)


def archives(document: LaunchDocument) -> bool:
    """Whether pgBackRest can use the bucket. pgBackRest in Debian and Ubuntu does not support plain HTTP."""
    return not s3_endpoint(document).startswith("http://")


def settings(host: HostConfig) -> str:
    """pgBackRest's configuration file. Options that depend on the cluster are passed on the command line."""
    from mlflow_host.machine import nginx

    document = host.launch
    region = document.stack.region
    where = urlsplit(s3_endpoint(document))
    suffix = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    return nginx.render(
        "pgbackrest.conf.j2",
        nginx.TEMPLATES,
        folder=FOLDER,
        bucket=document.buckets.backups,
        region=region,
        endpoint=where.hostname or f"s3.{region}.{suffix}",
        port=where.port,
        path_style=bool(where.hostname),
        authority=AUTHORITY if document.backups.authority else None,
        retention_days=document.backups.retention_days,
        processes=2 if host.sizing.cores > 1 else 1,
    )


@dataclass(frozen=True)
class Repository:
    """Calls pgBackRest for one cluster. `sockets` is the folder with the socket of the cluster's PostgreSQL."""

    cluster: Path
    settings: Path = SETTINGS
    sockets: Path = config.POSTGRESQL_SOCKETS

    def command(self, stanza: str, *arguments: str) -> list[str]:
        return ["pgbackrest", f"--config={self.settings}", f"--stanza={stanza}", *arguments]

    def server_arguments(self) -> list[str]:
        """Options for pgBackRest commands that connect to the running PostgreSQL."""
        return [f"--pg1-path={self.cluster}", f"--pg1-socket-path={self.sockets}", "--pg1-user=postgres"]

    def run(self, stanza: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(stanza, *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            # archive-push requires PostgreSQL's working directory.
            cwd=self.cluster,
        )

    def create_stanza(self, stanza: Stanza) -> None:
        """Create the stanza if it is missing. While another command holds the stanza's lock, pgBackRest fails, and this
        method repeats the command for some seconds. Raises BackupError."""
        for seconds in (0, 1, 2, 4, 8):
            time.sleep(seconds)
            done = self.run(stanza.name, *self.server_arguments(), "stanza-create")
            if not done.returncode:
                return
            if "unable to acquire lock" not in done.stdout:
                break
        raise BackupError(f"the stanza {stanza.name} could not be created: {last_line(done.stdout)}")

    def info(self, stanza: str | None = None) -> list[dict[str, Any]]:
        """The output of `pgbackrest info`, which lists stanzas and their backups. Raises BackupError."""
        command = ["pgbackrest", f"--config={self.settings}", "info", "--output=json"]
        command += [] if stanza is None else [f"--stanza={stanza}"]
        for _ in range(2):  # the first attempt may fail at boot, while AWS attaches the Elastic IP
            done = subprocess.run(command, capture_output=True, text=True, cwd="/")
            if not done.returncode:
                break
        else:
            raise BackupError(f"the backups bucket could not be listed: {last_line(done.stdout + done.stderr)}")
        found: list[dict[str, Any]] = json.loads(done.stdout or "[]")
        return found


def last_line(output: str) -> str:
    """The first error or warning in pgBackRest's output, without the timestamp and the process number."""
    lines = [re.sub(r"^\S+ \S+ P\d+\s+", "", line).strip() for line in output.splitlines()]
    reasons = [line for line in lines if line.startswith(("ERROR", "WARN"))] or [line for line in lines if line]
    return reasons[0][:300] if reasons else "pgBackRest gives no reason"
