"""pgBackRest's part: where its repository is, how it is called, and which stanza a cluster's backups go to.

A stanza holds one history. A cluster gets a name for its own when it is made, and another when it was restored, so
that what a restored cluster writes never meets what was written after the moment it was restored to.
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

from mlflow_host import config, durable
from mlflow_host.config import HostConfig
from mlflow_host.launch import LaunchDocument

if TYPE_CHECKING:
    from mlflow_host.schema.dumping import Bucket

SETTINGS = config.RUN / "pgbackrest.conf"
AUTHORITY = config.RUN / "backups-authority.pem"
RESTORE_ASKED = config.RUN / "restore"
"""There while the launch document asks for a restore, so that the step for it looks."""

FOLDER = "pgbackrest"
"""In the bucket."""

EMPTY = "empty"
"""What a base backup is annotated with that was taken before anything was logged."""

STANZA_FILE = "mlflow-host-stanza"
"""In the cluster's folder."""

_STANZA = re.compile(r"pg(?P<major>\d+)-(?P<system>\d+)-(?P<began>\d{8}T\d{6}Z)")


class BackupError(Exception):
    """One sentence: what went wrong with a backup, and what to do."""


@dataclass(frozen=True)
class Stanza:
    """A history of a cluster: PostgreSQL's major, its system identifier, and when the history began."""

    major: int
    system: int
    began: datetime

    @property
    def name(self) -> str:
        return f"pg{self.major}-{self.system}-{self.began:%Y%m%dT%H%M%SZ}"


def parse_stanza(name: str) -> Stanza | None:
    """None for a stanza that is none of ours."""
    found = _STANZA.fullmatch(name)
    if not found:
        return None
    began = datetime.strptime(found["began"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    return Stanza(int(found["major"]), int(found["system"]), began)


def stanza_of(cluster: Path) -> Stanza | None:
    """The history that a cluster is writing; None before it was given one."""
    try:
        return parse_stanza((cluster / STANZA_FILE).read_text().strip())
    except OSError:
        return None


def begin_history(cluster: Path, now: datetime) -> Stanza:
    """Give a cluster that is not running a history of its own from now on."""
    stanza = Stanza(int((cluster / "PG_VERSION").read_text()), system_identifier(cluster), now.replace(microsecond=0))
    durable.write(cluster / STANZA_FILE, f"{stanza.name}\n")
    return stanza


def system_identifier(cluster: Path) -> int:
    """What initdb drew for it: the first eight bytes of pg_control."""
    with (cluster / "global" / "pg_control").open("rb") as file:
        return int(struct.unpack("=Q", file.read(8))[0])


def address(document: LaunchDocument) -> str:
    """Where the backups bucket is asked for; "" for AWS's own address."""
    return document.backups.endpoint or document.endpoints.s3


def bucket(document: LaunchDocument) -> Bucket:
    """For what reads and writes the bucket itself."""
    from mlflow_host.schema.dumping import Bucket

    authority = str(AUTHORITY) if document.backups.authority else ""
    return Bucket(document.buckets.backups, document.stack.region, address(document), authority)


def archives(document: LaunchDocument) -> bool:
    """Whether pgBackRest can reach the bucket: the distributions' releases speak no plain HTTP."""
    return not address(document).startswith("http://")


def settings(host: HostConfig) -> str:
    """pgBackRest's configuration; everything that depends on the cluster is given on its command line."""
    from mlflow_host import web

    document = host.launch
    region = document.stack.region
    where = urlsplit(address(document))
    suffix = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    return web.render(
        "pgbackrest.conf.j2",
        web.TEMPLATES,
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
    """How pgBackRest is called for one cluster; `sockets` is where that cluster's PostgreSQL listens."""

    cluster: Path
    settings: Path = SETTINGS
    sockets: Path = config.POSTGRESQL_SOCKETS

    def command(self, stanza: str, *arguments: str) -> list[str]:
        return ["pgbackrest", f"--config={self.settings}", f"--stanza={stanza}", *arguments]

    def running(self) -> list[str]:
        """What commands that ask the running PostgreSQL are given."""
        return [f"--pg1-path={self.cluster}", f"--pg1-socket-path={self.sockets}", "--pg1-user=postgres"]

    def run(self, stanza: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(stanza, *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            # Where PostgreSQL works, which archive-push insists on.
            cwd=self.cluster,
        )

    def create_stanza(self, stanza: Stanza) -> None:
        """Idempotent, and refused while anything of the stanza is under way, so only for one that is missing.

        Raises BackupError."""
        for seconds in (0, 1, 2, 4, 8):
            time.sleep(seconds)
            done = self.run(stanza.name, *self.running(), "stanza-create")
            if not done.returncode:
                return
            if "unable to acquire lock" not in done.stdout:
                break
        raise BackupError(f"the stanza {stanza.name} could not be made: {last_line(done.stdout)}")

    def info(self, stanza: str | None = None) -> list[dict[str, Any]]:
        """Stanzas and their backups, as `pgbackrest info` tells. Raises BackupError."""
        command = ["pgbackrest", f"--config={self.settings}", "info", "--output=json"]
        done = subprocess.run(
            command if stanza is None else [*command, f"--stanza={stanza}"], capture_output=True, text=True, cwd="/"
        )
        if done.returncode:
            raise BackupError(f"the backups bucket could not be listed: {last_line(done.stdout + done.stderr)}")
        found: list[dict[str, Any]] = json.loads(done.stdout or "[]")
        return found


def last_line(output: str) -> str:
    """pgBackRest's own reason in what it printed, without time and process."""
    lines = [re.sub(r"^\S+ \S+ P\d+\s+", "", line).strip() for line in output.splitlines()]
    told = [line for line in lines if line.startswith(("ERROR", "WARN"))] or [line for line in lines if line]
    return told[0][:300] if told else "pgBackRest gives no reason"
