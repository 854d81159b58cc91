"""With the setting postgresCidrs, one read-only role can connect to PostgreSQL over TLS."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import psycopg2
import pytest

from scripts.local_cloud import LocalCloud
from tests.support.servers import Server, destroy_server, launch_server, script

pytestmark = pytest.mark.machine
STACK = "readers"


def test_without_networks_nothing_but_nginx_listens(server: Server, cloud: LocalCloud) -> None:
    listening = cloud.exec(
        server.instance_id, ["ss", "--tcp", "--udp", "--listening", "--numeric", "--no-header"]
    ).stdout
    ports = {line.split()[4].rpartition(":")[2] for line in listening.splitlines() if "127.0.0" not in line.split()[4]}
    assert {"80", "443"} <= ports
    assert "5432" not in ports


@pytest.fixture(scope="module")
def readers(cloud: LocalCloud, image: Mapping[str, Any]) -> Iterator[Server]:
    """Launch a server in its own stack. The setting postgresCidrs allows loopback, because forwarded connections come
    from loopback."""
    os.environ["MLFLOW_AMI_REHEARSAL"] = STACK
    try:
        yield launch_server("--ami", image["ami_id"], "--set", "postgresCidrs=127.0.0.0/8")
    finally:
        destroy_server(cloud)
        del os.environ["MLFLOW_AMI_REHEARSAL"]


@pytest.fixture(scope="module")
def password(readers: Server, cloud: LocalCloud) -> str:
    name = f"/mlflow-ami/{STACK}/postgres-reader"
    return str(cloud.client("ssm").get_parameter(Name=name, WithDecryption=True)["Parameter"]["Value"])


def connect(readers: Server, **options: Any) -> Any:
    host = readers.url.removeprefix("https://")
    verified = {"sslmode": "verify-full", "sslrootcert": readers.server_certificate}
    wanted = {"host": host, "user": "mlflow_reader", "dbname": "mlflow", "connect_timeout": 10, **verified, **options}
    return psycopg2.connect(**wanted)


@pytest.mark.slow
def test_reader_reads_over_verified_tls_and_changes_nothing(readers: Server, password: str, cloud: LocalCloud) -> None:
    with connect(readers, password=password) as session, session.cursor() as cursor:
        cursor.execute("SELECT name FROM experiments")
        assert ("Default",) in cursor.fetchall()
        cursor.execute("SELECT ssl, version FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        encrypted, version = cursor.fetchone()
        assert encrypted and version in ("TLSv1.2", "TLSv1.3")
    for statement in ("DELETE FROM experiments", "CREATE TABLE mine (a int)", "CREATE ROLE more LOGIN"):
        with connect(readers, password=password) as session, session.cursor() as cursor:
            cursor.execute("SET default_transaction_read_only = off")
            session.commit()
            with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                cursor.execute(statement)
    said = cloud.exec(readers.instance_id, ["journalctl", "--no-pager"]).stdout
    assert password not in said and "SCRAM-SHA-256$" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"password": "wrong-password-of-some-length"},
        {"sslmode": "disable"},
        {"user": "mlflow"},
        {"user": "postgres"},
        {"dbname": "postgres"},
        {"dbname": "template1"},
    ],
    ids=str,
)
def test_other_clients_are_refused(readers: Server, password: str, options: dict[str, str]) -> None:
    with pytest.raises(psycopg2.OperationalError, match=r"authentication failed|no pg_hba.conf entry"):
        connect(readers, **{"password": password, **options})


@pytest.mark.slow
def test_setting_taken_back_closes_the_port_again(readers: Server, password: str, cloud: LocalCloud) -> None:
    done = json.loads(script("rehearse.py", "up", "--ami", readers.ami_id, "--set", "postgresCidrs=", "--json").stdout)
    assert done["state"] == "ready"
    with pytest.raises(psycopg2.OperationalError):
        connect(readers, password=password)
    listening = cloud.exec(done["instance_id"], ["ss", "-Hltn"]).stdout
    assert ":5432" not in listening
