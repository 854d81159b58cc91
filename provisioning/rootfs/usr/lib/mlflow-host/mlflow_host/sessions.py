"""MLflow's way to PostgreSQL made shorter, by what SQLAlchemy lets a program set: a plug-in of its engines and events
of its sessions. Entry point `sqlalchemy.plugins`: `…?plugin=mlflow-host` in a database's URI.

- Before each transaction MLflow has a connection checked by a query (pre_ping). On a Unix socket that costs a round
  trip, and the kernel knows at once when the other end has gone.
- After each transaction a session forgets what it has read, row by row. After one that only read, nobody reads on.
"""

from __future__ import annotations

import select
from typing import Any

from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Connection, CreateEnginePlugin, Engine
from sqlalchemy.orm import Session

PLUGIN = "mlflow-host"


def through_plugin(uri: str) -> str:
    """A database's URI with the plug-in named in it, where it is PostgreSQL's on a Unix socket; else as it is."""
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


def check_out(connection: Any, record: Any, _: object) -> None:
    """PostgreSQL says nothing on an idle connection but that it closes it. Raises InvalidatePoolError, upon which
    the pool opens new connections."""
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLIN)
    if waiting.poll(0):
        raise exc.InvalidatePoolError("PostgreSQL has closed this connection")
    record.info["wrote"] = False


def note_writes(connection: Connection, _: object, statement: str, *__: object) -> None:
    if not statement.startswith("SELECT"):
        connection.info["wrote"] = True


def keep_what_was_read() -> None:
    """Have sessions, on engines of this plug-in, expire their objects after transactions that wrote, and only those."""
    event.listen(Session, "after_begin", note_connection)
    event.listen(Session, "before_commit", expire_after_writes)


def note_connection(session: Session, _: object, connection: Connection) -> None:
    session.info["connection"] = connection


def expire_after_writes(session: Session) -> None:
    connection = session.info.get("connection")
    only_read = connection is not None and not connection.closed and not connection.info.get("wrote", True)
    session.expire_on_commit = not only_read or bool(session.new or session.dirty or session.deleted)
