"""Report of this process's load for `mlflow_host.monitor`: requests that wait for a thread, and database connections in
use. It is read outside the request threads and costs a request nothing."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlflow_host.server.flask_shortcut import Application, Receive, Scope, Send
from mlflow_host.server.request_limits import answer

PATH = "/mlflow-host-load"
"""nginx forwards it for the monitor only, not for clients."""


def with_load(application: Application, threads: Mapping[str, ThreadPoolExecutor], pool: Any) -> Application:
    """`application`, with `PATH` handled. `threads`: the executors by kind; `pool`: SQLAlchemy's, or None."""

    async def answered(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH:
            await application(scope, receive, send)
            return
        report = {
            "waiting": {kind: executor._work_queue.qsize() for kind, executor in threads.items()},
            "threads": {kind: executor._max_workers for kind, executor in threads.items()},
            "connections": pool.checkedout() if pool is not None else None,
        }
        await answer(send, 200, report)

    return answered
