"""nginx's health check of this server process: a database query outside the request threads.

Long requests may occupy all request threads, but a busy process still responds to the health check at once. A process
that hangs does not respond to the health check. If PostgreSQL does not respond, the status is 503.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import create_engine, text

from mlflow_host.server.flask_shortcut import Application, Receive, Scope, Send

PATH = "/mlflow-host-health"
"""The path of nginx's health check. nginx does not forward requests from clients to this path."""

SECONDS = 5.0
"""Timeout of the database query."""


def with_health(application: Application, uri: str) -> Application:
    """Return `application` with the health check at `PATH`. The check returns 200, or 503 if a query in the database at
    `uri` fails."""
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
        except Exception:  # any error means that this process cannot answer requests
            status = 503
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    return answered
