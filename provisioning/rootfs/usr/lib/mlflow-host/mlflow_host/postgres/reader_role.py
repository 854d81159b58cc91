"""Read-only access to MLflow's database over the network. The launch document enables the access with postgres.cidrs.

If the access is enabled, PostgreSQL listens on TCP with TLS and a certificate of the stack's private authority. Clients
in the networks of postgres.cidrs can log in only as the role mlflow_reader. The role can read the whole database, but
cannot change anything. The role's password is in a separate SSM parameter. The machine stores only the password's SCRAM
verifier, in /run. These boot steps prepare the access:

- `configure` reads the password, and writes the verifier and pg_hba.conf.
- `certificates` writes the certificate and its key for PostgreSQL.
- `postgresql` creates the role after PostgreSQL accepts connections.
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
"""Only the OS users postgres and root can read this folder."""
ITERATIONS = 4096
CONNECTIONS = 5
"""Maximum number of concurrent connections of the role. The limit leaves enough connections for MLflow."""
TLS = "ssl = on\nssl_cert_file = '{folder}/server.crt'\nssl_key_file = '{folder}/server.key'\n"


def put_access(host: HostConfig, folder: Path = FOLDER) -> None:
    """Write pg_hba.conf and the password's verifier. If read-only access is disabled, remove `folder`.

    Raises StepFailed if the SSM parameter with the password is not valid."""
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
    """The SCRAM-SHA-256 verifier of an ASCII password, in PostgreSQL's format (RFC 5803, RFC 7677)."""
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, ITERATIONS)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    served = hmac.digest(salted, b"Server Key", "sha256")
    salt64, stored64, served64 = (base64.b64encode(each).decode() for each in (salt, stored, served))
    return f"SCRAM-SHA-256${ITERATIONS}:{salt64}${stored64}:{served64}"


def put_certificate(certificate: Path, key: Path, folder: Path = FOLDER) -> None:
    """Give PostgreSQL this certificate for TLS. If PostgreSQL is running, it loads the certificate at once."""
    group = grp.getgrnam("postgres").gr_gid
    nginx.write_private(folder / "server.key", key.read_text(), mode=0o640, group=group)
    nginx.write_private(folder / "server.crt", certificate.read_text(), mode=0o640, group=group)
    nginx.write_private(folder / "tls.conf", TLS.format(folder=folder), mode=0o640, group=group)
    # If PostgreSQL is still starting, its unit sends SIGHUP after the start, so that PostgreSQL reads the certificate.
    subprocess.run(["systemctl", "reload", "--no-block", "mlflow-host-postgresql.service"], capture_output=True)


def create_if_configured(folder: Path = FOLDER) -> None:
    """Create or update the role if read-only access is enabled. The boot step `postgresql` calls this function after
    PostgreSQL has started."""
    if not (folder / "verifier").exists():
        return
    from mlflow_host.postgres.cluster import Cluster

    create_or_alter_role(Cluster(), (folder / "verifier").read_text())


def create_or_alter_role(cluster: Cluster, password: str) -> None:
    """Create or update the read-only role for all databases of the cluster. `password` is the SCRAM verifier.

    The role can also read PostgreSQL's catalogs, which contain the role's own verifier. No other role has a password.
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
