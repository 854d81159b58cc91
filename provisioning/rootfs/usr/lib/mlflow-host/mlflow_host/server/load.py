"""Report this process's load to `mlflow_host.monitor`: requests that wait for a thread, and database connections in
use. The report needs no request thread and does not slow down requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlflow_host.server.flask_shortcut import Application, Receive, Scope, Send
from mlflow_host.server.request_limits import answer
from mlflow_host.server.request_threads import RequestThreads

PATH = "/mlflow-host-load"
"""The path of the report. nginx forwards requests for this path only from the monitor, not from clients."""


def with_load(application: Application, threads: Mapping[str, RequestThreads], pool: Any) -> Application:
    """Return `application` with the report at `PATH`. `threads` are the request threads by kind. `pool` is SQLAlchemy's
    connection pool, or None."""

    async def answered(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH:
            await application(scope, receive, send)
            return
        report = {
            "waiting": {kind: each.waiting for kind, each in threads.items()},
            "threads": {kind: each.most for kind, each in threads.items()},
            "connections": pool.checkedout() if pool is not None else None,
        }
        await answer(send, 200, report)

    return answered
