"""A login token of RDS admits one user to one database for 15 minutes, if the signer's role allows rds-db:connect."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace
from typing import Any

import boto3
import pytest

from scripts.local_cloud import database_logins, permissions
from scripts.local_cloud.database_logins import bind_response, read_bind

REGION, HOST, RESOURCE = "eu-central-1", "one.aaaaaaaaaa.eu-central-1.rds.amazonaws.com", "db-ABC"
KEY, SECRET, SESSION = "ASIAABCDEFGHIJKLMNOP", "a-secret", "session/token+" * 300
CONNECT = f"arn:aws:rds-db:{REGION}:123456789012:dbuser:{RESOURCE}/mlflow"


class StubRoles:
    """Stand-in for Roles: one session, whose role has one policy statement."""

    def __init__(self, resource: str) -> None:
        statement = {"Effect": "Allow", "Action": "rds-db:connect", "Resource": resource}
        self.documents = [{"Statement": [statement]}]

    def secret(self, access_key: str, token: str) -> str | None:
        return SECRET if (access_key, token) == (KEY, SESSION) else None

    def refusal(self, environ: Any, request: permissions.Request) -> permissions.Denial | None:
        return permissions.denial(request, "caller", self.documents)


def token(user: str = "mlflow", host: str = HOST, port: int = 5432, region: str = REGION, secret: str = SECRET) -> str:
    session: Any = boto3.Session(KEY, secret, SESSION, region)
    made: str = session.client("rds").generate_db_auth_token(host, port, user)
    return made


def refusal(
    password: str, user: str = "mlflow", allowed: str = CONNECT, now: float | None = None, **record: Any
) -> Any:
    database = {
        "address": HOST,
        "port": 5432,
        "region": REGION,
        "account_id": "123456789012",
        "dbi_resource_id": RESOURCE,
        "enable_iam_database_authentication": True,
    }
    roles: Any = StubRoles(allowed)
    return database_logins.refusal(password, user, SimpleNamespace(**{**database, **record}), roles, now)


def test_signed_token_is_accepted_for_fifteen_minutes() -> None:
    made, now = token(), time.time()
    assert refusal(made) is None
    assert refusal(made, now=now + 890) is None
    assert refusal(made, now=now + 910) is not None
    assert refusal(made, now=now - 1000) is not None


@pytest.mark.parametrize(
    "arguments",
    [
        {"user": "boss"},
        {"host": "other.aaaaaaaaaa.eu-central-1.rds.amazonaws.com"},
        {"port": 5433},
        {"region": "eu-west-1"},
        {"secret": "another-secret"},
    ],
)
def test_token_for_something_else_is_refused(arguments: dict[str, Any]) -> None:
    assert refusal(token(**arguments)) is not None


def test_changed_tokens_and_passwords_are_refused() -> None:
    made = token()
    assert refusal(made.replace("X-Amz-Expires=900", "X-Amz-Expires=90000")) is not None
    assert refusal(made.replace("DBUser=mlflow", "DBUser=boss"), user="boss", allowed="*") is not None
    for other in (
        "",
        "a-password",
        HOST,
        f"{HOST}:5432/?Action=connect&DBUser=mlflow",
        made.replace("Signature=", "S="),
    ):
        assert refusal(other) is not None


def test_role_must_allow_the_user_of_this_database() -> None:
    assert refusal(token(), allowed=f"{CONNECT}2") is not None
    assert refusal(token(), allowed=CONNECT.replace(RESOURCE, "db-OTHER")) is not None
    assert refusal(token(), allowed=CONNECT.replace("/mlflow", "/*")) is None


def test_token_is_refused_while_iam_authentication_is_disabled() -> None:
    assert refusal(token(), enable_iam_database_authentication=False) is not None


def test_long_passwords_are_read_from_ldap_messages() -> None:
    def element(tag: int, content: bytes) -> bytes:
        size = len(content)
        length = bytes([size]) if size < 128 else bytes([0x83]) + size.to_bytes(3, "big")
        return bytes([tag]) + length + content

    name, password = b"user=mlflow", token().encode()
    bind = element(0x02, b"\x03") + element(0x04, name) + element(0x80, password)
    message = element(0x30, element(0x02, b"\x07") + element(0x60, bind))
    assert read_bind(io.BytesIO(message)) == (b"\x07", "mlflow", password.decode())
    assert read_bind(io.BytesIO(element(0x30, element(0x02, b"\x08") + element(0x42, b"")))) is None
    assert read_bind(io.BytesIO(b"")) is None
    assert bind_response(b"\x07", 49) == bytes.fromhex("300c02010761070a013104000400")
