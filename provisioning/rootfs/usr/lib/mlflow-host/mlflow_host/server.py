"""MLflow's server, one process per Unix socket: MLflow's own ASGI application, run by uvicorn without a parent.

    python -m mlflow_host.server 1         process 1, on /run/mlflow/server-1.sock
    python -m mlflow_host.server --check   what the bake asserts about the installed MLflow

`mlflow server` would start the same application, with a parent process, a job runner and worker processes that share
one socket. It tells them what to serve in variables that are MLflow's private business, so those are named in one
place here (`private_environment`) and compared with what the installed `mlflow server` does when the image is baked:
a release that changes them fails the bake, not the boot.

A process listens only once it has answered a query through PostgreSQL, and it never changes a schema: that is the
work of the database step.
"""

from __future__ import annotations

import argparse
import base64
import gc
import hmac
import importlib
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from mlflow_host import answers, jobs, received, sessions
from mlflow_host.bridge import Application, Message, Receive, Scope, Send, short_cut
from mlflow_host.config import CONFIG, DATA, POSTGRESQL_SOCKETS, SERVER_SOCKETS, HostConfig
from mlflow_host.files import streamed
from mlflow_host.launch import LaunchDocument
from mlflow_host.status import wait_until_done
from mlflow_host.tracking import not_compared

APPLICATION = "mlflow.server.fastapi_app:app"
FLASK_APPLICATION = "mlflow.server:app"

KEEP_ALIVE_SECONDS = 300
"""Longer than nginx keeps an idle upstream connection, so that nginx never reuses one that is being closed."""

GRACE_SECONDS = 20
"""What running requests get to finish in when the process is stopped."""

COLLECT_AFTER = (50_000, 50, 50)
"""Thresholds of the garbage collector. Python's own (700, 10, 10) cost searches in large experiments a third."""

DEFAULT_THREADS = 16
"""Requests that one process works on at once, where the environment does not tell (MLFLOW_HOST_REQUEST_THREADS)."""


class Refusal(Exception):
    """One sentence to the person who can fix it: what is wrong, the value, the remedy."""


def environment(config: HostConfig, kek_passphrase: str) -> dict[str, str]:
    """Everything a server process of this machine is told, secrets included: the content of mlflow.env.

    `kek_passphrase` encrypts what the AI gateway stores, and a key made of it the secrets of webhooks; it must survive
    the machine, or those secrets are lost.
    """
    launch, sizing = config.launch, config.sizing
    return {
        "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg2:///mlflow?host={POSTGRESQL_SOCKETS}",
        **artifact_environment(launch),
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(
            allowed_hosts(launch.web.hostnames, launch.web.tls)
            + ([jobs.LOCAL_HOSTS] if launch.mlflow.job_execution else [])
        ),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(allowed_origins(launch.web.hostnames, launch.web.tls)),
        "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": str(sizing.pool_size),
        "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": str(sizing.pool_overflow),
        "MLFLOW_HOST_REQUEST_THREADS": str(sizing.request_threads),
        "MLFLOW_CRYPTO_KEK_PASSPHRASE": kek_passphrase,
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": webhook_key(kek_passphrase),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "true" if launch.mlflow.job_execution else "false",
        # Two processes beside the server's in place of eight; releases before 3.17 do not know it.
        "MLFLOW_SERVER_JOB_EXECUTION_ENGINE": "executor",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        # One address for a whole download: clients fetch a large file in many ranges with it.
        "MLFLOW_PRESIGNED_DOWNLOAD_URL_TTL_SECONDS": "3600",
        "TMPDIR": str(DATA / "tmp"),
        # Threads that come and go would otherwise leave one malloc arena each behind.
        "MALLOC_ARENA_MAX": "2",
    }


def artifact_environment(launch: LaunchDocument) -> dict[str, str]:
    """The part of it that says where artifacts are; nothing secret."""
    variables = {
        "MLFLOW_ARTIFACTS_DESTINATION": artifacts_destination(
            launch.buckets.artifacts, launch.buckets.models, launch.mlflow.artifact_transfer
        ),
        "AWS_REGION": launch.stack.region,
        "AWS_DEFAULT_REGION": launch.stack.region,
    }
    if launch.endpoints.s3:
        variables |= {
            "AWS_ENDPOINT_URL_S3": launch.endpoints.s3,
            "MLFLOW_S3_ENDPOINT_URL": launch.endpoints.s3,
            "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE": "path",
        }
    return variables


def webhook_key(kek_passphrase: str) -> str:
    """A Fernet key that is the same on every machine of the stack. Without one each process of MLflow makes up its own,
    and webhooks with a secret cannot even be listed by the next."""
    derived = hmac.digest(kek_passphrase.encode(), b"mlflow-host: secrets of webhooks", "sha256")
    return base64.urlsafe_b64encode(derived).decode()


def artifacts_destination(artifacts: str, models: str, transfer: str) -> str:
    """The URI that `mlflow_host.artifacts` serves. `transfer` is "direct" or "proxied": whether clients are offered
    presigned addresses is a property of the class that MLflow finds for the scheme."""
    scheme = {"direct": "mlflow-host", "proxied": "mlflow-host-proxied"}[transfer]
    return f"{scheme}://{artifacts}/{models}"


def allowed_hosts(hostnames: tuple[str, ...], tls: str) -> list[str]:
    """Values of the Host header that MLflow answers: what the stack serves, with and without the port, and localhost
    for checks on the machine itself, which no page from elsewhere can make a browser send here."""
    port = 80 if tls == "off" else 443
    hosts = [bracketed(name) for name in hostnames]
    return [*hosts, *(f"{host}:{port}" for host in hosts), "localhost"]


def allowed_origins(hostnames: tuple[str, ...], tls: str) -> list[str]:
    """Origins that MLflow's own pages have; with TLS only the encrypted ones."""
    scheme = "http" if tls == "off" else "https"
    return [f"{scheme}://{bracketed(name)}" for name in hostnames]


def bracketed(hostname: str) -> str:
    """A host as it is written in a URL: IPv6 addresses go into brackets."""
    return f"[{hostname}]" if ":" in hostname else hostname


def private_environment(public: Mapping[str, str]) -> dict[str, str]:
    """What `mlflow server` puts into the environment of its workers, for the settings in `public`."""
    return {
        "_MLFLOW_SERVER_FILE_STORE": public["MLFLOW_BACKEND_STORE_URI"],
        "_MLFLOW_SERVER_REGISTRY_STORE": public["MLFLOW_BACKEND_STORE_URI"],
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": public["MLFLOW_ARTIFACTS_DESTINATION"],
        "_MLFLOW_SGI_NAME": "uvicorn",
        "_MLFLOW_IN_JOB_EXECUTOR": "false",
        "_MLFLOW_SERVER_BOOT_ID": uuid.uuid4().hex,
        "_MLFLOW_SERVER_TLS_LISTENER": "false",
    }


OF_NEWER_RELEASES = {"_MLFLOW_IN_JOB_EXECUTOR", "_MLFLOW_SERVER_BOOT_ID", "_MLFLOW_SERVER_TLS_LISTENER"}
"""Private variables that not every release since 3.12 knows."""


LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "loggers": {"uvicorn": {"handlers": ["stderr"], "level": "WARNING", "propagate": False}},
}
"""The journal adds the time and the unit; nginx keeps the access log."""

CHECK_QUERY = "/api/2.0/mlflow/experiments/get?experiment_id=0"
"""Answered from the database, unlike /health."""


def serve(uds: Path, *, first: bool = True) -> int:
    """Run one process until it is told to stop; 0 when it has served. Raises Refusal when it cannot start.
    The `first` of a machine's processes has the job runner with it, where one is asked for."""
    public = {name: os.environ.get(name, "") for name in ("MLFLOW_BACKEND_STORE_URI", "MLFLOW_ARTIFACTS_DESTINATION")}
    if missing := [name for name, value in public.items() if not value]:
        raise Refusal(f"{' and '.join(missing)} not set: start the unit mlflow-server@, or load mlflow.env first")
    # The plug-in makes the way to PostgreSQL shorter.
    uri = public["MLFLOW_BACKEND_STORE_URI"]
    os.environ.update(private_environment(public | {"MLFLOW_BACKEND_STORE_URI": sessions.through_plugin(uri)}))
    if jobs.asked_for():
        os.environ.update(jobs.queues(uds.parent))
    gc.set_threshold(*COLLECT_AFTER)
    answer_searches_without_auth()
    received.install()
    answers.install()
    sessions.keep_what_was_read()
    application, flask = load(APPLICATION), load(FLASK_APPLICATION)
    forbid_migrations()
    if CONFIG.exists():  # on a machine that boots: loading takes seconds in which the database step can do its work
        wait_until_done("database")
    check_schema(public["MLFLOW_BACKEND_STORE_URI"])
    repository = artifact_repository(public["MLFLOW_ARTIFACTS_DESTINATION"])
    threads = Threads.split(int(os.environ.get("MLFLOW_HOST_REQUEST_THREADS", DEFAULT_THREADS)))

    import uvicorn

    class Announced(uvicorn.Server):
        """Tells systemd once the socket is open."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            if first and jobs.asked_for():
                self.jobs = await jobs.start(uds)
            await super().startup(sockets=sockets)
            notify("READY=1")

    server = Announced(
        uvicorn.Config(
            prepared(shortened(application, flask, repository, threads), native_threads=threads.native),
            uds=str(uds),
            lifespan="on",
            ws="none",
            access_log=False,
            log_config=LOGGING,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    )
    server.run()
    return 0 if server.started else 1


@dataclass(frozen=True)
class Threads:
    """How many requests of each kind one process works on at once.

    A request holds at most two connections of a pool (log_batch does), so that pools of twice the sum are never waited
    for: MLflow answers 400 when they are, and clients do not retry that.
    """

    requests: int
    files: int
    """Requests that may wait for S3."""
    native: int
    """Requests of MLflow's native ASGI routes."""

    @classmethod
    def split(cls, total: int) -> Threads:
        files, native = max(2, total // 4), max(2, total // 8)
        return cls(max(1, total - files - native), files, native)


def load(target: str) -> Any:
    """The object that "module:name" names. Raises Refusal."""
    module, name = target.split(":")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="starlette.middleware.wsgi is deprecated")
            return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Refusal(
            f"the installed MLflow has no {target} ({error}): bake the image with a release that has"
        ) from None


def answer_searches_without_auth() -> None:
    """Have MLflow find at once, at each search, that its basic-auth application cannot be imported.

    It asks at each search for what it may show, by importing that application. Without the packages of the extra
    `auth` the import fails, and fails only after executing thousands of lines, which cost a search a third of its time.
    """
    if importlib.util.find_spec("flask_wtf") is None:
        sys.modules["mlflow.server.auth"] = None  # type: ignore[assignment]  # the documented way to block an import


def shortened(application: Application, flask: Any, repository: Any, threads: Threads) -> Application:
    """`application`, with Flask's requests handed to it without detours, what is asked for most answered from the
    tracking store, and artifacts passed on as they come."""
    from mlflow_host.direct_answers import answered_directly

    requests = ThreadPoolExecutor(threads.requests, "request")
    files = ThreadPoolExecutor(threads.files, "file")
    short = short_cut(application, flask, requests=requests, files=files)
    direct = answered_directly(short, tracking_store(), requests)
    return streamed(direct, repository, files) if hasattr(repository, "open") else direct


def tracking_store() -> Any:
    """The store that MLflow asks in this process."""
    from mlflow.server import handlers

    untyped: Any = handlers
    return untyped._get_tracking_store()


def forbid_migrations() -> None:
    """Make MLflow unable to create or migrate tables in this process, which it would do on finding one missing."""
    import sqlalchemy

    @sqlalchemy.event.listens_for(sqlalchemy.MetaData, "before_create")
    def refuse(*_: object, **__: object) -> None:
        raise Refusal("this process does not create tables: the database step does (mlflow-host-database)")


def check_schema(uri: str) -> None:
    """Raises Refusal unless the database is at exactly the migration that the installed MLflow expects."""
    import mlflow.store
    import sqlalchemy
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    expected = ScriptDirectory(str(Path(mlflow.store.__file__).parent / "db_migrations")).get_current_head()
    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool)
    try:
        with engine.connect() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
    except sqlalchemy.exc.OperationalError as error:
        reason = str(error.orig).strip().splitlines()[0]
        raise Refusal(f"the database does not answer ({reason}): see the journal of mlflow-host-postgresql") from None
    if found != expected:
        raise Refusal(
            f"the database is at migration {found} and MLflow {mlflow.__version__} needs {expected}: "
            "restart mlflow-host-database, which brings it there"
        )


def artifact_repository(uri: str) -> Any:
    """What serves the artifacts destination, found now; MLflow would find out at the first upload. Raises Refusal."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        return get_artifact_repository(uri)
    except MlflowException as error:
        raise Refusal(
            f"artifacts cannot be kept at {uri} ({error}): the mlflow_host package is not installed as a plug-in"
        ) from None


def prepared(application: Application, *, native_threads: int) -> Application:
    """The application, which reports itself started only once it has answered a query, so that its caches are filled
    and its connections open; what the interpreter holds by then is taken out of the garbage collector's sight."""

    async def warm(send: Send, message: Message) -> None:
        if message["type"] == "lifespan.startup.complete":
            import anyio.to_thread

            anyio.to_thread.current_default_thread_limiter().total_tokens = native_threads
            status = await status_of(application, CHECK_QUERY)
            if status != 200:
                message = {
                    "type": "lifespan.startup.failed",
                    "message": f"MLflow answers {status} to {CHECK_QUERY}: its reason is above",
                }
            gc.collect()
            gc.freeze()
        await send(message)

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await application(scope, receive, lambda message: warm(send, message))
        else:
            await application(scope, receive, send)

    return wrapped


async def status_of(application: Application, target: str) -> int:
    """The status that the application gives a GET from localhost."""
    path, _, query = target.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"host", b"localhost")],
        "client": None,
        "server": ("localhost", None),
        "state": {},
    }
    status = 0

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)

    await application(scope, receive, send)
    return status


def notify(state: str) -> None:
    """Tell systemd, where the unit is of Type=notify."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)


def check() -> dict[str, Any]:
    """Assert that this launcher fits the installed MLflow, with a database and a socket of its own.

    Returns what was seen: the release, seconds from start to a first answer, memory (PSS, MB) by then, and what of it
    keeps `mlflow_host.direct_store` from standing in.
    Raises Refusal.
    """
    import mlflow

    with tempfile.TemporaryDirectory(prefix="mlflow-check-") as name:
        folder = Path(name)
        public = {
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db",
            "MLFLOW_ARTIFACTS_DESTINATION": artifacts_destination("check-artifacts", "check-models", "direct"),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with mock.patch.dict(os.environ, public):
            compare_with_cli(*what_cli_starts(), private_environment(public))
            seconds, memory = start_once(folder / "server.sock")
    if unknown := not_compared(Path(mlflow.__file__).parent):
        print(
            f"mlflow-server: MLflow {mlflow.__version__} words {', '.join(unknown)} as no compared release did, "
            "so it is served by its own tracking store, which is slower: see mlflow_host/tracking.py",
            file=sys.stderr,
        )
    return {
        "mlflow": mlflow.__version__,
        "application": APPLICATION,
        "start_seconds": seconds,
        "memory_mb": memory,
        "not_compared": unknown,
    }


def what_cli_starts() -> tuple[list[str], dict[str, str]]:
    """The command and the variables with which `mlflow server` would start its workers here; also makes the database.
    Raises Refusal when it does not start them the way that is known."""
    import mlflow.cli
    import mlflow.server
    from click.testing import CliRunner

    started: list[tuple[list[str], dict[str, str]]] = []

    def record(command: list[str], *, extra_env: dict[str, str], **_: object) -> None:
        started.append((command, extra_env))
        raise SystemExit(0)

    if not hasattr(mlflow.server, "_exec_cmd"):
        raise Refusal(f"`mlflow server` {mlflow.__version__} starts its workers in a way that is not known here")
    with mock.patch.object(mlflow.server, "_exec_cmd", record):
        result = CliRunner().invoke(mlflow.cli.cli, ["server"])
    if not started:
        raise Refusal(f"`mlflow server` {mlflow.__version__} started no worker: {result.output.strip()[-300:]}")
    return started[0]


def compare_with_cli(command: list[str], variables: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Raises Refusal naming every private difference between what `mlflow server` tells its workers and what we tell
    ours; public settings have their defaults wherever they are read."""
    variables = {name: value for name, value in variables.items() if name.startswith("_")}
    different = {"_MLFLOW_SERVER_BOOT_ID"}
    problems = [] if command[-1] == APPLICATION else [f"it runs {command[-1]}, not {APPLICATION}"]
    problems += [f"it sets {name} = {variables[name]!r}" for name in sorted(variables.keys() - ours.keys())]
    problems += [f"it does not set {name}" for name in sorted(ours.keys() - variables.keys() - OF_NEWER_RELEASES)]
    problems += [
        f"it sets {name} = {variables[name]!r}, not {ours[name]!r}"
        for name in sorted((variables.keys() & ours.keys()) - different)
        if variables[name] != ours[name]
    ]
    if problems:
        raise Refusal(f"`mlflow server` differs from mlflow_host.server, which has to follow: {'; '.join(problems)}")


def start_once(uds: Path) -> tuple[float, float]:
    """Start a process on `uds`, have it answer a query, stop it. Returns seconds until then and its PSS in MB."""
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow_host.server", "--socket", str(uds)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    try:
        while not uds.exists():
            if process.poll() is not None:
                raise Refusal(
                    f"the server process ended with status {process.returncode} at start: its reason is above"
                )
            if time.monotonic() > begun + 120:
                raise Refusal("the server process did not open its socket within 120 s")
            time.sleep(0.02)
        answer = ask(uds, CHECK_QUERY)
        if b" 200 " not in answer.split(b"\r\n")[0] or b'"experiment_id": "0"' not in answer:
            raise Refusal(f"the server process answers {answer[:200]!r} to {CHECK_QUERY}")
        seconds = time.monotonic() - begun
        memory = pss_mb(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=GRACE_SECONDS + 10)
    if status not in (0, -signal.SIGTERM):
        raise Refusal(f"the server process ended with status {status} when it was told to stop")
    return round(seconds, 2), memory


def ask(uds: Path, target: str) -> bytes:
    """The whole answer to one GET."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(uds))
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


def pss_mb(pid: int) -> float:
    """Memory of a process in MB, with pages it shares counted in proportion."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1000, 1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mlflow_host.server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Settings come from the environment: /run/mlflow-host/mlflow.env, which the configure step writes.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "number", nargs="?", type=int, metavar="N", help="serve as process N, on /run/mlflow/server-N.sock"
    )
    what.add_argument("--socket", type=Path, metavar="PATH", help="serve on this socket instead")
    what.add_argument("--check", action="store_true", help="assert that the installed MLflow fits; JSON on stdout")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.check:
            print(json.dumps(check()))
            return 0
        if chosen.socket:
            return serve(chosen.socket)
        return serve(SERVER_SOCKETS / f"server-{chosen.number}.sock", first=chosen.number == 1)
    except Refusal as refusal:
        logging.shutdown()
        print(f"mlflow-server: {refusal}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
