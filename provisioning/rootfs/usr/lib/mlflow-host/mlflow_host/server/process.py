"""Run one process of MLflow's server: uvicorn with MLflow's own ASGI application on a Unix socket.

This command runs process 1, which listens on /run/mlflow/server-1.sock:

    python -m mlflow_host.server.process 1

`mlflow server` would start the same application with a parent process, a job runner and workers that share one socket.
The parent of `mlflow server` passes settings to the workers in private environment variables, which this process sets
itself (`environment.private_environment`). The bake compares these variables with the variables that the installed
`mlflow server` sets (`bake.check_release`).

A process opens its socket after a test request has read from PostgreSQL. The process never changes the database schema;
only the database step changes the schema.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import gc
import importlib
import logging
import os
import socket
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_host.machine.config import CONFIG, SERVER_SOCKETS
from mlflow_host.machine.status import wait_until_done
from mlflow_host.server import (
    artifact_location_checks,
    db_connections,
    health,
    job_runner,
    mlflow_patches,
    page_transfers,
    refusals,
    request_ids,
    request_limits,
)
from mlflow_host.server import load as load_report
from mlflow_host.server.artifact_streaming import streamed
from mlflow_host.server.environment import private_environment
from mlflow_host.server.fast_path import compatibility
from mlflow_host.server.flask_shortcut import Application, Message, Receive, Scope, Send, short_cut
from mlflow_host.server.mlflow_checks import Refusal, check_schema, forbid_migrations, optional, repository_of
from mlflow_host.server.request_threads import RequestThreads

APPLICATION = "mlflow.server.fastapi_app:app"
FLASK_APPLICATION = "mlflow.server:app"

KEEP_ALIVE_SECONDS = 300
"""The time after which uvicorn closes an idle connection. nginx closes idle upstream connections earlier, so nginx
never sends a request on a connection that uvicorn is closing."""

GRACE_SECONDS = 20
"""When the process stops, running requests have this number of seconds to finish."""

COLLECT_AFTER = (50_000, 50, 50)
"""Thresholds of Python's garbage collector. With the default thresholds (700, 10, 10), searches in large experiments
take a third longer."""

DEFAULT_THREADS = 16
"""Maximum number of concurrent requests of one process, if MLFLOW_HOST_REQUEST_THREADS is not set."""


LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "loggers": {"uvicorn": {"handlers": ["stderr"], "level": "WARNING", "propagate": False}},
}
"""Log lines have no timestamp and no unit name, because the journal adds both. nginx writes the access log."""

BACKGROUND_JOBS = "background jobs: jobExecution has no effect"

CHECK_QUERY = "/api/2.0/mlflow/experiments/get?experiment_id=0"
"""The test request that is sent before the socket is opened. This request reads from the database, but /health does
not."""


def serve(uds: Path, *, first: bool = True) -> int:
    """Run one server process until SIGTERM. Returns 0 if the process started. Raises Refusal if a check fails. The
    `first` process of a machine also starts the job runner, if job execution is enabled."""
    public = {name: os.environ.get(name, "") for name in ("MLFLOW_BACKEND_STORE_URI", "MLFLOW_ARTIFACTS_DESTINATION")}
    if missing := [name for name, value in public.items() if not value]:
        raise Refusal(f"{' and '.join(missing)} not set: start the unit mlflow-server@, or load mlflow.env first")
    # The SQLAlchemy plug-in in the URI avoids round trips to PostgreSQL.
    uri = public["MLFLOW_BACKEND_STORE_URI"]
    os.environ.update(private_environment(public | {"MLFLOW_BACKEND_STORE_URI": db_connections.through_plugin(uri)}))
    if job_runner.asked_for():
        os.environ.update(job_runner.queues(uds.parent))
    gc.set_threshold(*COLLECT_AFTER)
    mlflow_patches.block_import_of_auth()
    mlflow_patches.apply(mlflow_patches.BEFORE_IMPORT)
    db_connections.keep_what_was_read()
    db_connections.notice_memory_errors()
    application, flask = load(APPLICATION), load(FLASK_APPLICATION)
    mlflow_patches.apply(mlflow_patches.AFTER_IMPORT)
    if job_runner.asked_for() and not optional(BACKGROUND_JOBS, job_runner.launcher, None):
        os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    forbid_migrations()
    refusals.install(flask)
    compatibility.switched_off(compatibility.installed_mlflow())  # This takes half a second. The hashes are cached.
    if CONFIG.exists():  # At boot, the code above runs in parallel with the database step.
        wait_until_done("database")
    check_schema(public["MLFLOW_BACKEND_STORE_URI"])

    from mlflow_host.server.artifact_repository import serve_s3_locations  # imports MLflow

    serve_s3_locations()
    allowed_locations = artifact_location_checks.AllowedLocations.below(public["MLFLOW_ARTIFACTS_DESTINATION"])
    artifact_location_checks.check_when_opened(allowed_locations)
    request_limits.refuse_dear_requests(flask)  # this hook is first: it rejects JSON that the next hook cannot parse
    artifact_location_checks.refuse_at_creation(flask, allowed_locations)
    repository = repository_of(public["MLFLOW_ARTIFACTS_DESTINATION"])
    threads = Threads.split(int(os.environ.get("MLFLOW_HOST_REQUEST_THREADS", DEFAULT_THREADS)))

    import uvicorn

    class Announced(uvicorn.Server):
        """uvicorn's server, which also notifies systemd after the socket is open."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            if first and job_runner.asked_for():
                self.jobs = await job_runner.start(uds)
            # The memory limit is set after the job runner's start, because jobs would inherit an earlier limit.
            request_limits.bound_memory(int(os.environ.get("MLFLOW_HOST_PROCESS_MEMORY_MB", 0)))
            await super().startup(sockets=sockets)
            notify("READY=1")
            self.watchdog = asyncio.create_task(answer_watchdog())

    pools = {
        "requests": RequestThreads(threads.requests, "request"),
        "files": RequestThreads(threads.files, "file"),
    }
    short = with_clients_scheme(page_transfers.without_offers(shortened(application, flask, repository, **pools)))
    apart = request_limits.traces_apart(request_limits.only_objects(short))
    bounded = request_limits.inflating(apart)
    served = request_limits.limited(request_limits.shared(bounded, max(1, threads.requests - 1)))
    served = request_limits.within_memory(served)
    served = request_ids.naming_ids(served)
    served = health.with_health(served, os.environ["MLFLOW_BACKEND_STORE_URI"])
    served = load_report.with_load(served, pools, getattr(getattr(tracking_store(), "engine", None), "pool", None))
    server = Announced(
        uvicorn.Config(
            prepared(served, native_threads=threads.native),
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


def with_clients_scheme(application: Application) -> Application:
    """Return `application` with middleware that sets the URL scheme from nginx's header X-Forwarded-Proto. Only nginx
    can connect to the socket. Without this middleware, redirects would lead from https to http."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for name, value in scope["headers"]:
                if name == b"x-forwarded-proto" and value in (b"http", b"https"):
                    scope["scheme"] = value.decode()
        await application(scope, receive, send)

    return wrapped


@dataclass(frozen=True)
class Threads:
    """Maximum numbers of concurrent requests of one process, by kind of request.

    A request uses at most two database connections (for example log_batch). The connection pool therefore has at least
    two connections per request. If no connection were free, MLflow would return 400, which clients do not retry.
    """

    requests: int
    files: int
    """Maximum number of requests that may wait for S3."""
    native: int
    """Maximum number of requests to MLflow's native ASGI routes."""

    @classmethod
    def split(cls, total: int) -> Threads:
        files, native = max(2, total // 4), max(2, total // 8)
        return cls(max(1, total - files - native), files, native)


def load(target: str) -> Any:
    """Import the object "module:name". Raises Refusal if the installed MLflow does not have this object."""
    module, name = target.split(":")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="starlette.middleware.wsgi is deprecated")
            return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Refusal(
            f"the installed MLflow has no {target} ({error}): bake the image with an MLflow release that has this name"
        ) from None


def shortened(
    application: Application, flask: Any, repository: Any, requests: RequestThreads, files: RequestThreads
) -> Application:
    """Return `application` with the middleware for the Flask shortcut, the fast path and streamed artifacts."""
    short = optional(
        "the Flask shortcut: requests pass all layers of FastAPI",
        lambda: short_cut(application, flask, requests=requests, files=files),
        application,
    )
    direct = optional("the fast path: MLflow answers", lambda: answered(short, requests), short)
    if not hasattr(repository, "open"):
        return direct
    return optional("streamed artifacts: MLflow spools them", lambda: streamed(direct, repository, files), direct)


def answered(application: Application, requests: RequestThreads) -> Application:
    from mlflow_host.server.fast_path.app import answered_directly

    return answered_directly(application, tracking_store(), requests)


def tracking_store() -> Any:
    """Return the tracking store that MLflow uses in this process."""
    from mlflow.server import handlers

    untyped: Any = handlers
    return untyped._get_tracking_store()


def prepared(application: Application, *, native_threads: int) -> Application:
    """Return `application` with a startup that sends the test request CHECK_QUERY. The request fills caches and opens
    database connections. The startup then excludes all existing objects from garbage collection (gc.freeze)."""

    async def warm(send: Send, message: Message) -> None:
        if message["type"] == "lifespan.startup.complete":
            import anyio.to_thread

            anyio.to_thread.current_default_thread_limiter().total_tokens = native_threads
            status = await status_of(application, CHECK_QUERY)
            if status != 200:
                message = {
                    "type": "lifespan.startup.failed",
                    "message": f"MLflow returned {status} for {CHECK_QUERY}: the log lines above have the reason",
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
    """Send a GET request with "Host: localhost" to the application, and return the status of the response."""
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
    """Send a notification to systemd, if the unit has Type=notify."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)


async def answer_watchdog() -> None:
    """Send systemd's watchdog notification three times per WatchdogSec from the event loop. If the event loop hangs,
    systemd sends SIGABRT, and faulthandler writes the stack of each thread to the journal."""
    if not (interval := int(os.environ.get("WATCHDOG_USEC", 0)) / 1e6):
        return
    faulthandler.enable()
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval / 3)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mlflow_host.server.process",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Settings are environment variables: /run/mlflow-host/mlflow.env, which the configure step writes.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "number", nargs="?", type=int, metavar="N", help="serve as process N, on /run/mlflow/server-N.sock"
    )
    what.add_argument("--socket", type=Path, metavar="PATH", help="serve on this socket instead")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.socket:
            return serve(chosen.socket)
        return serve(SERVER_SOCKETS / f"server-{chosen.number}.sock", first=chosen.number == 1)
    except Refusal as refusal:
        logging.shutdown()
        print(f"mlflow-server: {refusal}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
