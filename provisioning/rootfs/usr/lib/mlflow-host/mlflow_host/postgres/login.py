"""Logins to PostgreSQL on another host, such as Amazon RDS: parameters for TLS, tokens, and password files in memory.

This module imports no psycopg2, so the boot step `configure` can import it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mlflow_host.machine import aws

PasswordOf = Callable[[str], str]
"""Returns the password of a role for one new connection. Raises aws.NoRole if AWS credentials for a token are missing.
"""

RDS_AUTHORITIES = Path("/usr/share/mlflow-host/rds-authorities.pem")
"""Amazon's authorities for Amazon RDS in all commercial regions that the file lists."""

RENEW_BEFORE = timedelta(minutes=5)
"""A token is valid only as long as the credentials that signed it, so credentials are read again before they expire."""


def tls_parameters(authority: Path) -> dict[str, str]:
    """libpq's parameters for a server on another host. `authority` is the PEM file with the server's authorities.

    A server that stops answering, for example in a failover, is detected after 25 s. A connection to a standby server
    is refused, because the server's name refers to the former primary for some seconds after a failover."""
    return {
        "sslmode": "verify-full",
        "sslrootcert": str(authority),
        "keepalives_idle": "10",
        "keepalives_interval": "5",
        "keepalives_count": "3",
        "tcp_user_timeout": "25000",
        "target_session_attrs": "primary",
    }


SERVER_KEEPALIVES = " ".join(
    f"-c {name}={number}"
    for name, number in (
        ("tcp_keepalives_idle", 10),
        ("tcp_keepalives_interval", 5),
        ("tcp_keepalives_count", 3),
        ("tcp_user_timeout", 25000),
    )
)
"""Session options with which the server detects after 25 s that a client's machine no longer exists. The server then
releases the locks of this client."""


class TokenLogin:
    """IAM authentication of Amazon RDS: signs a token for each connection. The AWS credentials are read again before
    they expire."""

    def __init__(self, host: str, port: int, region: str, read_keys: Callable[[], aws.Keys] = aws.role_keys):
        self._host, self._port, self._region, self._read_keys = host, port, region, read_keys
        self._lock = threading.Lock()
        self._keys: aws.Keys | None = None

    def __call__(self, role: str) -> str:
        now = datetime.now(UTC)
        with self._lock:
            if self._keys is None or not _is_valid(self._keys, now):
                self._keys = self._read_keys()
            keys = self._keys
        return aws.database_token(self._host, self._port, role, self._region, keys, now)


def _is_valid(keys: aws.Keys, now: datetime) -> bool:
    return bool(keys.expires) and datetime.fromisoformat(keys.expires) - now > RENEW_BEFORE


class PasswordFile:
    """A password file of libpq in memory, for a child process. Only processes that inherit `descriptors` can read the
    file. Without a password source, `path` is "", and libpq uses no password."""

    def __init__(self, read_password: Callable[[], str] | None):
        self._read_password = read_password
        self.descriptors: tuple[int, ...] = ()
        self.path = ""
        if read_password:
            descriptor = os.memfd_create("login")
            os.fchmod(descriptor, 0o600)  # libpq ignores a password file that other users can read
            self.descriptors, self.path = (descriptor,), f"/proc/self/fd/{descriptor}"
            self.renew()

    def renew(self) -> None:
        """Write a new password for the next connection. A token is valid for 15 minutes."""
        if not self._read_password:
            return
        escaped = self._read_password().replace("\\", "\\\\").replace(":", "\\:")
        content = f"*:*:*:*:{escaped}\n".encode()
        (descriptor,) = self.descriptors
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
