"""PostgreSQL accepts no network connections by default. With the setting postgresCidrs, a read-only role can
connect."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest

from mlflow_host.contract import launch, sizing
from mlflow_host.machine import nginx
from mlflow_host.postgres import reader_role
from mlflow_host.postgres.cluster import Cluster
from tests.support.services import PostgreSQL, postgresql

pytestmark = pytest.mark.service

TEMPLATES = Path(__file__).parents[2] / "provisioning/rootfs/usr/share/mlflow-host/templates"
PASSWORD = "Generated0123456789abcdefghijklm"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSQL]:
    with postgresql(tmp_path_factory.mktemp("reader") / "cluster") as made:
        yield made


def settings(*cidrs: str) -> str:
    sized, access = sizing.size(sizing.MachineSize(2048, 2)), launch.Postgres(cidrs, "/x")
    return nginx.render("postgresql.conf.j2", TEMPLATES, sizing=sized, postgres=access, archives=False)


def test_password_is_stored_as_scram_verifier(cluster: PostgreSQL) -> None:
    kept = reader_role.verifier(PASSWORD, os.urandom(16))
    assert PASSWORD not in kept
    cluster.execute(f"CREATE ROLE checked LOGIN PASSWORD '{kept}'")
    assert cluster.execute("SELECT rolpassword FROM pg_authid WHERE rolname = 'checked'") == [(kept,)]

    def log_in(password: str) -> None:
        psycopg2.connect(
            host="127.0.0.1", port=cluster.port, user="checked", dbname="postgres", password=password
        ).close()

    log_in(PASSWORD)
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        log_in(PASSWORD + "x")


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO kept VALUES (2)",
        "UPDATE kept SET a = 3",
        "DELETE FROM kept",
        "TRUNCATE kept",
        "DROP TABLE kept",
        "CREATE TABLE mine (a int)",
        "CREATE ROLE more LOGIN",
        "ALTER ROLE mlflow_reader SUPERUSER",
        "ALTER ROLE postgres PASSWORD 'x'",
        "SET ROLE postgres",
        "COPY kept TO '/tmp/stolen'",
        "COPY kept FROM PROGRAM 'id'",
        "SELECT pg_read_file('/etc/passwd')",
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'postgres'",
        "SET temp_file_limit = -1",
    ],
)
def test_reader_role_cannot_write(cluster: PostgreSQL, statement: str) -> None:
    if not cluster.execute("SELECT 1 FROM pg_tables WHERE tablename = 'kept'"):
        cluster.execute("CREATE TABLE kept (a int); INSERT INTO kept VALUES (1)")
    superuser = Cluster(host=str(cluster.sockets), port=cluster.port, user=cluster.user)
    for _ in range(2):  # each start of PostgreSQL creates or alters the role
        reader_role.create_or_alter_role(superuser, reader_role.verifier(PASSWORD, os.urandom(16)))
    with (
        psycopg2.connect(
            host="127.0.0.1", port=cluster.port, user=reader_role.ROLE, dbname="postgres", password=PASSWORD
        ) as session,
        session.cursor() as cursor,
    ):
        cursor.execute("SELECT a FROM kept")
        assert cursor.fetchall() == [(1,)]
        cursor.execute("SELECT rolname FROM pg_authid WHERE rolpassword IS NOT NULL")
        assert set(cursor.fetchall()) <= {(reader_role.ROLE,), ("checked",), ("postgres",)}
        session.commit()
        cursor.execute("SET default_transaction_read_only = off")
        session.commit()
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            cursor.execute(statement)


def test_without_networks_postgresql_listens_on_no_address() -> None:
    assert "\nlisten_addresses = ''\n" in settings()
    assert "hba_file = '/usr/share/mlflow-host/pg_hba.conf'" in settings() and "include" not in settings()


def test_with_networks_postgresql_accepts_tls_only() -> None:
    text = settings("192.0.2.0/24")
    assert "\nlisten_addresses = '*'\n" in text and f"hba_file = '{reader_role.FOLDER}/pg_hba.conf'" in text
    hba = nginx.render("pg_hba.conf.j2", TEMPLATES, cidrs=("192.0.2.0/24", "2001:db8::/32"), role=reader_role.ROLE)
    lines = [line.split() for line in hba.splitlines() if line and not line.startswith("#")]
    assert lines == [
        ["local", "all", "postgres", "peer", "map=steps"],
        ["local", "all", "mlflow", "peer", "map=steps"],
        ["hostssl", "mlflow", "mlflow_reader", "192.0.2.0/24", "scram-sha-256"],
        ["hostssl", "mlflow", "mlflow_reader", "2001:db8::/32", "scram-sha-256"],
    ]
