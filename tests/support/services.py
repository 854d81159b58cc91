"""Run parts of a machine on this host, for tests and benchmarks without an image: PostgreSQL, an object store and
MLflow's server processes. Each part has its own folder, listens on loopback or a Unix socket, and stops at the end of
its `with` block."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST_PACKAGE = Path(__file__).parents[2] / "provisioning/rootfs/usr/lib/mlflow-host"
START_SECONDS = 240
GIVEN_PORTS: set[int] = set()


@dataclass(frozen=True)
class ObjectStore:
    """SeaweedFS in place of S3."""

    endpoint: str
    access_key: str = "test-account"
    secret_key: str = "test-account-secret"
    authority: str | None = None
    """File with the authority's certificate, which clients use to verify the store's HTTPS certificate."""

    @property
    def environment(self) -> dict[str, str]:
        verified = {"AWS_CA_BUNDLE": self.authority} if self.authority else {}
        return verified | {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "MLFLOW_S3_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "eu-central-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="eu-central-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            verify=self.authority,
        )


@contextlib.contextmanager
def object_store(folder: Path, *, https: bool = False) -> Iterator[ObjectStore]:
    """Run an empty object store with its data below `folder`. The store serves HTTPS, like S3, or plain HTTP."""
    folder.mkdir(parents=True, exist_ok=True)
    port, encrypted = free_port(), []
    store = ObjectStore(f"http://127.0.0.1:{port}")
    if https:
        from mlflow_host.boot import private_ca

        shown = private_ca.ensure(("127.0.0.1",), folder / "certificates")
        store = ObjectStore(f"https://127.0.0.1:{(https_port := free_port())}", authority=str(shown.ca))
        encrypted = [f"-s3.port.https={https_port}", f"-s3.cert.file={shown.certificate}", f"-s3.key.file={shown.key}"]
    identities = folder / "identities.json"
    account = {"accessKey": store.access_key, "secretKey": store.secret_key}
    rights = ["Admin", "Read", "Write", "List", "Tagging"]
    identities.write_text(
        json.dumps({"identities": [{"name": "account", "credentials": [account], "actions": rights}]})
    )
    inner = {name: free_port() for name in ("master", "volume", "filer")}
    grpc = {name: free_port() for name in ("master", "volume", "filer", "s3")}
    command = [program("weed"), "-logtostderr=true", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [
        "-volume.max=10000",
        "-volume.preStopSeconds=0",
        "-master.volumeSizeLimitMB=1024",
        "-master.telemetry=false",
    ]
    command += [f"-{name}.port={port}" for name, port in inner.items()]
    command += [f"-{name}.port.grpc={port}" for name, port in grpc.items()]
    command += ["-filer", "-s3", f"-s3.port={port}", "-s3.ip.bind=127.0.0.1", f"-s3.config={identities}"]
    command += ["-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0", *encrypted]
    # Kill the store, because its data is not kept and an orderly stop takes 15 s.
    home = {**os.environ, "HOME": str(folder)}
    with process(command, folder / "log", stop=signal.SIGKILL, cwd=folder, env=home) as weed:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/healthz"), weed, folder / "log")
        yield store


@dataclass(frozen=True)
class PostgreSQL:
    """A PostgreSQL cluster that accepts all connections on its Unix socket."""

    sockets: Path
    port: int
    user: str = "postgres"

    def uri(self, database: str = "mlflow", *, tcp: bool = False) -> str:
        """Return a URI for SQLAlchemy, over the Unix socket, or over TCP with the password that `postgresql` sets."""
        if tcp:
            return f"postgresql+psycopg2://{self.user}:password@127.0.0.1:{self.port}/{database}"
        return f"postgresql+psycopg2://{self.user}@/{database}?host={self.sockets}&port={self.port}"

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        import psycopg2

        connection = psycopg2.connect(host=str(self.sockets), port=self.port, user=self.user, dbname=database)
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return list(cursor.fetchall()) if cursor.description else []
        finally:
            connection.close()


@contextlib.contextmanager
def postgresql(folder: Path, settings: Mapping[str, str | int] | None = None) -> Iterator[PostgreSQL]:
    """Run a new cluster below `folder` as an unprivileged user. The server listens on a Unix socket, and on
    loopback with a password."""
    bin_folder = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
    folder.mkdir(parents=True)
    as_user: list[str] = []
    if os.geteuid() == 0:
        account = pwd.getpwnam("postgres")
        os.chown(folder, account.pw_uid, account.pw_gid)
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        for parent in folder.parents:  # only one user can access pytest's folders
            if not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o011)
    data, password = folder / "data", folder / "password"
    password.write_text("password")
    password.chmod(0o644)
    initdb = [*as_user, str(bin_folder / "initdb"), "-U", "postgres", "-A", "trust", "--auth-host=scram-sha-256"]
    initdb += [f"--pwfile={password}", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync", "-D", str(data)]
    subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL)
    cluster = PostgreSQL(folder, free_port())
    chosen = {"listen_addresses": "127.0.0.1", "unix_socket_directories": str(folder), "port": cluster.port}
    options = [f"-c{name}={value}" for name, value in {**chosen, **(settings or {})}.items()]
    command = [*as_user, str(bin_folder / "postgres"), "-D", str(data), *options]
    with process(command, folder.parent / f"{folder.name}.log", stop=signal.SIGINT) as server:

        def ready() -> bool:
            try:
                return cluster.execute("select 1") == [(1,)]
            except Exception:
                return False

        wait_until(ready, server, folder.parent / f"{folder.name}.log")
        yield cluster


def create_schema(uri: str, python: str = sys.executable) -> None:
    """Let MLflow create its tables in an empty database, like the boot's database step."""
    code = (
        "from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as S; S(sys.argv[1], 'mlflow-artifacts:/')"
    )
    subprocess.run([python, "-W", "ignore", "-c", f"import sys; {code}", uri], check=True, stderr=subprocess.DEVNULL)


@dataclass(frozen=True)
class ServerProcess:
    socket: Path
    pid: int


@contextlib.contextmanager
def server_processes(
    folder: Path,
    environment: Mapping[str, str],
    count: int = 1,
    python: str = sys.executable,
    program: Sequence[str] = ("-m", "mlflow_host.server.process"),
) -> Iterator[list[ServerProcess]]:
    """Start `count` processes of mlflow_host.server.process, and yield when all respond. `program` contains Python's
    arguments before --socket."""
    folder.mkdir(parents=True, exist_ok=True)
    sockets = [folder / f"server-{number}.sock" for number in range(1, count + 1)]
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                process(
                    [python, *program, "--socket", str(uds)],
                    uds.with_suffix(".log"),
                    env={**os.environ, "PYTHONPATH": str(HOST_PACKAGE), **environment},
                )
            )
            for uds in sockets
        ]
        for uds, running in zip(sockets, started, strict=True):
            wait_until(uds.exists, running, uds.with_suffix(".log"))
        yield [ServerProcess(uds, running.pid) for uds, running in zip(sockets, started, strict=True)]


@contextlib.contextmanager
def on_loopback(uds: Path) -> Iterator[str]:
    """Yield a TCP URL that forwards to the server of a Unix socket, for clients that support only TCP."""
    listener = socket.create_server(("127.0.0.1", 0))

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(str(uds))
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=copy, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


@contextlib.contextmanager
def process(
    command: Sequence[str], log: Path, *, stop: signal.Signals = signal.SIGTERM, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process with its output in `log`. At the end, send the signal `stop`, and after 20 s SIGKILL."""
    with log.open("wb") as output:
        running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **options)
    try:
        yield running
    finally:
        running.send_signal(stop)
        try:
            running.wait(20)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def wait_until(condition: Callable[[], bool], running: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for `condition`. Raises RuntimeError with the end of `log` if the process ends or START_SECONDS pass."""
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if running.poll() is not None or time.monotonic() > deadline:
            end = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{running.args!r} did not start (exit status {running.returncode}): {end}")
        time.sleep(0.05)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def family(pid: int) -> list[int]:
    """Return the IDs of a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def free_port() -> int:
    """Return a free port that was not returned before. The port is below 32768, because the kernel could give a higher
    port to a connection before the server listens on the port."""
    while True:
        port = random.randrange(23_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            if port not in GIVEN_PORTS:
                probe.bind(("127.0.0.1", port))
                GIVEN_PORTS.add(port)
                return port


def program(name: str) -> str:
    """Return the path of a program in the folder of the current Python or on PATH. Raises RuntimeError if the program
    is in no such folder."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise RuntimeError(f"{name} is not installed: run `make prepare`")
    return found
