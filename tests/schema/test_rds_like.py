"""On a PostgreSQL like Amazon RDS, all steps work with a login without superuser, over TLS only."""

from __future__ import annotations

import io
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import sqlalchemy
from sqlalchemy import text

from mlflow_host.machine.status import StepFailed
from mlflow_host.postgres import dump_file, flip, roles
from mlflow_host.postgres.cluster import (
    Cluster,
    command,
    connection,
    copy_database,
    create_empty,
    databases,
    drop,
    password_file,
    rows,
    run,
    value,
)
from mlflow_host.postgres.ownership import OwnershipRecord
from mlflow_host.server import db_connections
from mlflow_host.server.environment import remote_store_uri
from mlflow_host.server.mlflow_checks import Refusal, check_schema
from tests.schema.private_cluster import PrivateCluster
from tests.schema.rds_like import MASTER, PASSWORDS, Passwords, rds_like

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def server() -> Iterator[PrivateCluster]:
    with rds_like() as owned:
        create_empty(owned.cluster, "mlflow")
        yield owned


@pytest.fixture
def cluster(server: PrivateCluster) -> Cluster:
    return server.cluster


@pytest.fixture
def master(cluster: Cluster) -> Cluster:
    return replace(cluster, user=MASTER)


def test_login_without_superuser_is_over_tls(cluster: Cluster) -> None:
    with connection(cluster) as opened:
        assert value(opened, "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        assert rows(opened, "SELECT user, rolsuper FROM pg_roles WHERE rolname = user") == [("mlflow_host", False)]
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            run(opened, "SET session_replication_role = replica")


def test_server_with_another_name_or_authority_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    with (
        pytest.raises(psycopg2.OperationalError, match="does not match host name"),
        connection(replace(cluster, host="127.0.0.1")),
    ):
        pass
    from mlflow_host.boot import private_ca

    other = private_ca.ensure(("localhost",), tmp_path / "other").ca
    with (
        pytest.raises(psycopg2.OperationalError, match="certificate verify failed"),
        connection(replace(cluster, authority=other)),
    ):
        pass


def test_databases_sort_texts_by_code_point(cluster: Cluster) -> None:
    with connection(cluster, "mlflow") as opened:
        assert value(opened, "SELECT datcollate FROM pg_database WHERE datname = 'mlflow'") == "C"
        assert value(opened, "SELECT string_agg(t, '' ORDER BY t) FROM unnest(ARRAY['a', 'B', 'é', '_']) t") == "B_aé"


# Roles


def test_roles_are_created_once_and_mended(cluster: Cluster, master: Cluster, server: PrivateCluster) -> None:
    before = _roles(server)
    roles.create_roles(master, PASSWORDS)
    assert _roles(server) == before
    for damage in (
        "ALTER ROLE mlflow_host NOCREATEDB",
        "REVOKE mlflow, pg_monitor FROM mlflow_host",
        "ALTER ROLE mlflow NOLOGIN",
        "ALTER ROLE mlflow PASSWORD 'another'",
        "GRANT rds_iam TO mlflow",
    ):
        assert roles.are_complete(cluster, tokens=False)
        with connection(master) as opened:
            run(opened, damage)
        assert not roles.are_complete(cluster, tokens=False), damage
        roles.create_roles(master, PASSWORDS)
        assert _roles(server) == before


def test_roles_log_in_with_tokens_or_passwords(cluster: Cluster, master: Cluster, server: PrivateCluster) -> None:
    roles.create_roles(master, None)
    with connection(server.superuser) as opened:
        assert value(
            opened,
            "SELECT pg_has_role('mlflow', 'rds_iam', 'USAGE') AND pg_has_role('mlflow_host', 'rds_iam', 'USAGE')",
        )
    assert roles.are_complete(cluster, tokens=True)
    roles.create_roles(master, PASSWORDS)
    with connection(server.superuser) as opened:
        assert not value(
            opened,
            "SELECT pg_has_role('mlflow', 'rds_iam', 'MEMBER') OR pg_has_role('mlflow_host', 'rds_iam', 'MEMBER')",
        )


def test_master_without_rights_is_refused_in_one_sentence(
    cluster: Cluster, master: Cluster, server: PrivateCluster
) -> None:
    with pytest.raises(StepFailed, match=r"^the user mlflow_host of localhost may not create roles and databases: use"):
        roles.create_roles(cluster, PASSWORDS)
    before = _roles(server)
    with connection(server.superuser) as opened:
        run(opened, "ALTER ROLE rds_iam RENAME TO elsewhere; ALTER ROLE mlflow SUPERUSER NOLOGIN")
    try:
        with pytest.raises(
            StepFailed, match=r"master of localhost may not execute ALTER ROLE mlflow LOGIN \(.*\): use"
        ):
            roles.create_roles(master, PASSWORDS)
        with connection(server.superuser) as opened:
            run(opened, "ALTER ROLE mlflow NOSUPERUSER LOGIN")
        with pytest.raises(StepFailed, match="localhost has no role rds_iam: IAM authentication exists only on Amazon"):
            roles.create_roles(master, None)
    finally:
        with connection(server.superuser) as opened:
            run(opened, "ALTER ROLE elsewhere RENAME TO rds_iam; ALTER ROLE mlflow NOSUPERUSER LOGIN")
    assert _roles(server) == before


def _roles(server: PrivateCluster) -> list[tuple[Any, ...]]:
    query = (
        "SELECT rolname, rolsuper, rolcanlogin, rolcreatedb, rolcreaterole, rolinherit, "
        "ARRAY(SELECT roleid::regrole::text FROM pg_auth_members WHERE member = r.oid ORDER BY 1) "
        "FROM pg_roles r WHERE rolname LIKE 'mlflow%' ORDER BY 1"
    )
    with connection(server.superuser) as opened:
        return rows(opened, query)


# Statements that need a database without sessions


@contextmanager
def visitor(superuser: Cluster, database: str, seconds: float = 1) -> Iterator[None]:
    """A session of the superuser, which mlflow_host cannot end, for some seconds. AWS's role rdsadmin opens such
    sessions."""
    there = threading.Event()

    def visit() -> None:
        with connection(superuser, database):
            there.set()
            time.sleep(seconds)

    thread = threading.Thread(target=visit)
    thread.start()
    assert there.wait(10)
    try:
        yield
    finally:
        thread.join()


def _rename(cluster: Cluster) -> None:
    flip.flip(cluster, "mlflow_host_work_other", OwnershipRecord("h", 1), "mlflow_kept_h_20260101t000000z", None)


@pytest.mark.parametrize(
    ("action", "visited"),
    [
        (lambda cluster: copy_database(cluster, "mlflow", "mlflow_host_work_copy"), "mlflow"),
        (lambda cluster: drop(cluster, "mlflow_host_work_other"), "mlflow_host_work_other"),
        (_rename, "mlflow_host_work_other"),
        (_rename, "mlflow"),
    ],
    ids=["copy", "drop", "flip of the copy", "flip"],
)
def test_sessions_of_the_superuser_are_waited_for(
    cluster: Cluster, server: PrivateCluster, action: Callable[[Cluster], None], visited: str
) -> None:
    create_empty(cluster, "mlflow_host_work_other")
    with visitor(server.superuser, visited):
        user = psycopg2.connect(**replace(cluster, user="mlflow").parameters("mlflow"), password=PASSWORDS["mlflow"])
        action(cluster)
        if visited == "mlflow":
            with pytest.raises(psycopg2.OperationalError):
                run(user, "SELECT 1")
        user.close()
    for name in databases(cluster):
        if name.startswith(("mlflow_host_work", "mlflow_kept")):
            drop(cluster, name)


def test_autovacuum_stops_no_copy_and_no_drop(cluster: Cluster, server: PrivateCluster) -> None:
    create_empty(cluster, "busy")
    with connection(cluster, "busy") as opened:
        slow = "autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1, autovacuum_vacuum_threshold = 1"
        run(opened, f"CREATE TABLE rows WITH ({slow}) AS SELECT n, repeat('x', 500) FROM generate_series(1, 20000) n")
        run(opened, "ALTER TABLE rows OWNER TO mlflow")
    with connection(cluster, "busy") as opened:
        run(opened, "DELETE FROM rows WHERE n % 2 = 0")
    for setting in ("SET autovacuum_naptime = '1s'", "SET log_autovacuum_min_duration = 0"):
        command(server.superuser, f"ALTER SYSTEM {setting}")
    with connection(server.superuser) as opened:
        run(opened, "SELECT pg_reload_conf()")
    works = "SELECT 1 FROM pg_stat_activity WHERE datname = 'busy' AND backend_type = 'autovacuum worker'"
    _wait(server.superuser, works)
    copy_database(cluster, "busy", "busy_copy")
    _wait(server.superuser, works)
    drop(cluster, "busy")
    drop(cluster, "busy_copy")
    command(server.superuser, "ALTER SYSTEM RESET ALL")


def _wait(cluster: Cluster, query: str, seconds: float = 60) -> None:
    ends = time.monotonic() + seconds
    while True:
        with connection(cluster) as opened:
            if rows(opened, query):
                return
        assert time.monotonic() < ends, query
        time.sleep(0.1)


# Programs


@pytest.mark.parametrize("programs", ["of the cluster's major version", "of PATH"])
def test_dump_is_made_and_loaded_over_tls(cluster: Cluster, programs: str) -> None:
    """On PATH, pg_dump and pg_restore are the wrapper of Debian's postgresql-client-common."""
    if programs == "of PATH":
        cluster = replace(cluster, programs=None)
    create_empty(cluster, "dumped")
    with connection(cluster, "dumped") as opened:
        run(opened, "CREATE TABLE rows AS SELECT 7 AS n; ALTER TABLE rows OWNER TO mlflow")
    with password_file(cluster) as login:
        arguments = dump_file.dump_command(cluster, "dumped", login.path)
        content = subprocess.run(arguments, check=True, capture_output=True, pass_fds=login.descriptors).stdout
    create_empty(cluster, "loaded")
    dump_file.load(cluster, "loaded", io.BytesIO(content))
    with connection(cluster, "loaded") as opened:
        found = rows(opened, "SELECT n, pg_get_userbyid(relowner) FROM rows, pg_class WHERE relname = 'rows'")
    assert found == [(7, "mlflow")]
    for name in ("dumped", "loaded"):
        drop(cluster, name)


def test_password_is_in_no_argument_and_no_environment_variable(cluster: Cluster, tmp_path: Path) -> None:
    program = tmp_path / "pg_restore"
    program.write_text(f"#!/bin/sh\ntr '\\0' '\\n' </proc/$$/environ >{tmp_path}/told; echo \"$@\" >>{tmp_path}/told\n")
    program.chmod(0o755)
    dump_file.load(replace(cluster, programs=tmp_path), "mlflow", io.BytesIO(b""))
    told = (tmp_path / "told").read_text()
    assert "passfile=/proc/self/fd/" in told and "PATH=" in told
    assert PASSWORDS["mlflow"] not in told and PASSWORDS["mlflow"].replace("\\", "\\\\") not in told


# Storage


def test_free_space_is_known_if_the_size_of_the_storage_is(cluster: Cluster) -> None:
    assert flip.disk_space(cluster) is None
    free, total = flip.disk_space(replace(cluster, storage_bytes=20 << 30)) or (0, 0)
    assert total == 20 << 30 and total - (1 << 30) < free < total - (20 << 20)
    assert flip.disk_space(replace(cluster, storage_bytes=1)) == (0, 1)


def test_old_kept_databases_are_dropped_without_a_known_size(cluster: Cluster) -> None:
    now = datetime.now(UTC)
    kept = [f"mlflow_kept_h_{now - timedelta(days=days):%Y%m%dt%H%M%Sz}" for days in (60, 50, 20, 9, 8, 7)]
    for name in kept:
        create_empty(cluster, name)
    try:
        assert flip.drop_kept_for_space(cluster, 0, {kept[1]}, now) is None
        assert [name for _, name in flip.kept_databases(cluster)] == kept[1:]
    finally:
        for name in kept:
            drop(cluster, name)


# Connections of the server processes


def _server_uri(cluster: Cluster) -> str:
    assert cluster.authority and isinstance(cluster.password_of, Passwords)
    passfile = str(cluster.password_of.passfile)
    return remote_store_uri(cluster.host, cluster.port, cluster.authority, passfile=passfile)


@pytest.fixture
def engine(cluster: Cluster) -> Iterator[sqlalchemy.Engine]:
    made = sqlalchemy.create_engine(_server_uri(cluster), pool_pre_ping=True)
    yield made
    made.dispose()


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The results of all queries that checked a connection."""
    made: list[bool] = []
    check = db_connections.answers

    def answers(connection: Any) -> bool:
        made.append(check(connection))
        return made[-1]

    monkeypatch.setattr(db_connections, "answers", answers)
    return made


def test_server_processes_check_the_schema_through_the_plugin(cluster: Cluster) -> None:
    with pytest.raises(Refusal, match="the database is at migration None, but MLflow"):
        check_schema(_server_uri(cluster))


def test_connection_with_tls_is_checked_without_a_query(engine: sqlalchemy.Engine, queries: list[bool]) -> None:
    for _ in range(20):
        with engine.connect() as connected:
            assert connected.scalar(text("SELECT user")) == "mlflow"
    assert not queries


def test_connection_with_an_unread_message_is_used_again(
    engine: sqlalchemy.Engine, cluster: Cluster, queries: list[bool]
) -> None:
    with engine.connect() as connected:
        connected.execute(text("LISTEN news"))
        connected.commit()
        process = connected.scalar(text("SELECT pg_backend_pid()"))
        raw: Any = connected.connection.driver_connection
    with connection(cluster, "mlflow") as opened:
        run(opened, "NOTIFY news")
    assert select.select([raw], [], [], 10)[0]
    with engine.connect() as connected:
        assert connected.scalar(text("SELECT pg_backend_pid()")) == process
    assert queries == [True]


def test_closed_connections_are_replaced(
    engine: sqlalchemy.Engine, server: PrivateCluster, queries: list[bool]
) -> None:
    held = [engine.connect() for _ in range(3)]
    for connected in held:
        connected.close()
    with connection(server.superuser) as opened:
        run(opened, "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = 'mlflow'")
    for _ in range(5):
        with engine.connect() as connected:
            assert connected.scalar(text("SELECT 1")) == 1
    assert queries and not any(queries)


def test_dead_peers_are_detected_on_both_sides(cluster: Cluster, engine: sqlalchemy.Engine) -> None:
    """A machine that loses its power sends no packet; its locks must not stop the next machine."""
    with connection(cluster) as opened, engine.connect() as connected:
        raw: Any = connected.connection.driver_connection
        for each in (opened, raw):
            with socket.socket(fileno=socket.dup(each.fileno())) as client:
                assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
                assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 25000
            server_side = {name: value(each, f"SHOW {name}") for name in ("tcp_keepalives_idle", "tcp_user_timeout")}
            assert server_side == {"tcp_keepalives_idle": "10", "tcp_user_timeout": "25000"}
