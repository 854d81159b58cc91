"""The instance metadata service: http://169.254.169.254 inside a machine.

Paths and responses follow AWS's "Instance metadata categories". The instance's MetadataOptions determine whether tokens
(IMDSv2) are required. cloud-init is an exception: it requests tokens only if DMI tables show EC2 hardware, and machines
of the local cloud have no DMI tables. Requests with cloud-init's User-Agent are therefore accepted without a token.
"""

from __future__ import annotations

import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ADDRESS = "169.254.169.254"
VERSION = re.compile(r"latest|\d{4}-\d{2}-\d{2}|1\.0")
CLOUD_INIT_AGENTS = ("Cloud-Init/", "python-requests/")
LONGEST_TOKEN_SECONDS = 21600

Tree = Mapping[str, "Tree | str"]


@dataclass(frozen=True)
class Metadata:
    """The content of the metadata service at one moment.

    `tree` is the folder meta-data: a mapping is a folder, and a string is a file. `tokens` is "required" or "optional".
    """

    tree: Tree
    identity_document: Mapping[str, Any]
    user_data: bytes | None
    public_keys: Mapping[str, str] = field(default_factory=dict)
    enabled: bool = True
    tokens: str = "required"
    hop_limit: int = 1


class MetadataService:
    """The metadata service of one machine, on a socket in the machine's network namespace. This object owns the socket
    and a thread."""

    def __init__(self, listening: socket.socket, read: Callable[[], Metadata | None]) -> None:
        """`read` returns the current metadata, or None if the instance has no metadata."""
        self._tokens: dict[str, float] = {}
        self._read = read
        service = self

        class Handler(_Handler):
            metadata_service = service

        self._server = ThreadingHTTPServer((ADDRESS, 80), Handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = listening
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def metadata(self) -> Metadata | None:
        return self._read()

    def issue_token(self, seconds: int) -> str:
        token = secrets.token_urlsafe(40)
        now = time.monotonic()
        self._tokens = {known: until for known, until in self._tokens.items() if until > now}
        self._tokens[token] = now + seconds
        return token

    def knows_token(self, token: str) -> bool:
        return self._tokens.get(token, 0) > time.monotonic()


class _Handler(BaseHTTPRequestHandler):
    metadata_service: MetadataService
    protocol_version = "HTTP/1.1"
    server_version = "EC2ws"
    sys_version = ""

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, because requests contain credentials."""

    def do_PUT(self) -> None:
        metadata = self.metadata_service.metadata()
        if not self._allowed(metadata):
            return
        assert metadata is not None
        if self.path.rstrip("/") != "/latest/api/token":
            self._answer(404)
            return
        try:
            seconds = int(self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", ""))
        except ValueError:
            seconds = 0
        if not 1 <= seconds <= LONGEST_TOKEN_SECONDS:
            self._answer(400)
            return
        self.connection.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, max(1, metadata.hop_limit))
        token = self.metadata_service.issue_token(seconds)
        self._answer(200, token.encode(), {"X-aws-ec2-metadata-token-ttl-seconds": str(seconds)})

    def do_GET(self) -> None:
        metadata = self.metadata_service.metadata()
        if not self._allowed(metadata):
            return
        assert metadata is not None
        token = self.headers.get("X-aws-ec2-metadata-token")
        if token is not None and not self.metadata_service.knows_token(token):
            self._answer(401)
            return
        by_cloud_init = self.headers.get("User-Agent", "").startswith(CLOUD_INIT_AGENTS)
        if token is None and metadata.tokens == "required" and not by_cloud_init:
            self._answer(401)
            return
        body = look_up(metadata, self.path.partition("?")[0])
        self._answer(404 if body is None else 200, body or b"")

    do_HEAD = do_GET

    def _allowed(self, metadata: Metadata | None) -> bool:
        if metadata is None or not metadata.enabled or self.headers.get("X-Forwarded-For") is not None:
            self._answer(403)
            return False
        return True

    def _answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def look_up(metadata: Metadata, path: str) -> bytes | None:
    """Return the body of the response to GET `path`, or None for 404."""
    parts = [part for part in path.split("/") if part]
    if not parts:
        return b"1.0\n2009-04-04\n2016-09-02\n2018-09-24\n2021-03-23\nlatest"
    if not VERSION.fullmatch(parts[0]):
        return None
    match parts[1:]:
        case []:
            return b"dynamic\nmeta-data" + (b"\nuser-data" if metadata.user_data is not None else b"")
        case ["user-data"]:
            return metadata.user_data
        case ["dynamic"]:
            return b"instance-identity/"
        case ["dynamic", "instance-identity"]:
            return b"document"
        case ["dynamic", "instance-identity", "document"]:
            return json.dumps(metadata.identity_document, indent=2).encode()
        case ["meta-data", "public-keys", *rest]:
            return _public_keys(metadata.public_keys, rest)
        case ["meta-data", *rest]:
            tree: Tree = metadata.tree
            if metadata.public_keys:
                tree = {**tree, "public-keys": {"": ""}}
            return _walk(tree, rest)
    return None


def _public_keys(keys: Mapping[str, str], rest: list[str]) -> bytes | None:
    names = list(keys)
    match rest:
        case _ if not names:
            return None
        case []:
            return "\n".join(f"{index}={name}" for index, name in enumerate(names)).encode()
        case [index] if index.isdigit() and int(index) < len(names):
            return b"openssh-key"
        case [index, "openssh-key"] if index.isdigit() and int(index) < len(names):
            return keys[names[int(index)]].strip().encode() + b"\n"
    return None


def _walk(tree: Tree, path: list[str]) -> bytes | None:
    found: Tree | str = tree
    for part in path:
        if isinstance(found, str) or part not in found:
            return None
        found = found[part]
    if isinstance(found, str):
        return found.encode()
    return "\n".join(name if isinstance(below, str) else f"{name}/" for name, below in sorted(found.items())).encode()
