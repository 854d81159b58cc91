"""IAM authentication of databases: verify the login tokens of "IAM database authentication" (RDS user guide).

A token is a presigned URL without its scheme, and a client sends it as the password. On RDS, PostgreSQL passes the
passwords of members of rds_iam to a PAM module of Amazon. Debian has no such module: pam_exec shortens a password to
512 bytes, and RADIUS to 128. PostgreSQL's method `ldap` sends passwords of any length. Each database's network
namespace therefore has an LDAP server on its loopback address, which supports only the simple bind (RFC 4511, 4.2).
"""

from __future__ import annotations

import hmac
import io
import socket
import socketserver
import threading
import time
from calendar import timegm
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

from scripts.local_cloud import permissions, signatures
from scripts.local_cloud.database_server import LOGIN_PREFIX
from scripts.local_cloud.roles import Roles

VALID_SECONDS = 900
SEQUENCE, PASSWORD, BIND = 0x30, 0x80, 0x60
SUCCESS, INVALID_CREDENTIALS = 0, 49


class LoginServer:
    """The LDAP server of one database. This object owns the socket and its threads."""

    def __init__(self, listening: socket.socket, accepts: Callable[[str, str], bool]) -> None:
        """`accepts` returns whether the token (second argument) is valid for the database user (first argument)."""

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while bind := read_bind(self.rfile):
                    number, user, token = bind
                    self.wfile.write(bind_response(number, SUCCESS if accepts(user, token) else INVALID_CREDENTIALS))

        self._server = socketserver.ThreadingTCPServer(listening.getsockname(), Handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = listening
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.2,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def read_bind(stream: io.BufferedIOBase) -> tuple[bytes, str, str] | None:
    """Return the message ID, the user and the password of the next message, or None if it is not a simple bind."""
    tag, content = _element(stream)
    if tag != SEQUENCE:
        return None
    message = io.BytesIO(content)
    (_, number), (operation, content) = _element(message), _element(message)
    bind = io.BytesIO(content)
    _, (_, name), (method, password) = _element(bind), _element(bind), _element(bind)
    if (operation, method) != (BIND, PASSWORD):
        return None
    return number, name.decode().removeprefix(LOGIN_PREFIX), password.decode()


def _element(stream: io.BufferedIOBase) -> tuple[int, bytes]:
    """Read one element of BER (X.690): its tag and its content. At the end of the stream, the tag is 0."""
    head = stream.read(2)
    if len(head) < 2:
        return 0, b""
    tag, length = head
    if length & 0x80:
        length = int.from_bytes(stream.read(length & 0x7F), "big")
    return tag, stream.read(length)


def bind_response(number: bytes, result: int) -> bytes:
    body = bytes([0x02, len(number)]) + number + bytes([0x61, 7, 0x0A, 1, result, 0x04, 0, 0x04, 0])
    return bytes([SEQUENCE, len(body)]) + body


def refusal(token: str, user: str, database: Any, roles: Roles, now: float | None = None) -> str | None:
    """Return why `token` does not admit `user` to the database of moto's record `database`, or None if it does. The
    caller must hold the API lock."""
    host, _, query = token.partition("/?")
    asked = dict(parse_qsl(query))
    if not database.enable_iam_database_authentication:
        return "IAM database authentication is disabled"
    if host != f"{database.address}:{database.port}":
        return "the token is for another host, or the password is no token"
    if (asked.get("Action"), asked.get("DBUser")) != ("connect", user):
        return "the token is for another user"
    environ = {
        "REQUEST_METHOD": "GET",
        "RAW_URI": "/?" + "&".join(each for each in query.split("&") if not each.startswith("X-Amz-Signature=")),
        "HTTP_HOST": host,
        "HTTP_AUTHORIZATION": f"Credential={asked.get('X-Amz-Credential', '')}",
        "HTTP_X_AMZ_SECURITY_TOKEN": asked.get("X-Amz-Security-Token", ""),
    }
    access_key, day, region, service = permissions.credential_scope(environ)
    if (region, service) != (database.region, "rds-db"):
        return f"the token is signed for {service} in {region}"
    secret = roles.secret(access_key, environ["HTTP_X_AMZ_SECURITY_TOKEN"])
    if secret is None:
        return "the token is signed with an unknown access key"
    stamp, scope = asked.get("X-Amz-Date", ""), f"{day}/{region}/{service}/aws4_request"
    canonical = signatures.canonical_request(environ, ["host"], signatures.digest_of(b""), service)
    expected = signatures.signature(secret, stamp, scope, canonical)
    if not hmac.compare_digest(expected.encode(), asked.get("X-Amz-Signature", "").encode()):
        return "the signature is wrong"
    age = (time.time() if now is None else now) - timegm(time.strptime(stamp, "%Y%m%dT%H%M%SZ"))
    if not -signatures.SKEW_SECONDS < age < min(VALID_SECONDS, int(asked.get("X-Amz-Expires", "0"))):
        return f"the token is {age:.0f} s old"
    account_and_user = f"{database.account_id}:dbuser:{database.dbi_resource_id}/{user}"
    resource = f"arn:aws:rds-db:{region}:{account_and_user}"
    context = {"aws:RequestedRegion": region, "aws:SecureTransport": "true"}
    denial = roles.refusal(environ, permissions.Request(service, "rds-db:connect", (resource,), context))
    return denial.message if denial else None
