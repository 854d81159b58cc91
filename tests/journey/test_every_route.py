"""No route of the installed MLflow answers a request without a login, in any spelling of the request. The tests write
the bytes of the requests themselves, because a client library would correct malformed requests.
"""

from __future__ import annotations

import base64
import contextlib
import re
import socket
import ssl
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mlflow_host.bake import reader_routes
from tests.support.servers import Server

pytestmark = pytest.mark.machine

REFUSALS = {400, 401, 403, 404, 405, 408, 411, 413, 414, 421, 429, 431, 501, 505}
"""The statuses that a request without a login may get. A result (2xx), a redirect (3xx) or an error behind the login
(5xx) is a fault."""

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "get")
UNUSUAL = {"Content-Type": "application/json", "Accept": "application/json"}


@dataclass
class Wire:
    """A connection to the server. A request opens a new connection if the server has closed the previous connection."""

    server: Server
    connection: socket.socket | None = None
    source: str = ""
    """The source address; "" for this machine's usual address."""

    def ask(self, request: bytes) -> int:
        """Return the status of the response to these bytes; 0 if the server closed the connection with no response."""
        for fresh in (False, True):
            if self.connection is None:
                self.connection, fresh = connect(self.server, self.source), True
            try:
                self.connection.sendall(request)
                status, keep = read_answer(self.connection, head=request.startswith(b"HEAD "))
            except OSError:
                status, keep = 0, False
            if not keep:
                self.close()
            if status or fresh:
                return status
        return 0

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def connect(server: Server, source: str = "") -> socket.socket:
    host = urllib.parse.urlsplit(server.url).hostname
    context = ssl.create_default_context(cafile=server.server_certificate)
    plain = socket.create_connection((host, 443), timeout=15, source_address=(source, 0))
    return context.wrap_socket(plain, server_hostname=host)


def read_answer(connection: socket.socket, *, head: bool) -> tuple[int, bool]:
    """Return the status of the next response, and whether the connection can be used again. Responses must be short."""
    received = b""
    while b"\r\n\r\n" not in received:
        if not (more := connection.recv(65536)):
            return 0, False
        received += more
    header, _, body = received.partition(b"\r\n\r\n")
    status = int(header.split()[1])
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", header)
    if length is None or re.search(rb"(?i)\r\nconnection: close", header):
        return status, head and b"close" not in header.lower()
    while not head and len(body) < int(length[1]):
        if not (more := connection.recv(65536)):
            return status, False
        body += more
    return status, True


@pytest.fixture
def wire(server: Server) -> Iterator[Wire]:
    made = Wire(server)
    yield made
    made.close()


@pytest.fixture(scope="module")
def paths() -> list[str]:
    """Return every path that the installed MLflow serves, with a value in place of each variable part."""
    found = {re.sub(r"<(\w+:)?[^>]+>", "1", route.path) for route in reader_routes.installed_routes()}
    assert len(found) > 150
    assert {"/version", "/health", "/graphql", "/api/2.0/mlflow/runs/search", "/v1/traces"} <= found
    return sorted({*found, "/docs", "/openapi.json", "/redoc", "/metrics", "/static-files/index.html", "/api/", "/"})


def host_of(server: Server) -> str:
    return urllib.parse.urlsplit(server.url).netloc


def request(
    server: Server, method: str, target: str, headers: dict[str, str] | None = None, body: bytes = b""
) -> bytes:
    lines = [f"{method} {target} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in {"Host": host_of(server), **(headers or {})}.items()]
    if body or method in ("POST", "PUT", "PATCH"):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def login(name: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}


def spellings(path: str) -> Iterator[str]:
    """Yield other spellings of a path. A careless server would treat such a spelling like the path itself, or like a
    path that needs no login."""
    yield "/" + path
    yield path.replace("/", "//")
    yield path + "/"
    yield path + "/."
    yield "/." + path
    yield path.upper()
    yield path.title()
    yield "/healthz/.." + path
    yield "/healthz/%2e%2e" + path
    yield "/healthz/..%2f" + path[1:]
    yield "/.well-known/acme-challenge/.." + path
    yield "/.well-known/acme-challenge/%2e%2e" + path
    yield "/static-files/.." + path
    yield "/static-files/static/%2e%2e/%2e%2e" + path
    yield path.replace("/", "/%2e/", 1)
    yield path.replace("/", "%2f")
    yield path[:1] + "".join(f"%{ord(letter):02x}" for letter in path[1:])
    yield path + "%00"
    yield path + "?/healthz"
    yield path + ";/healthz"
    yield path + "#/healthz"
    yield path.replace("/", "\\")
    yield "http://localhost" + path


def first(found: Iterable[Any], count: int = 10) -> list[Any]:
    """Return the first entries of `found`, which are enough to find a mistake. A test of all entries would take long,
    because each response is a page of MLflow."""
    return list(islice(found, count))


def test_no_route_answers_without_a_login(server: Server, wire: Wire, paths: list[str]) -> None:
    answered = first(
        (method, path, status)
        for path in paths
        for method in METHODS
        if (status := wire.ask(request(server, method, path, UNUSUAL))) not in REFUSALS
    )
    assert answered == []


def test_no_route_answers_to_a_wrong_login(server: Server, paths: list[str]) -> None:
    """Each path is requested from a different source address. An address with many failed logins gets 429, which would
    hide the result of this test."""
    wrong: list[Callable[[int], dict[str, str]]] = [
        lambda n: login(f"nobody-{n}", "wrong"),
        lambda n: login(f"nobody-{n}", ""),
        lambda n: {"Authorization": f"Bearer {n}"},
        lambda n: {"Authorization": f"Basic {n}"},
        lambda n: {"Authorization": "Basic"},
        lambda n: {"Authorization": "Negotiate YII="},
        lambda n: {"Cookie": f"session={n}; user=admin"},
    ]
    answered = []
    for number, path in enumerate(paths):
        wire = Wire(server, source=f"127.200.{number // 200}.{number % 200 + 1}")
        statuses = [wire.ask(request(server, "GET", path, {**UNUSUAL, **made(number)})) for made in wrong]
        wire.close()
        answered += [(how, path, status) for how, status in enumerate(statuses) if status != 401]
    assert first(answered) == []


def test_no_spelling_of_a_path_bypasses_the_login(server: Server, wire: Wire, paths: list[str]) -> None:
    answered = first(
        (target, status)
        for path in paths
        for target in spellings(path)
        # The health check needs no login. A path that resolves to the health check needs no login either.
        if (status := wire.ask(request(server, "GET", target, UNUSUAL))) not in REFUSALS
    )
    assert answered == []


HEADERS = {
    "X-Original-URL": "/healthz",
    "X-Rewrite-URL": "/healthz",
    "X-Original-URI": "/healthz",
    "X-Forwarded-For": "127.0.0.1",
    "X-Forwarded-Host": "localhost",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Prefix": "/healthz",
    "X-Forwarded-User": "admin",
    "X-Real-IP": "127.0.0.1",
    "X-Remote-User": "admin",
    "Remote-User": "admin",
    "X-Accel-Redirect": "/mlflow-host-health",
    "X-HTTP-Method-Override": "GET",
    "X-Login": "ok",
    "X-Login-Key": "",
    "X-May-Not": "",
    "Forwarded": "for=127.0.0.1;host=localhost;proto=https",
    "Via": "1.1 localhost",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Range": "bytes=0-",
    "If-None-Match": "*",
    "Authorization-X": "Basic YTph",
    "Proxy-Authorization": "Basic YTph",
}


def test_no_header_bypasses_the_login(server: Server, wire: Wire, paths: list[str]) -> None:
    answered = first(
        (name, path, status)
        for path in paths[:: max(1, len(paths) // 40)]
        for name, value in HEADERS.items()
        if (status := wire.ask(request(server, "GET", path, {name: value}))) not in REFUSALS
    )
    assert answered == []
    answered = first(
        (path, status) for path in paths if (status := wire.ask(request(server, "GET", path, HEADERS))) not in REFUSALS
    )
    assert answered == []


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "evil.example", "169.254.169.254", "", "[::1]", "a b", "_"])
def test_other_hosts_are_refused_with_any_login(server: Server, wire: Wire, host: str) -> None:
    """MLflow without nginx accepts the host localhost."""
    for target in ("/version", f"http://{host or 'x'}/version", "/api/2.0/mlflow/experiments/search?max_results=1"):
        for extra in ({}, {"X-Forwarded-Host": host_of(server)}, {"Origin": server.url}):
            right = login(*server.login)
            status = wire.ask(request(server, "GET", target, {"Host": host, **right, **extra}))
            assert status in {400, 403, 404, 421}, (target, extra)


def test_host_given_twice_or_in_the_target_is_refused_or_the_one_served(server: Server, wire: Wire) -> None:
    right = "".join(f"{name}: {value}\r\n" for name, value in login(*server.login).items())
    twice = f"GET /version HTTP/1.1\r\nHost: {host_of(server)}\r\nHost: evil.example\r\n{right}\r\n"
    assert wire.ask(twice.encode()) == 400
    none = f"GET /version HTTP/1.1\r\n{right}\r\n"
    assert wire.ask(none.encode()) == 400


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost", "https://127.0.0.1.evil.example"]
)
def test_pages_of_other_origins_are_refused_on_every_route(
    origin: str, server: Server, wire: Wire, paths: list[str]
) -> None:
    for path in paths[:: max(1, len(paths) // 40)]:
        for method in ("GET", "POST", "OPTIONS"):
            status = wire.ask(request(server, method, path, {"Origin": origin, **login(*server.login)}))
            assert status == 403, (method, path)


SMUGGLED = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED),
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: +0\r\n\r\n",
        b"Content-Length: -1\r\n\r\n",
        b"Content-Length: 0x0\r\n\r\n",
        b"X: y\nContent-Length: 0\r\n\r\n",
        b" folded: header\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_no_second_request_is_smuggled_behind_the_first(framing: bytes, server: Server) -> None:
    """A body of unclear length can hide a second request without a login. The server must not answer such a second
    request."""
    first = f"POST /healthz HTTP/1.1\r\nHost: {host_of(server)}\r\n".encode() + framing
    with connect(server) as connection:
        connection.settimeout(3)
        connection.sendall(first + SMUGGLED)
        received = b""
        try:
            while more := connection.recv(65536):
                received += more
        except OSError:
            pass
    statuses = [int(code) for code in re.findall(rb"HTTP/1\.[01] (\d{3})", received)]
    assert server.mlflow_version.encode() not in received
    assert set(statuses) <= {*REFUSALS, 200}
    assert statuses.count(200) <= 1, "the health check may answer to a POST, MLflow may not"


def test_too_large_requests_are_refused(server: Server, wire: Wire) -> None:
    right = login(*server.login)
    for made in (
        request(server, "GET", "/version", {**right, "X-Large": "x" * 70_000}),
        request(server, "GET", "/version", {**right, **{f"X-{n}": "x" * 8000 for n in range(12)}}),
        request(server, "GET", "/version?" + "x" * 70_000, right),
        request(server, "GET", "/version", {"Authorization": "Basic " + "A" * 60_000}),
        request(server, "G" * 5000, "/version"),
    ):
        assert wire.ask(made) in {0, 400, 401, 405, 414, 431}
    assert wire.ask(request(server, "GET", "/version", right)) == 200


def test_the_health_check_is_all_that_is_open(server: Server, wire: Wire) -> None:
    """With a login the server answers, so the refusals in the other tests are caused by the missing login."""
    assert wire.ask(request(server, "GET", "/healthz")) == 200
    assert wire.ask(request(server, "GET", "/version", login(*server.login))) == 200


def test_right_logins_are_never_too_many(server: Server, wire: Wire) -> None:
    """nginx must be able to write its files for logins. nginx allows a hundred first logins at the same time."""
    right = request(server, "GET", "/static-files/favicon.ico", login(*server.login))
    assert {wire.ask(right) for _ in range(150)} == {200}


def test_port_80_only_redirects(server: Server) -> None:
    host = host_of(server)
    for target, wanted in (("/", 308), ("/version", 308), ("/healthz", 308), ("/.well-known/acme-challenge/x", 404)):
        with socket.create_connection((host, 80), timeout=10) as connection:
            connection.sendall(request(server, "GET", target, {**login(*server.login), "Connection": "close"}))
            answer = connection.recv(65536).decode()
        assert answer.split()[1] == str(wanted), target
        assert wanted != 308 or f"Location: {server.url}{target}\r\n" in answer


@pytest.mark.slow
def test_thousand_idle_and_slow_clients_do_not_block_others(server: Server, wire: Wire) -> None:
    """Some clients send nothing. Other clients stop in the middle of the TLS handshake, of the header or of the body.
    The server closes all connections except those of clients that stop in the middle of the body."""
    host, right = host_of(server), login(*server.login)
    held: list[socket.socket] = []
    silent = 1025
    try:
        for number in range(1000):
            held.append(socket.create_connection((host, 443), timeout=15))
            if number % 4 == 1:
                held[-1].sendall(b"\x16\x03\x01")
        for begun in (b"GET /version HTTP/1.1\r\nHo", request(server, "POST", "/graphql", {**right}, b"x" * 9)[:-5]):
            for _ in range(25):
                held.append(connect(server))
                held[-1].sendall(begun)
        for _ in range(20):
            assert wire.ask(request(server, "GET", "/version", right)) == 200
            assert wire.ask(request(server, "GET", "/graphql", {**right, "Content-Length": str(1 << 40)})) == 413
            assert wire.ask(request(server, "GET", "/version", {"X-Large": "x" * 70_000})) in {400, 414, 431}
        for connection in held[:silent]:
            connection.settimeout(40)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b"", "the server did not close the connection"
    finally:
        for connection in held:
            connection.close()
    assert wire.ask(request(server, "GET", "/version", right)) == 200


@pytest.mark.slow
@hypothesis_settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(
    st.binary(min_size=1, max_size=300), st.binary(max_size=2000), st.sampled_from(["GET", "POST", "PUT", "\x00", ""])
)
def test_random_bytes_get_no_response_without_a_login(server: Server, target: bytes, rest: bytes, method: str) -> None:
    sent = method.encode() + b" /" + target + b" HTTP/1.1\r\nHost: " + host_of(server).encode() + b"\r\n" + rest
    wire = Wire(server)
    status = wire.ask(sent + b"\r\nConnection: close\r\n\r\n")
    assert status in REFUSALS | {0} or (status == 200 and target.startswith(b"healthz"))
    wire.close()
