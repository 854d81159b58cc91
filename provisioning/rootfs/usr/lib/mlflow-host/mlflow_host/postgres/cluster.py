"""The PostgreSQL cluster that holds MLflow's database: connections, queries, and commands on whole databases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg2
from psycopg2 import sql

WORK_PREFIX = "mlflow_host_work_"
"""Name prefix of a database under construction. A database with this prefix at the start of a step is a leftover."""


SESSION_OPTIONS = "-c idle_in_transaction_session_timeout=0 -c statement_timeout=0"
"""Options of every connection made here. The database step holds locks and a snapshot while it copies a large
database, for longer than the cluster's own timeouts allow."""


@dataclass(frozen=True)
class Cluster:
    """How to connect: `user` is the superuser that the steps connect as, `owner` the role that owns MLflow's tables."""

    host: str = "/run/postgresql"
    port: int = 5432
    user: str = "postgres"
    database: str = "mlflow"
    owner: str = "mlflow"
    programs: Path | None = None
    """Folder of pg_dump and pg_restore; None: search PATH."""

    def program(self, name: str) -> str:
        return str(self.programs / name) if self.programs else name

    @property
    def client_arguments(self) -> list[str]:
        """Connection options for pg_dump and pg_restore."""
        return ["--host", self.host, "--port", str(self.port), "--username", self.user, "--no-password"]

    def uri(self, database: str) -> str:
        """Database URI for SQLAlchemy. Objects created through it belong to `owner`."""
        return (
            f"postgresql+psycopg2://{quote(self.user)}@/{quote(database)}"
            f"?host={quote(self.host, safe='')}&port={self.port}"
            f"&options={quote(f'{SESSION_OPTIONS} -c role={self.owner}', safe='')}"
        )


@contextmanager
def connection(cluster: Cluster, database: str = "postgres", *, autocommit: bool = False) -> Iterator[Any]:
    """Commit when the block ends, roll back when it raises, close in both cases."""
    opened = psycopg2.connect(
        host=cluster.host,
        port=cluster.port,
        user=cluster.user,
        dbname=database,
        application_name="mlflow-host-database",
        options=SESSION_OPTIONS,
        connect_timeout=10,
    )
    try:
        opened.autocommit = autocommit
        yield opened
        if not autocommit:
            opened.commit()
    finally:
        opened.close()


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
    """The first column of the first row; None without rows."""
    found = rows(opened, query, parameters)
    return found[0][0] if found else None


def run(opened: Any, query: str | sql.Composable, parameters: Any = None) -> int:
    """Number of rows that the statement affected; -1 where PostgreSQL reports none."""
    with opened.cursor() as cursor:
        cursor.execute(query, parameters)
        return int(cursor.rowcount)


def command(cluster: Cluster, statement: str, *names: str) -> None:
    """Run one statement outside a transaction; `names` replace the {} in it, quoted as identifiers."""
    with connection(cluster, autocommit=True) as opened:
        run(opened, sql.SQL(statement).format(*map(sql.Identifier, names)))


def databases(cluster: Cluster) -> list[str]:
    with connection(cluster) as opened:
        return [name for (name,) in rows(opened, "SELECT datname FROM pg_database ORDER BY datname")]


def database_bytes(cluster: Cluster, database: str) -> int:
    with connection(cluster) as opened:
        return int(value(opened, "SELECT pg_database_size(%s)", (database,)))


def major(cluster: Cluster) -> int:
    """Major version of the server, such as 15."""
    with connection(cluster) as opened:
        return int(opened.server_version) // 10000


def create_empty(cluster: Cluster, database: str) -> None:
    drop(cluster, database)
    command(cluster, "CREATE DATABASE {} OWNER {} TEMPLATE template0 ENCODING 'UTF8'", database, cluster.owner)


def copy_database(cluster: Cluster, source: str, target: str, large: int = 64 << 20) -> None:
    """Copy the files of `source`, so `target` has its indexes and statistics too. Ends all sessions on `source`.

    From `large` bytes up, the copy bypasses the write-ahead log: 450 MB take 0.6 s instead of 1 to 2.4 s (PostgreSQL
    15, 2 cores), and the copy is not archived."""
    drop(cluster, target)
    disconnect(cluster, source)
    strategy = "FILE_COPY" if database_bytes(cluster, source) >= large else "WAL_LOG"
    command(
        cluster, f"CREATE DATABASE {{}} OWNER {{}} TEMPLATE {{}} STRATEGY {strategy}", target, cluster.owner, source
    )


def drop(cluster: Cluster, database: str) -> None:
    """Drop the database if it exists, even half-dropped or with sessions still connected."""
    command(cluster, "DROP DATABASE IF EXISTS {} WITH (FORCE)", database)


def disconnect(cluster: Cluster, database: str) -> None:
    with connection(cluster, autocommit=True) as opened:
        run(
            opened,
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = %s AND pid <> pg_backend_pid()",
            (database,),
        )
