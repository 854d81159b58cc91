"""SQLAlchemy plug-in that makes MLflow's use of PostgreSQL faster, with engine and session events. It is the entry
point `sqlalchemy.plugins` and is loaded by `…?plugin=mlflow-host` in a database URI.

- MLflow checks a connection by a query before each transaction (pre_ping). On a Unix socket the plug-in polls the
  socket instead, which shows a closed connection without a round trip.
- A session expires all its objects after each transaction. The plug-in skips that after read-only transactions.
- MLflow's session turns a MemoryError into an error like any other; `request_limits` is told of it.
- Text that PostgreSQL cannot store is refused with 400 (`refusals`), and so is a request whose queries take too long
  (`request_limits`).
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
    """The URI with the plug-in added, if it is PostgreSQL on a Unix socket; else unchanged."""
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
    """Detect a closed connection: an idle connection is readable only when it was closed. Raises InvalidatePoolError,
    upon which the pool opens new connections."""
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLIN)
    if waiting.poll(0):
        raise exc.InvalidatePoolError("PostgreSQL has closed this connection")
    record.info["wrote"] = False


def note_writes(connection: Connection, _: object, statement: str, *__: object) -> None:
    if not statement.startswith("SELECT"):
        connection.info["wrote"] = True


def keep_what_was_read() -> None:
    """Make sessions on this plug-in's engines expire their objects only after transactions that wrote."""
    event.listen(Session, "after_begin", note_connection)
    event.listen(Session, "before_commit", expire_after_writes)


def notice_memory_errors() -> None:
    """Let `request_limits` know of each MemoryError in a session of MLflow's store."""
    event.listen(Session, "after_soft_rollback", note_memory_error)


def note_connection(session: Session, _: object, connection: Connection) -> None:
    session.info["connection"] = connection


def expire_after_writes(session: Session) -> None:
    connection = session.info.get("connection")
    only_read = connection is not None and not connection.closed and not connection.info.get("wrote", True)
    session.expire_on_commit = not only_read or bool(session.new or session.dirty or session.deleted)
