"""A temporary PostgreSQL cluster for tests, in a temporary directory. The server listens only on a Unix socket, unless
`rds_like` adds TCP."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import psycopg2

from mlflow_host.postgres.cluster import Cluster, connection, run

PORT = 5432


def programs() -> Path:
    """The newest PostgreSQL installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    assert found, "no PostgreSQL under /usr/lib/postgresql: scripts/prepare.sh installs it"
    return found[-1]


class Identity(TypedDict, total=False):
    """Options of `subprocess` that set the account of a child process, or no options if this process is not root."""

    user: int
    group: int
    extra_groups: list[int]


@dataclass
class PrivateCluster:
    """A temporary cluster that owns its folder and its server process."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    """PostgreSQL's settings that differ from those in `start`."""
    remote: Cluster | None = None
    """The login over TCP without superuser, if the server is like Amazon RDS."""

    @property
    def cluster(self) -> Cluster:
        """The login of the code under test."""
        return self.remote or self.superuser

    @property
    def superuser(self) -> Cluster:
        user = "rdsadmin" if self.remote else _account().pw_name
        return Cluster(host=str(self.folder), port=self.port, user=user, programs=programs())

    @property
    def port(self) -> int:
        return self.remote.port if self.remote else PORT

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def start(self) -> None:
        """Start the server as a child of this process, so that this process can reap it. PostgreSQL does not start
        while the process of the previous server is a zombie."""
        options = {"unix_socket_directories": self.folder, "port": self.port, "listen_addresses": ""}
        options |= {"max_connections": 60, "wal_level": "replica", **self.settings}
        arguments = [f"-c{name}={chosen}" for name, chosen in options.items()]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [programs() / "postgres", "-D", self.data, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                **_identity(),
            )
        self._wait_until_it_answers(self.process)

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
        ends = time.monotonic() + seconds
        while True:
            try:
                with connection(self.superuser):
                    return
            except psycopg2.OperationalError:
                said = self.log.read_text()[-2000:]
                assert process.poll() is None, f"PostgreSQL ended with exit status {process.returncode}: {said}"
                assert time.monotonic() < ends, f"PostgreSQL does not answer after {seconds} s: {said}"
            time.sleep(0.05)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def stop(self) -> None:
        """Stop the server with an immediate shutdown. The next start performs crash recovery."""
        if self.process:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(60)

    def kill(self) -> None:
        """Send SIGKILL to the server and then to its children. systemd does this after an out-of-memory kill."""
        assert self.process
        server = self.process.pid
        children = [int(child) for child in Path(f"/proc/{server}/task/{server}/children").read_text().split()]
        for process in (server, *children):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()
        while any(alive(process) for process in children):
            time.sleep(0.02)


def alive(process: int) -> bool:
    """Return whether the process exists and is not a zombie."""
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def private_cluster(mebibytes: int | None = None) -> Iterator[PrivateCluster]:
    """Yield a new cluster. If `mebibytes` is given, the cluster is on a tmpfs of `mebibytes` MiB, which needs root."""
    folder = temporary_folder()
    if mebibytes:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", folder], check=True)
        give_to_account(folder)
    owned = PrivateCluster(folder)
    try:
        initdb(owned)
        owned.start()
        with connection(owned.cluster, "postgres", autocommit=True) as opened:
            run(opened, "CREATE ROLE mlflow LOGIN")
        yield owned
    finally:
        owned.stop()
        if mebibytes:
            subprocess.run(["umount", "--lazy", folder], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def temporary_folder() -> Path:
    """Create a folder for a cluster, which the account of PostgreSQL owns."""
    folder = Path(tempfile.mkdtemp(prefix="mlflow-ami-pg-", dir="/tmp"))
    give_to_account(folder)
    folder.chmod(0o755)
    return folder


def give_to_account(path: Path) -> None:
    account = _account()
    os.chown(path, account.pw_uid, account.pw_gid)


def initdb(owned: PrivateCluster, *options: str) -> None:
    fixed = ("--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync", "-D", str(owned.data))
    command: list[str | Path] = [programs() / "initdb", *fixed, *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", **_identity())


def _account() -> pwd.struct_passwd:
    """Return the account that runs PostgreSQL, because PostgreSQL refuses to run as root."""
    return pwd.getpwnam("postgres") if os.getuid() == 0 else pwd.getpwuid(os.getuid())


def _identity() -> Identity:
    account = _account()
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if os.getuid() == 0 else {}
