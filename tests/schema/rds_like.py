"""A temporary PostgreSQL cluster that is like Amazon RDS, for tests of code that needs no superuser.

rdsadmin is the superuser. The master user has CREATEROLE and CREATEDB, and is a member of rds_superuser. Clients log in
over TCP with TLS and a password. Two differences: plain PostgreSQL cannot check tokens of IAM authentication, and it
lets nobody but the superuser set session_replication_role, which on RDS members of rds_superuser may set.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from mlflow_host.boot import private_ca
from mlflow_host.postgres import roles
from mlflow_host.postgres.cluster import Cluster, connection, run
from tests.schema.private_cluster import (
    PrivateCluster,
    give_to_account,
    initdb,
    private_cluster,
    programs,
    temporary_folder,
)
from tests.support.services import free_port

HOST = "localhost"
MASTER = "master"
PASSWORDS = {MASTER: "master's password", roles.OWNER: r"owner's:\password", roles.HOST: r"host's:\password"}

RECIPE = f"""
CREATE ROLE rds_superuser NOLOGIN;
GRANT pg_monitor, pg_signal_backend, pg_read_all_data, pg_write_all_data TO rds_superuser WITH ADMIN OPTION;
CREATE ROLE rds_iam NOLOGIN;
GRANT rds_iam TO rds_superuser WITH ADMIN OPTION;
CREATE ROLE {MASTER} LOGIN CREATEDB CREATEROLE INHERIT;
GRANT rds_superuser TO {MASTER};
ALTER DATABASE postgres OWNER TO {MASTER};
"""

ACCESS = """
local all rdsadmin trust
hostssl all all 127.0.0.1/32 scram-sha-256
"""


class Passwords:
    """The password source of the code under test. `passfile` is a password file of libpq for other programs."""

    def __init__(self, passfile: Path):
        self.passfile = passfile

    def __call__(self, role: str) -> str:
        return PASSWORDS[role]


@contextmanager
def rds_like() -> Iterator[PrivateCluster]:
    """Yield a new cluster with the roles of `roles.create_roles`. Its `cluster` logs in as mlflow_host."""
    folder = temporary_folder()
    shown = private_ca.ensure((HOST,), folder / "certificates")
    for path in (shown.key, shown.certificate, shown.key.parent):
        give_to_account(path)
    shown.key.parent.chmod(0o755)
    (folder / "access.conf").write_text(ACCESS)
    passfile = folder / "passfile"
    escaped = {role: text.replace("\\", "\\\\").replace(":", "\\:") for role, text in PASSWORDS.items()}
    passfile.write_text("".join(f"*:*:*:{role}:{password}\n" for role, password in escaped.items()))
    passfile.chmod(0o600)
    login = Cluster(
        host=HOST,
        port=free_port(),
        user=roles.HOST,
        programs=programs(),
        authority=shown.ca,
        password_of=Passwords(passfile),
    )
    settings = {
        "listen_addresses": "127.0.0.1",
        "hba_file": folder / "access.conf",
        "ssl": "on",
        "ssl_cert_file": shown.certificate,
        "ssl_key_file": shown.key,
        "fsync": "off",  # a killed process loses nothing without fsync
    }
    owned = PrivateCluster(folder, settings=settings, remote=login)
    try:
        initdb(owned, "--username=rdsadmin")
        owned.start()
        with connection(owned.superuser) as opened:
            run(opened, RECIPE)
            run(opened, f"ALTER ROLE {MASTER} PASSWORD %s", (PASSWORDS[MASTER],))
        roles.create_roles(replace(login, user=MASTER), PASSWORDS)
        yield owned
    finally:
        owned.stop()
        shutil.rmtree(folder, ignore_errors=True)


def cluster_at(place: str) -> AbstractContextManager[PrivateCluster]:
    """A cluster like the machine's own PostgreSQL, or like Amazon RDS."""
    return rds_like() if place == "rds" else private_cluster()


def uri(cluster: Cluster) -> str:
    """A URI of the database in service for other programs."""
    source = cluster.password_of
    return cluster.uri(cluster.database, str(source.passfile) if isinstance(source, Passwords) else "")


def to_argument(cluster: Cluster) -> str:
    """The cluster as an argument of a program that calls `from_argument`."""
    source = cluster.password_of
    passfile = str(source.passfile) if isinstance(source, Passwords) else None
    authority = str(cluster.authority) if cluster.authority else None
    return json.dumps([cluster.host, cluster.port, cluster.user, authority, passfile])


def from_argument(text: str) -> Cluster:
    host, port, user, authority, passfile = json.loads(text)
    return Cluster(
        host=host,
        port=port,
        user=user,
        programs=programs(),
        authority=Path(authority) if authority else None,
        password_of=Passwords(Path(passfile)) if passfile else None,
    )
