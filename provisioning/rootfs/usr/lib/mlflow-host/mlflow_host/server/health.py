"""The health check of this process for nginx: a database query outside the request threads.

Long requests may occupy all request threads. A busy process still responds here at once; a process that hangs does not,
nor does one whose PostgreSQL does not respond.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import create_engine, text

from mlflow_host.server.flask_shortcut import Application, Receive, Scope, Send

PATH = "/mlflow-host-health"
"""Path of nginx's health check; nginx does not forward clients' requests for it."""

SECONDS = 5.0
"""Timeout of the query."""


def with_health(application: Application, uri: str) -> Application:
    """`application`, with `PATH` handled: 200, or 503 if the database at `uri` does not respond."""
    engine = create_engine(uri, pool_size=1, max_overflow=0, pool_pre_ping=True)
    thread = ThreadPoolExecutor(1, "health")

    def query() -> None:
        with engine.connect() as connection:
            connection.execute(text("SELECT version_num FROM alembic_version")).one()

    async def answered(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH:
            await application(scope, receive, send)
            return
        try:
            await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(thread, query), SECONDS)
            status = 200
        except Exception:  # with any error, this process cannot serve
            status = 503
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    return answered
