"""Reading MLflow's database over the network: off unless the launch document names networks (postgres.cidrs).

Then PostgreSQL listens, over TLS with the certificate of the stack's private authority, and lets one role in from those
networks: mlflow_reader, which reads everything of the database and changes nothing. Its password is in a parameter of
its own; what this machine keeps, in /run, is the SCRAM verifier made of it.

    configure      fetches the password, writes verifier and pg_hba.conf
    certificates   puts certificate and key where PostgreSQL reads them
    postgresql     makes the role once it accepts connections
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

from mlflow_host import credentials, web
from mlflow_host.config import RUN, HostConfig
from mlflow_host.status import StepFailed

if TYPE_CHECKING:
    from mlflow_host.schema.cluster import Cluster

ROLE = "mlflow_reader"
FOLDER = RUN / "postgresql"
"""Readable by PostgreSQL's user and by nobody else but root."""
ITERATIONS = 4096
CONNECTIONS = 5
"""At a time, so that readers leave MLflow its own."""
TLS = "ssl = on\nssl_cert_file = '{folder}/server.crt'\nssl_key_file = '{folder}/server.key'\n"


def put_access(host: HostConfig, folder: Path = FOLDER) -> None:
    """Who may connect, and the verifier of the password. Raises StepFailed when the parameter cannot be used."""
    postgres = host.launch.postgres
    if not postgres.cidrs:
        shutil.rmtree(folder, ignore_errors=True)
        return
    group = grp.getgrnam("postgres").gr_gid
    folder.mkdir(mode=0o750, exist_ok=True)
    os.chown(folder, -1, group)
    folder.chmod(0o750)
    password = credentials.secret(host.launch, postgres.parameter)
    if not password.isascii() or not password.isprintable() or len(password) < 16:
        raise StepFailed(f"the parameter {postgres.parameter} must hold at least 16 visible ASCII characters")
    web.write_private(folder / "verifier", verifier(password, os.urandom(16)), mode=0o640, group=group)
    hba = web.render("pg_hba.conf.j2", web.TEMPLATES, cidrs=postgres.cidrs, role=ROLE)
    web.write_private(folder / "pg_hba.conf", hba, mode=0o640, group=group)
    web.write_private(folder / "tls.conf", "", mode=0o640, group=group)


def verifier(password: str, salt: bytes) -> str:
    """What PostgreSQL stores for a password that is all ASCII: SCRAM-SHA-256 (RFC 5803, RFC 7677)."""
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, ITERATIONS)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    served = hmac.digest(salted, b"Server Key", "sha256")
    salt64, stored64, served64 = (base64.b64encode(each).decode() for each in (salt, stored, served))
    return f"SCRAM-SHA-256${ITERATIONS}:{salt64}${stored64}:{served64}"


def put_certificate(certificate: Path, key: Path, folder: Path = FOLDER) -> None:
    """Have PostgreSQL serve TLS with this certificate, from now on if it runs, else once it starts."""
    group = grp.getgrnam("postgres").gr_gid
    web.write_private(folder / "server.key", key.read_text(), mode=0o640, group=group)
    web.write_private(folder / "server.crt", certificate.read_text(), mode=0o640, group=group)
    web.write_private(folder / "tls.conf", TLS.format(folder=folder), mode=0o640, group=group)
    # One that is just starting is told by its unit to read it once it has started.
    subprocess.run(["systemctl", "reload", "--no-block", "mlflow-host-postgresql.service"], capture_output=True)


def started(folder: Path = FOLDER) -> None:
    """Make the role as it is to be. Called by PostgreSQL's user once PostgreSQL accepts connections."""
    if not (folder / "verifier").exists():
        return
    from mlflow_host.schema.cluster import Cluster

    make_role(Cluster(), (folder / "verifier").read_text())


def make_role(cluster: Cluster, password: str) -> None:
    """The role that reads all and changes nothing, whichever database is in service; `password` as a verifier.

    All is the catalogs as well, so it sees its own verifier there. No other role has one.
    """
    from mlflow_host.schema.cluster import connection, run, value

    with connection(cluster) as opened:
        if not value(opened, "SELECT 1 FROM pg_roles WHERE rolname = %s", (ROLE,)):
            run(opened, f"CREATE ROLE {ROLE}")
        run(opened, f"ALTER ROLE {ROLE} LOGIN INHERIT CONNECTION LIMIT {CONNECTIONS}")
        run(opened, f"ALTER ROLE {ROLE} PASSWORD %s", (password,))
        run(opened, f"GRANT pg_read_all_data TO {ROLE}")
        for setting in ("default_transaction_read_only = on", "statement_timeout = '10min'", "temp_file_limit = '1GB'"):
            run(opened, f"ALTER ROLE {ROLE} SET {setting}")
