"""A PostgreSQL cluster of the tests' own: a data folder in a temporary directory, one Unix socket, no address."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg2
from mlflow_host.schema.cluster import Cluster, connection, run

PORT = 5432


def programs() -> Path:
    """The newest PostgreSQL installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    assert found, "no PostgreSQL under /usr/lib/postgresql: scripts/prepare.sh installs it"
    return found[-1]


@dataclass
class PrivateCluster:
    """Owns its folder and its server process."""

    folder: Path

    @property
    def cluster(self) -> Cluster:
        return Cluster(host=str(self.folder), port=PORT, user=_account().pw_name, programs=programs())

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def start(self) -> None:
        options = f"-k {self.folder} -p {PORT} -c listen_addresses='' -c max_connections=60 -c wal_level=replica"
        log = str(self.folder / "log")
        _as_account("pg_ctl", "-D", str(self.data), "-w", "-t", "60", "-l", log, "-o", options, "start")

    def stop(self) -> None:
        _as_account("pg_ctl", "-D", str(self.data), "-w", "-m", "immediate", "stop")

    def kill(self) -> None:
        """SIGKILL to the server and all its children, as the kernel would when memory runs out."""
        server = int((self.data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        for process in (server, *map(int, children)):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        while any(_alive(process) for process in (server, *map(int, children))):
            time.sleep(0.02)


def _alive(process: int) -> bool:
    """Not gone, and not a zombie that nobody has waited for."""
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def private_cluster() -> Iterator[PrivateCluster]:
    account = _account()
    folder = Path(tempfile.mkdtemp(prefix="mlflow-ami-pg-", dir="/tmp"))
    os.chown(folder, account.pw_uid, account.pw_gid)
    folder.chmod(0o755)
    owned = PrivateCluster(folder)
    try:
        _as_account("initdb", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync", "-D", str(owned.data))
        owned.start()
        with connection(owned.cluster, "postgres", autocommit=True) as opened:
            run(opened, "CREATE ROLE mlflow LOGIN")
        yield owned
    finally:
        subprocess.run(
            [programs() / "pg_ctl", "-D", owned.data, "-m", "immediate", "stop"], capture_output=True, **_identity()
        )
        shutil.rmtree(folder, ignore_errors=True)


def waits_for_server(cluster: Cluster, seconds: float = 30) -> None:
    ends = time.monotonic() + seconds
    while True:
        try:
            with connection(cluster):
                return
        except psycopg2.OperationalError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.1)


def _account() -> pwd.struct_passwd:
    """PostgreSQL refuses to run as root."""
    return pwd.getpwnam("postgres") if os.getuid() == 0 else pwd.getpwuid(os.getuid())


def _identity() -> dict[str, object]:
    account = _account()
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if os.getuid() == 0 else {}


def _as_account(program: str, *arguments: str) -> None:
    subprocess.run([programs() / program, *arguments], check=True, stdout=subprocess.DEVNULL, cwd="/", **_identity())
