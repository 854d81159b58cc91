"""SQLAlchemy plug-in with engine and session events, which makes MLflow's database access faster. SQLAlchemy loads the
plug-in (entry point `sqlalchemy.plugins`) if the database URI contains `plugin=mlflow-host`.

- Before each transaction, MLflow sends a query to check the connection (pre_ping). The plug-in polls the socket, and
  sends a query only if the socket is readable. Polling detects a closed connection without a round trip.
- On Amazon RDS with IAM authentication, the plug-in signs a token for each new connection, if the URI contains
  `token_region`.
- After a read-only transaction, the plug-in prevents a SQLAlchemy session from expiring all its objects.
- MLflow's session converts a MemoryError to a general error. The plug-in reports the MemoryError to `request_limits`.
- The plug-in returns 400 for text that PostgreSQL cannot store (`refusals`).
- The plug-in returns 400 for a request whose queries take too long (`request_limits`).
"""

from __future__ import annotations

import json
import select
from pathlib import Path
from typing import Any

import psycopg2
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Connection, CreateEnginePlugin, Engine
from sqlalchemy.orm import Session

from mlflow_host.machine import aws
from mlflow_host.machine.config import RUN
from mlflow_host.postgres.login import TokenLogin
from mlflow_host.server.refusals import refuse_text
from mlflow_host.server.request_limits import check_time, note_memory_error

PLUGIN = "mlflow-host"


CREDENTIALS = RUN / "server-credentials.json"
"""The AWS credentials of MLflow's processes. `upkeep.server_credentials` writes this file."""


def through_plugin(uri: str) -> str:
    """Add the plug-in to the URI of a PostgreSQL server on a Unix socket. Any other URI is returned unchanged. The URI
    of a server on another host already contains the plug-in (`environment.remote_store_uri`)."""
    on_socket = uri.startswith("postgresql") and "?host=/" in uri
    return f"{uri}&plugin={PLUGIN}" if on_socket else uri


class Engines(CreateEnginePlugin):
    def __init__(self, url: URL, kwargs: dict[str, Any]):
        super().__init__(url, kwargs)
        self._login: TokenLogin | None = None
        if region := url.query.get("token_region"):
            host, port = str(url.query["host"]), int(str(url.query["port"]))
            self._login = TokenLogin(host, port, str(region), lambda: read_keys(CREDENTIALS))

    def update_url(self, url: URL) -> URL:
        return url.difference_update_query(["plugin", "token_region"])

    def handle_pool_kwargs(self, pool_cls: Any, pool_args: dict[str, Any]) -> None:
        pool_args["pre_ping"] = False

    def engine_created(self, engine: Engine) -> None:
        if self._login:
            event.listen(engine, "do_connect", self.log_in)
        event.listen(engine, "checkout", check_out)
        event.listen(engine, "before_cursor_execute", note_writes)
        event.listen(engine, "before_cursor_execute", check_time)
        event.listen(engine, "handle_error", refuse_text)

    def log_in(self, dialect: Any, record: Any, arguments: Any, parameters: dict[str, Any]) -> None:
        """Add a new token to the parameters of a new connection."""
        assert self._login
        try:
            parameters["password"] = self._login(parameters["user"])
        except aws.NoRole as error:
            raise psycopg2.OperationalError(f"there are no AWS credentials to log in with: {error}") from None


def read_keys(file: Path) -> aws.Keys:
    """Read credentials in the JSON format of botocore's credential_process. Raises aws.NoRole."""
    try:
        found = json.loads(file.read_text())
        return aws.Keys(found["AccessKeyId"], found["SecretAccessKey"], found["SessionToken"], found["Expiration"])
    except (OSError, ValueError, KeyError) as error:
        raise aws.NoRole(f"{file}: {error}") from None


def check_out(connection: Any, record: Any, _: object) -> None:
    """Raise InvalidatePoolError if PostgreSQL has closed the connection; the pool then opens new connections. The
    socket of an idle connection is readable if PostgreSQL has closed the connection, or, seldom, if PostgreSQL has sent
    a message or a TLS record between two queries, such as a session ticket. A query distinguishes the two."""
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLIN)
    if waiting.poll(0) and not answers(connection):
        raise exc.InvalidatePoolError("PostgreSQL has closed this connection")
    record.info["wrote"] = False


def answers(connection: Any) -> bool:
    """Whether PostgreSQL answers a query on an idle connection of psycopg2."""
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        connection.rollback()
        return True
    except psycopg2.Error:
        return False


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
