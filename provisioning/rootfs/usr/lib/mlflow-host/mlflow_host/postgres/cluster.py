"""Access to the PostgreSQL server with MLflow's database: connections, queries, and commands on whole databases.

The server is the machine's own PostgreSQL, to which the steps connect as the superuser, or PostgreSQL on another host,
such as Amazon RDS. There the steps connect as the role that `roles` creates, which is no superuser.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import psycopg2
from psycopg2 import errors, sql
from psycopg2.extensions import make_dsn

from mlflow_host.machine import aws, config
from mlflow_host.postgres.login import SERVER_KEEPALIVES, PasswordFile, PasswordOf, tls_parameters

WORK_PREFIX = "mlflow_host_work_"
"""Name prefix of unfinished databases. The boot step `database` first drops all databases with this prefix."""


SESSION_OPTIONS = "-c idle_in_transaction_session_timeout=0 -c statement_timeout=0"
"""Options of every connection that this module opens: no timeouts. The boot step `database` copies large databases, and
holds locks and a snapshot for longer than PostgreSQL's configured timeouts allow."""

ATTEMPTS = 20
PAUSE_SECONDS = 0.25
"""A statement that needs a database without sessions is executed at most ATTEMPTS times, with this pause between."""


@dataclass(frozen=True)
class Cluster:
    """The parameters of a connection. `user` is the role with which this module logs in. `owner` is the role that owns
    MLflow's tables."""

    host: str = "/run/postgresql"
    """The folder of the machine's Unix socket, or the DNS name of another host."""
    port: int = 5432
    user: str = "postgres"
    database: str = "mlflow"
    owner: str = "mlflow"
    programs: Path | None = None
    """Folder with pg_dump and pg_restore. If the value is None, the two programs are found through PATH."""
    authority: Path | None = None
    """PEM file with the certificates of another host's authorities, or None for the machine's own PostgreSQL."""
    password_of: PasswordOf | None = None
    storage_bytes: int | None = None
    """The size of another host's storage, or None if the size is unknown or grows by itself."""

    @property
    def remote(self) -> bool:
        return self.authority is not None

    @property
    def storage(self) -> tuple[str, str]:
        """The name of the storage with PostgreSQL's data, and the setting of its size."""
        return ("the database's storage", "databaseStorageGib") if self.remote else ("the data volume", "dataVolumeGib")

    def program(self, name: str) -> str:
        return str(self.programs / name) if self.programs else name

    @property
    def _tls(self) -> dict[str, str]:
        return tls_parameters(self.authority) if self.authority else {}

    @property
    def _options(self) -> str:
        return f"{SESSION_OPTIONS} {SERVER_KEEPALIVES}" if self.remote else SESSION_OPTIONS

    def parameters(self, database: str) -> dict[str, Any]:
        """libpq's parameters without the password."""
        place = {"host": self.host, "port": self.port, "user": self.user, "dbname": database}
        return {**place, "options": self._options, "connect_timeout": 10, **self._tls}

    def client_arguments(self, database: str, passfile: str = "") -> list[str]:
        """Connection options for pg_dump and pg_restore. `passfile` is the path of a password file."""
        login = {"passfile": passfile} if passfile else {}
        more = make_dsn(dbname=database, options=self._options, **login, **self._tls)
        place = ["--host", self.host, "--port", str(self.port), "--username", self.user]
        return [*place, "--no-password", f"--dbname={more}"]

    def uri(self, database: str, passfile: str = "") -> str:
        """Database URI for SQLAlchemy. Objects that are created with this URI belong to `owner`."""
        query = {
            "host": self.host,
            "port": self.port,
            "options": f"{self._options} -c role={self.owner}",
            **({"passfile": passfile} if passfile else {}),
            **self._tls,
        }
        place = f"postgresql+psycopg2://{quote(self.user)}@/{quote(database)}"
        return f"{place}?{urlencode(query, quote_via=quote, safe='')}"

    def password(self) -> str:
        """The password for a new connection as `user`. Raises psycopg2.OperationalError without AWS credentials."""
        assert self.password_of
        try:
            return self.password_of(self.user)
        except aws.NoRole as error:
            raise psycopg2.OperationalError(f"there are no AWS credentials to log in with: {error}") from None


def in_service() -> Cluster:
    """The server with MLflow's database in service."""
    return Cluster(host=str(config.POSTGRESQL_SOCKETS))


@contextmanager
def connection(cluster: Cluster, database: str = "postgres", *, autocommit: bool = False) -> Iterator[Any]:
    """Open a connection for a `with` block. Commit if the block succeeds, and roll back if the block raises."""
    login: dict[str, Any] = {"password": cluster.password()} if cluster.password_of else {}
    opened = psycopg2.connect(**cluster.parameters(database), application_name="mlflow-host-database", **login)
    try:
        opened.autocommit = autocommit
        yield opened
        if not autocommit:
            opened.commit()
    finally:
        opened.close()


@contextmanager
def password_file(cluster: Cluster) -> Iterator[PasswordFile]:
    """Write the password of `cluster.user` to a file in memory for child processes, during a `with` block."""
    file = PasswordFile(cluster.password if cluster.password_of else None)
    try:
        yield file
    finally:
        file.close()


def accepts_connections(cluster: Cluster) -> bool:
    """Whether PostgreSQL accepts connections."""
    try:
        with connection(cluster):
            return True
    except psycopg2.OperationalError:
        return False


def rows(opened: Any, query: str | sql.Composable, parameters: Any = None) -> list[tuple[Any, ...]]:
    with opened.cursor() as cursor:
        cursor.execute(query, parameters)
        return list(cursor.fetchall()) if cursor.description else []


def value(opened: Any, query: str | sql.Composable, parameters: Any = None) -> Any:
    """The first column of the first row, or None if there are no rows."""
    found = rows(opened, query, parameters)
    return found[0][0] if found else None


def run(opened: Any, query: str | sql.Composable, parameters: Any = None) -> int:
    """Execute a statement, and return the number of affected rows, or -1 if PostgreSQL reports no number."""
    with opened.cursor() as cursor:
        cursor.execute(query, parameters)
        return int(cursor.rowcount)


def command(cluster: Cluster, statement: str, *names: str) -> None:
    """Run one statement outside a transaction. Each {} in the statement is replaced by one of `names` in quotes."""
    with connection(cluster, autocommit=True) as opened:
        run(opened, sql.SQL(statement).format(*map(sql.Identifier, names)))


def databases(cluster: Cluster) -> list[str]:
    with connection(cluster) as opened:
        return [name for (name,) in rows(opened, "SELECT datname FROM pg_database ORDER BY datname")]


def database_bytes(cluster: Cluster, database: str) -> int:
    with connection(cluster) as opened:
        return int(value(opened, "SELECT pg_database_size(%s)", (database,)))


def major(cluster: Cluster) -> int:
    """Major version of the PostgreSQL server, for example 15."""
    with connection(cluster) as opened:
        return int(opened.server_version) // 10000


def create_empty(cluster: Cluster, database: str) -> None:
    """Create an empty database. Texts are sorted by code point, also on a server with another default."""
    drop(cluster, database)
    command(
        cluster,
        "CREATE DATABASE {} OWNER {} TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C'",
        database,
        cluster.owner,
    )


def copy_database(cluster: Cluster, source: str, target: str, large: int = 64 << 20) -> None:
    """Copy the files of `source`, including indexes and statistics, to `target`. Ends all sessions on `source`.

    If `source` has at least `large` bytes, the copy bypasses the write-ahead log and is not archived. Without the
    write-ahead log, PostgreSQL 15 copies 450 MB on 2 cores in 0.6 s instead of 1 to 2.4 s. On another host, the copy is
    in the write-ahead log, from which Amazon RDS restores."""
    drop(cluster, target)
    files = not cluster.remote and database_bytes(cluster, source) >= large
    statement = f"CREATE DATABASE {{}} OWNER {{}} TEMPLATE {{}} STRATEGY {'FILE_COPY' if files else 'WAL_LOG'}"
    without_sessions(cluster, (source,), lambda: command(cluster, statement, target, cluster.owner, source))


def drop(cluster: Cluster, database: str) -> None:
    """Drop the database if it exists. Connected sessions are ended. If an earlier drop was interrupted, it is
    completed."""
    statement = "DROP DATABASE IF EXISTS {} WITH (FORCE)"
    without_sessions(cluster, (), lambda: command(cluster, statement, database))


def without_sessions(cluster: Cluster, names: tuple[str, ...], action: Callable[[], None]) -> None:
    """End all sessions on the databases `names`, and call `action`, which fails if a database has sessions. Repeat this
    for some seconds, because others may connect again. On Amazon RDS, nobody can end the short sessions of AWS's own
    role rdsadmin."""
    for attempt in range(1, ATTEMPTS + 1):
        for name in names:
            disconnect(cluster, name)
        try:
            return action()
        except (errors.ObjectInUse, errors.InsufficientPrivilege):
            if attempt == ATTEMPTS:
                raise
            time.sleep(PAUSE_SECONDS)


def disconnect(cluster: Cluster, database: str) -> None:
    """End all sessions on the database that this role may end: a superuser all of them, another role those of roles
    that are no superusers. PostgreSQL itself ends autovacuum if a statement needs the database without sessions."""
    with connection(cluster, autocommit=True) as opened:
        run(
            opened,
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity LEFT JOIN pg_roles r ON r.oid = usesysid "
            "WHERE datname = %s AND pid <> pg_backend_pid() "
            "AND (NOT r.rolsuper OR (SELECT rolsuper FROM pg_roles WHERE rolname = current_user))",
            (database,),
        )
