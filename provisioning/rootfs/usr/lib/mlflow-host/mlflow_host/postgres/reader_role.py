"""Read-only access to MLflow's database over the network; off unless the launch document sets postgres.cidrs.

When it is on, PostgreSQL listens on TCP with TLS, with a certificate of the stack's private authority. Clients in those
networks can log in as one role, mlflow_reader, which can read the whole database and change nothing. Its password is in
its own SSM parameter; the machine stores only the SCRAM verifier of it, in /run.

    configure      reads the password, writes the verifier and pg_hba.conf
    certificates   writes the certificate and its key for PostgreSQL
    postgresql     creates the role once PostgreSQL accepts connections
"""

from __future__ import annotations

import base64
import grp
import hashlib
import hmac
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_host.machine import nginx, parameters
from mlflow_host.machine.config import RUN, HostConfig
from mlflow_host.machine.status import StepFailed

if TYPE_CHECKING:
    from mlflow_host.postgres.cluster import Cluster

ROLE = "mlflow_reader"
FOLDER = RUN / "postgresql"
"""Readable by the OS user postgres and root only."""
ITERATIONS = 4096
CONNECTIONS = 5
"""Maximum number of concurrent connections of the role, so that MLflow's connections stay available."""
TLS = "ssl = on\nssl_cert_file = '{folder}/server.crt'\nssl_key_file = '{folder}/server.key'\n"


def put_access(host: HostConfig, folder: Path = FOLDER) -> None:
    """Write pg_hba.conf and the password's verifier, or remove both when access is off.

    Raises StepFailed when the parameter cannot be used."""
    postgres = host.launch.postgres
    if not postgres.cidrs:
        shutil.rmtree(folder, ignore_errors=True)
        return
    group = grp.getgrnam("postgres").gr_gid
    folder.mkdir(mode=0o750, exist_ok=True)
    os.chown(folder, -1, group)
    folder.chmod(0o750)
    password = parameters.secret(host.launch, postgres.parameter)
    if not password.isascii() or not password.isprintable() or len(password) < 16:
        raise StepFailed(f"the parameter {postgres.parameter} must hold at least 16 visible ASCII characters")
    nginx.write_private(folder / "verifier", verifier(password, os.urandom(16)), mode=0o640, group=group)
    hba = nginx.render("pg_hba.conf.j2", nginx.TEMPLATES, cidrs=postgres.cidrs, role=ROLE)
    nginx.write_private(folder / "pg_hba.conf", hba, mode=0o640, group=group)
    nginx.write_private(folder / "tls.conf", "", mode=0o640, group=group)


def verifier(password: str, salt: bytes) -> str:
    """The SCRAM-SHA-256 verifier that PostgreSQL stores for an ASCII password (RFC 5803, RFC 7677)."""
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, ITERATIONS)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    served = hmac.digest(salted, b"Server Key", "sha256")
    salt64, stored64, served64 = (base64.b64encode(each).decode() for each in (salt, stored, served))
    return f"SCRAM-SHA-256${ITERATIONS}:{salt64}${stored64}:{served64}"


def put_certificate(certificate: Path, key: Path, folder: Path = FOLDER) -> None:
    """Make PostgreSQL use this certificate for TLS: at once if it runs, else when it starts."""
    group = grp.getgrnam("postgres").gr_gid
    nginx.write_private(folder / "server.key", key.read_text(), mode=0o640, group=group)
    nginx.write_private(folder / "server.crt", certificate.read_text(), mode=0o640, group=group)
    nginx.write_private(folder / "tls.conf", TLS.format(folder=folder), mode=0o640, group=group)
    # A PostgreSQL that is starting reads the certificate afterwards: its unit sends SIGHUP once it has started.
    subprocess.run(["systemctl", "reload", "--no-block", "mlflow-host-postgresql.service"], capture_output=True)


def create_if_configured(folder: Path = FOLDER) -> None:
    """Create or update the role if access is on. Runs as the OS user postgres once PostgreSQL accepts connections."""
    if not (folder / "verifier").exists():
        return
    from mlflow_host.postgres.cluster import Cluster

    create_or_alter_role(Cluster(), (folder / "verifier").read_text())


def create_or_alter_role(cluster: Cluster, password: str) -> None:
    """Create or update the read-only role, for all databases of the cluster; `password` is the SCRAM verifier.

    The role can also read the catalogs, so it can see its own verifier. No other role has a password.
    """
    from mlflow_host.postgres.cluster import connection, run, value

    with connection(cluster) as opened:
        if not value(opened, "SELECT 1 FROM pg_roles WHERE rolname = %s", (ROLE,)):
            run(opened, f"CREATE ROLE {ROLE}")
        run(opened, f"ALTER ROLE {ROLE} LOGIN INHERIT CONNECTION LIMIT {CONNECTIONS}")
        run(opened, f"ALTER ROLE {ROLE} PASSWORD %s", (password,))
        run(opened, f"GRANT pg_read_all_data TO {ROLE}")
        for setting in ("default_transaction_read_only = on", "statement_timeout = '10min'", "temp_file_limit = '1GB'"):
            run(opened, f"ALTER ROLE {ROLE} SET {setting}")
