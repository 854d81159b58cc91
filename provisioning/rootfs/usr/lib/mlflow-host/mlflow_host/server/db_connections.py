"""SQLAlchemy plug-in with engine and session events, which makes MLflow's database access faster. SQLAlchemy loads the
plug-in (entry point `sqlalchemy.plugins`) if the database URI contains `plugin=mlflow-host`.

- Before each transaction, MLflow sends a query to check the connection (pre_ping). On a Unix socket, the plug-in polls
  the socket instead of sending this query. Polling detects a closed connection without a round trip.
- After a read-only transaction, the plug-in prevents a SQLAlchemy session from expiring all its objects.
- MLflow's session converts a MemoryError to a general error. The plug-in reports the MemoryError to `request_limits`.
- The plug-in returns 400 for text that PostgreSQL cannot store (`refusals`).
- The plug-in returns 400 for a request whose queries take too long (`request_limits`).
"""

from __future__ import annotations

import select
from typing import Any

from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Connection, CreateEnginePlugin, Engine
from sqlalchemy.orm import Session

from mlflow_host.server.refusals import refuse_text
from mlflow_host.server.request_limits import check_time, note_memory_error

PLUGIN = "mlflow-host"


def through_plugin(uri: str) -> str:
    """Add the plug-in to the URI of a PostgreSQL server on a Unix socket. Any other URI is returned unchanged."""
    on_socket = uri.startswith("postgresql") and "?host=/" in uri
    return f"{uri}&plugin={PLUGIN}" if on_socket else uri


class Engines(CreateEnginePlugin):
    def update_url(self, url: URL) -> URL:
        return url.difference_update_query(["plugin"])

    def handle_pool_kwargs(self, pool_cls: Any, pool_args: dict[str, Any]) -> None:
        pool_args["pre_ping"] = False

    def engine_created(self, engine: Engine) -> None:
        event.listen(engine, "checkout", check_out)
        event.listen(engine, "before_cursor_execute", note_writes)
        event.listen(engine, "before_cursor_execute", check_time)
        event.listen(engine, "handle_error", refuse_text)


def check_out(connection: Any, record: Any, _: object) -> None:
    """Raise InvalidatePoolError if PostgreSQL has closed the connection; the pool then opens new connections. The
    socket of an idle connection is readable only if PostgreSQL has closed the connection."""
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLIN)
    if waiting.poll(0):
        raise exc.InvalidatePoolError("PostgreSQL has closed this connection")
    record.info["wrote"] = False


def note_writes(connection: Connection, _: object, statement: str, *__: object) -> None:
    if not statement.startswith("SELECT"):
        connection.info["wrote"] = True


def keep_what_was_read() -> None:
    """Make sessions with this plug-in expire their objects only after transactions that wrote to the database."""
    event.listen(Session, "after_begin", note_connection)
    event.listen(Session, "before_commit", expire_after_writes)


def notice_memory_errors() -> None:
    """Report each MemoryError in a session of MLflow's store to `request_limits`."""
    event.listen(Session, "after_soft_rollback", note_memory_error)


def note_connection(session: Session, _: object, connection: Connection) -> None:
    session.info["connection"] = connection


def expire_after_writes(session: Session) -> None:
    connection = session.info.get("connection")
    only_read = connection is not None and not connection.closed and not connection.info.get("wrote", True)
    session.expire_on_commit = not only_read or bool(session.new or session.dirty or session.deleted)
