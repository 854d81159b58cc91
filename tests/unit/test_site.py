"""Test a real nginx with the site that the boot writes. A stand-in for MLflow's processes is the upstream."""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import json
import os
import shutil
import signal
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from mlflow_host.boot import private_ca
from mlflow_host.contract import credentials, launch, sizing
from mlflow_host.machine import config, nginx, status
from mlflow_host.monitor import metrics, request_log, scraping
from tests.support.services import free_port
from tests.support.shipped_nginx import HOST as LOOPBACK
from tests.support.shipped_nginx import ROOTFS, moved, running_nginx, starting_site

USERS = (
    credentials.User("ada", "correct horse", "admin"),
    credentials.User("bob", "{PLAIN}no", "writer"),
    credentials.User("rita", "reads", "reader"),
    credentials.User("will", "writes", "writer"),
)
HOST = "mlflow.example.com"
TEMPLATES = ROOTFS / "usr/share/mlflow-host/templates"
LOG_BUFFER = " buffer=32k flush=1s"

pytestmark = [
    pytest.mark.service,
    pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed (scripts/prepare.sh installs it)"),
]


class Upstream(socketserver.ThreadingUnixStreamServer):
    """A stand-in for one MLflow process. The stand-in returns the request that it received. The path of the request
    selects what else the stand-in does."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        super().__init__(str(path), Asked)
        path.chmod(0o666)
        self.asked: list[tuple[str, str, dict[str, str], int]] = []
        self.database_answers = True
        self.seconds_to_health = 0.0
        self.first_byte = threading.Event()
        self.go_on = threading.Event()


class Asked(BaseHTTPRequestHandler):
    server: Upstream
    protocol_version = "HTTP/1.1"

    def address_string(self) -> str:
        return "socket"

    def log_message(self, *_: object) -> None:
        return

    def body(self) -> int:
        """Read the body in pieces, and return its length."""
        length = 0
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.server.first_byte.set()
                length += len(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        for _ in range(int(self.headers.get("Content-Length") or 0) // 65536 + 1):
            wanted = min(65536, int(self.headers.get("Content-Length") or 0) - length)
            if wanted > 0:
                length += len(self.rfile.read(wanted))
                self.server.first_byte.set()
        return length

    def answer(self, code: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.path.startswith(METRIC):
            self.send_header("X-MLflow-Host-Ids", "run_id=abc&name=a%20b")
            self.send_header("X-MLflow-Host-Answer", "direct")
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path, dict(self.headers.items()), self.body()))
        if self.path == "/mlflow-host-health":
            self.answer(200 if self.server.database_answers else 503, b"")
        elif self.path.startswith("/busy"):
            self.answer(503, b'{"error_code": "TEMPORARILY_UNAVAILABLE", "message": "MLflow said this"}')
        elif self.path == "/health":
            self.server.asked.pop()
            time.sleep(self.server.seconds_to_health)
            with contextlib.suppress(BrokenPipeError):  # nginx closes the connection of a slow health check
                self.answer(200, b"OK", "text/plain")
        elif self.path.startswith("/moved"):
            self.send_response(308)
            to = {"/moved/away": "http://s3.example.com/key"}.get(self.path, f"http://{self.headers['Host']}/there?x=1")
            self.send_header("Location", to)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path.startswith("/dies"):
            self.close_connection = True
        elif self.path.startswith("/broken"):
            self.answer(500, b'{"error_code": "INTERNAL_ERROR", "message": "MLflow said this"}')
        elif self.path.startswith("/get-artifact"):
            self.send_response(200)
            self.send_header("Content-Length", "11")
            self.end_headers()
            self.wfile.write(b"first\n")
            self.wfile.flush()
            self.server.go_on.wait(20)
            self.wfile.write(b"last\n")
        elif self.path.startswith("/gateway/"):
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"6\r\nfirst\n\r\n")
            self.wfile.flush()
            self.server.go_on.wait(20)
            self.wfile.write(b"5\r\nlast\n\r\n0\r\n\r\n")
        else:
            self.answer(200, json.dumps({"path": self.path, "filler": "x" * 5000}).encode())

    do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_PROPFIND = do_GET


@dataclass
class Site:
    port: int
    upstreams: list[Upstream]
    run: Path
    folder: Path
    nginx: int = 0

    def reload(self, until: Callable[[], bool]) -> None:
        """Make nginx reload its configuration, and wait until `until` returns true."""
        os.kill(self.nginx, signal.SIGHUP)
        ends = time.monotonic() + 20
        while not until():
            assert time.monotonic() < ends, "nginx continues with the old configuration"
            time.sleep(0.05)

    def connection(self, source: str | None = None) -> http.client.HTTPConnection:
        where = None if source is None else (source, 0)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20, source_address=where)

    def ask(
        self,
        path: str,
        *,
        method: str = "GET",
        user: str | None = "ada:correct horse",
        host: str = HOST,
        source: str | None = None,
        **headers: str,
    ) -> tuple[int, dict[str, str], bytes]:
        """Send a request, and return status, headers (names in lower case) and body. In the names of `headers`,
        underscores stand for hyphens."""
        sent = {"Host": host} | {name.replace("_", "-"): value for name, value in headers.items()}
        if user:
            sent["Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
        connection = self.connection(source)
        connection.request(method, path, headers=sent)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()

    def asked(self) -> list[tuple[str, str, dict[str, str], int]]:
        return [request for upstream in self.upstreams for request in upstream.asked]


def host_config(processes: int) -> config.HostConfig:
    document = launch.LaunchDocument(
        stack=launch.Stack("dev", "eu-central-1"),
        buckets=launch.Buckets("aaa", "mmm", "bbb"),
        credentials=launch.CredentialsParameter("/x"),
        data_volume=launch.DataVolume("vol-01234567"),
        web=launch.Web((HOST, "127.0.0.1")),
    )
    sized = sizing.size(sizing.MachineSize(2048, 2))
    return config.host_config(document, replace(sized, server_processes=processes))


def unconfigured(folder: Path, port: int, encrypted: int | None = None) -> Path:
    """Write the configuration of a starting machine below `folder`, and return nginx.conf. `port` replaces port 80, and
    `encrypted` replaces port 443."""
    listens = {80: f"{LOOPBACK}:{port}", 443: f"{LOOPBACK}:{encrypted or free_port()}"}
    configuration = starting_site(folder, listens)
    status.publish(folder / "run/mlflow-host", folder / "usr/share/mlflow-host/page.html")
    return configuration


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder outside pytest's folder, because the user of nginx's workers cannot access pytest's folder."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="mlflow-site-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def site(folder: Path) -> Iterator[Site]:
    with running_site(folder) as running:
        yield running


@contextlib.contextmanager
def running_site(folder: Path) -> Iterator[Site]:
    """Run the site of a machine with stand-ins for two MLflow processes."""
    port = free_port()
    configuration = unconfigured(folder, port)
    run = folder / "run/mlflow-host"
    ui = folder / "ui"
    (ui / "static/js").mkdir(parents=True)
    (ui / "static/js/main.0a1b2c3d.js").write_text("console.log(1);" * 500)
    (ui / "static/js/main.0a1b2c3d.js.gz").write_bytes(gzip.compress(b"from the compressed file"))
    (ui / "favicon.ico").write_text("icon")
    rendered = nginx.render_site(host_config(2), ui, templates=TEMPLATES, run=run)
    rendered = moved(rendered, folder, {80: f"{LOOPBACK}:{port}"})
    # Shorten the time for which nginx refuses a user after too many failed logins.
    rendered = rendered.replace("max-age=30 always", "max-age=1 always")
    # Disable the log buffer, so that the lines of the log have the order of the requests.
    configuration.write_text(configuration.read_text().replace(LOG_BUFFER, ""))
    assert LOG_BUFFER in rendered
    rendered = rendered.replace(LOG_BUFFER, "")
    nginx.put_login_page(host_config(2), templates=TEMPLATES, run=run)
    (run / "nginx/site.conf").write_text(rendered)
    (run / "nginx/users").write_text(credentials.password_file(USERS))
    nginx.put_roles(USERS, run=run)
    (folder / "usr/share/mlflow-host/reader-posts.map").write_text('"~^/api/2\\.0/mlflow/runs/search(\\?|$)" 1;\n')
    upstreams = [Upstream(folder / f"run/mlflow/server-{n}.sock") for n in (1, 2)]
    for upstream in upstreams:
        threading.Thread(target=upstream.serve_forever, args=(0.02,), daemon=True).start()
    try:
        with running_nginx(configuration, port, folder / "nginx.log") as process:
            yield Site(port, upstreams, run, folder, process.pid)
    finally:
        for upstream in upstreams:
            upstream.go_on.set()
            upstream.shutdown()
            upstream.server_close()


def stop(site: Site) -> None:
    for upstream in site.upstreams:
        upstream.shutdown()
        upstream.server_close()
        Path(str(upstream.server_address)).unlink()


# ── Before the machine is configured ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "accept", "kind"),
    [
        ("/", "text/html,application/xhtml+xml", "text/html"),
        ("/", "*/*", "application/json"),
        ("/api/2.0/mlflow/runs/create", "text/html", "application/json"),
        ("/ajax-api/2.0/mlflow/runs/create", "text/html", "application/json"),
        ("/healthz", "text/html", "application/json"),
        ("/experiments", "text/html", "text/html"),
    ],
)
def test_starting_page_is_html_for_browsers_and_json_for_clients(
    path: str, accept: str, kind: str, folder: Path
) -> None:
    port = free_port()
    with running_nginx(unconfigured(folder, port), port, folder / "nginx.log"):
        site = Site(port, [], folder / "run/mlflow-host", folder)
        code, headers, body = site.ask(path, user=None, host="anything.at.all", Accept=accept)
        expected = 503 if kind == "text/html" or path == "/healthz" else 429
        assert (code, headers["content-type"].split(";")[0]) == (expected, kind)
        assert "retry-after" not in headers
        assert headers["cache-control"] == "no-store"
        assert (b"MLflow is starting" in body) if kind == "text/html" else json.loads(body)["state"] == "starting"
        assert site.ask(path, method="POST", user=None, Accept=accept)[0] == expected
        (folder / "run/mlflow-host/web/failed").touch()
        assert site.ask(path, method="POST", user=None, Accept=accept)[0] == 503


def test_starting_page_is_on_both_ports_with_a_certificate_of_its_own(folder: Path) -> None:
    port, encrypted = free_port(), free_port()
    with running_nginx(unconfigured(folder, port, encrypted), port, folder / "nginx.log"):
        anything = ssl.create_default_context()
        anything.check_hostname, anything.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection("127.0.0.1", encrypted, timeout=20, context=anything)
        connection.request("GET", "/", headers={"Accept": "text/html"})
        answer = connection.getresponse()
        assert (answer.status, answer.headers["X-Certificate"]) == (503, "temporary")
        assert b"MLflow is starting" in answer.read()
        assert (folder / "run/nginx/starting.key").stat().st_mode & 0o077 == 0


def test_starting_page_has_the_certificate_of_the_stack_as_soon_as_it_is_at_hand(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, encrypted = free_port(), free_port()
    made = private_ca.ensure((HOST,), folder / "srv/mlflow/certificates")
    trusted = ssl.create_default_context(cafile=str(made.ca))
    with running_nginx(unconfigured(folder, port, encrypted), port, folder / "nginx.log") as process:
        monkeypatch.setattr(nginx, "reload", lambda: os.kill(process.pid, signal.SIGHUP))
        certificate = nginx.Certificate(made.certificate, made.key, trusted=False)
        nginx.put_starting_certificate(certificate, run=folder / "run/mlflow-host")
        ends = time.monotonic() + 20
        while True:
            try:
                with (
                    socket.create_connection(("127.0.0.1", encrypted)) as plain,
                    trusted.wrap_socket(plain, server_hostname=HOST) as shown,
                ):
                    shown.sendall(f"GET / HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())
                    answer = http.client.HTTPResponse(shown)
                    answer.begin()
                    break
            except ssl.SSLCertVerificationError:
                assert time.monotonic() < ends, "the temporary certificate is still served"
                time.sleep(0.05)
        assert (answer.status, answer.headers["X-Certificate"]) == (429, None)


def test_reason_of_a_failure_is_on_the_page(folder: Path) -> None:
    port = free_port()
    with running_nginx(unconfigured(folder, port), port, folder / "nginx.log"):
        site = Site(port, [], folder / "run/mlflow-host", folder)
        with pytest.raises(SystemExit), status.step("data-volume", site.run):
            raise status.StepFailed("the volume vol-0 was not attached: attach it & reboot <now>")
        status.publish(site.run, folder / "usr/share/mlflow-host/page.html")
        _, _, page = site.ask("/", user=None, Accept="text/html")
        assert b"MLflow could not start" in page
        assert b"the volume vol-0 was not attached: attach it &amp; reboot &lt;now&gt;" in page
        _, _, body = site.ask("/", user=None)
        assert json.loads(body)["state"] == "failed"
        assert "attach it & reboot <now>" in json.loads(body)["message"]


# ── Access ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("user", [None, "ada:wrong", "ada:", "bob:no", "eve:correct horse", "ADA:correct horse"])
def test_every_route_needs_the_password(user: str | None, site: Site) -> None:
    for path in ("/", "/health", "/version", "/api/2.0/mlflow/runs/get", "/static-files/favicon.ico", "/get-artifact"):
        code, headers, _ = site.ask(path, user=user)
        assert (path, code) == (path, 401)
        assert headers["www-authenticate"] == 'Basic realm="MLflow"'
    assert not site.asked()


def test_every_response_has_security_headers(site: Site) -> None:
    for path, user in (("/", None), ("/", "ada:correct horse"), ("/static-files/favicon.ico", "ada:correct horse")):
        careful(site.ask(path, user=user)[1])


def careful(headers: dict[str, str]) -> None:
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "SAMEORIGIN"
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["img-src"].split()[:3] == ["'self'", "data:", "blob:"]
    assert "https:" not in policy["img-src"].split() and "*" not in policy["img-src"].split()
    assert policy["frame-ancestors"] == "'self'"


def test_no_location_of_the_site_leaves_out_the_headers_of_all(site: Site) -> None:
    """An nginx location with its own add_header does not inherit the add_header directives of its server block."""
    for path in ("/healthz", "/mlflow-host/room.json", "/mlflow-host/garbage.json", "/static-files/static/js/none.js"):
        careful(site.ask(path)[1])
    careful(site.ask("/", method="DELETE", user="rita:reads")[1])
    careful(site.ask("/static-files/static/js/main.0a1b2c3d.js")[1])
    stop(site)
    for user in (None, "ada:correct horse"):
        careful(site.ask("/", user=user, Accept="text/html")[1])


def test_pages_read_files_from_the_stores_of_the_stack_when_they_go_directly(site: Site) -> None:
    assert "https://aaa.s3.eu-central-1.amazonaws.com" in site.ask("/")[1]["content-security-policy"]
    direct = host_config(1)
    proxied = replace(direct, launch=replace(direct.launch, mlflow=launch.Mlflow(artifact_transfer="proxied")))
    own = replace(direct, launch=replace(direct.launch, endpoints=launch.Endpoints(s3="https://127.0.0.1:8333/x")))
    assert nginx.store_addresses(proxied) == []
    assert nginx.store_addresses(own) == ["https://127.0.0.1:8333"]
    china = replace(direct, launch=replace(direct.launch, stack=replace(direct.launch.stack, region="cn-north-1")))
    assert "https://aaa.s3.cn-north-1.amazonaws.com.cn" in nginx.store_addresses(china)


def test_password_is_accepted_and_not_forwarded(site: Site) -> None:
    assert site.ask("/api/2.0/mlflow/runs/get?run_id=1")[0] == 200
    ((_, path, headers, _),) = site.asked()
    assert path == "/api/2.0/mlflow/runs/get?run_id=1"
    assert "Authorization" not in headers
    assert headers["X-MLflow-Host-User"] == "ada"


def test_change_of_a_role_needs_no_reload(site: Site) -> None:
    def writes(name: str) -> int:
        return site.ask(METRIC, method="POST", user=name)[0]

    assert (writes("rita:reads"), writes("will:writes")) == (403, 200)
    promoted = credentials.User("rita", "reads", "writer")
    nginx.put_roles([promoted, *(user for user in USERS if user.name not in ("rita", "will"))], run=site.run)
    assert (writes("rita:reads"), writes("will:writes"), writes("ada:correct horse")) == (200, 403, 200)
    for name in ("../admins/ada", "ada/../ada", ".", "..", "", "/"):
        assert writes(f"{name}:correct horse") == 401


def test_full_volume_refuses_writes_and_allows_reads(site: Site) -> None:
    def writes(user: str | None = "ada:correct horse") -> int:
        return site.ask("/api/2.0/mlflow/runs/create", method="POST", user=user)[0]

    assert writes() == 200
    full = site.run / "nginx/volume-full"
    full.touch()
    assert writes() == 507, "nginx does not need a reload"
    code, _, body = site.ask("/api/2.0/mlflow/runs/log-metric", method="POST")
    assert (code, json.loads(body)["error_code"]) == (507, "RESOURCE_EXHAUSTED")
    assert "dataVolumeGib" in json.loads(body)["message"]
    assert site.ask("/api/2.0/mlflow/runs/get?run_id=1")[0] == 200
    assert site.ask("/api/2.0/mlflow/runs/search", method="POST")[0] == 200
    assert writes(user=None) == writes(user="ada:wrong") == 401
    full.unlink()
    assert writes() == 200


@pytest.mark.parametrize("host", ["evil.example.com", "localhost", "169.254.169.254", f"{HOST}.evil.com", "_", ""])
def test_other_host_names_are_refused(host: str, site: Site) -> None:
    code, _, body = site.ask("/", host=host)
    assert code in (400, 403)
    assert b"ada" not in body
    assert not site.asked()


@pytest.mark.parametrize("host", [HOST, f"{HOST}:8080", HOST.upper(), "127.0.0.1"])
def test_served_host_names_reach_mlflow(host: str, site: Site) -> None:
    assert site.ask("/", host=host)[0] == 200
    assert site.asked()[0][2]["Host"] == host.split(":")[0].lower()


@pytest.mark.parametrize("origin", ["http://evil.example.com", "null", f"https://{HOST}", f"http://{HOST}.evil.com"])
def test_pages_of_other_origins_are_refused(origin: str, site: Site) -> None:
    assert site.ask("/api/2.0/mlflow/runs/create", method="POST", Origin=origin)[0] == 403
    assert not site.asked()


def test_pages_of_this_origin_are_served(site: Site) -> None:
    assert site.ask("/api/2.0/mlflow/runs/create", method="POST", Origin=f"http://{HOST}")[0] == 200


def test_forwarded_headers_of_a_client_are_replaced(site: Site) -> None:
    site.ask(
        "/",
        X_Forwarded_For="10.9.9.9",
        X_Forwarded_Host="evil",
        X_Forwarded_Proto="gopher",
        X_Forwarded_Prefix="/evil",
        X_Original_URL="/admin",
        X_Rewrite_URL="/admin",
        Forwarded="for=evil",
    )
    headers = site.asked()[0][2]
    assert headers["X-Forwarded-For"] == "127.0.0.1"
    assert headers["X-Forwarded-Host"] == HOST
    assert headers["X-Forwarded-Proto"] == "http"
    assert not {"X-Forwarded-Prefix", "X-Original-URL", "X-Rewrite-URL", "Forwarded"} & headers.keys()


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "PROPFIND"])
def test_reader_changes_nothing(method: str, site: Site) -> None:
    for path in ("/", "/api/2.0/mlflow/runs/create", "/api/2.0/mlflow-artifacts/artifacts/x", "/healthz/x",
                 "/api/2.0/mlflow/runs/search/../create", "/api/2.0/mlflow/runs/search%2F..%2Fcreate",
                 "//api/2.0/mlflow/runs/search", "/x?/api/2.0/mlflow/runs/search"):  # fmt: skip
        assert (path, site.ask(path, method=method, user="rita:reads")[0]) == (path, 403)
    assert not site.asked()


def test_reader_reads_and_searches(site: Site) -> None:
    search = "/api/2.0/mlflow/runs/search"
    for request in ("GET /", "HEAD /", f"POST {search}", f"POST {search}?x=1", "GET /static-files/favicon.ico"):
        method, path = request.split()
        assert (request, site.ask(path, method=method, user="rita:reads")[0]) == (request, 200)


def test_user_role_is_not_visible_without_the_password(site: Site) -> None:
    for user in ("rita:wrong", "will:wrong", "nobody:wrong"):
        assert site.ask("/api/2.0/mlflow/runs/create", method="POST", user=user)[0] == 401


@pytest.mark.parametrize("user", ["will:writes", "ada:correct horse"])
def test_writer_and_admin_write(user: str, site: Site) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        assert site.ask("/api/2.0/mlflow/runs/create", method=method, user=user)[0] == 200


def test_failed_logins_are_limited_by_name_and_address(site: Site) -> None:
    codes = [site.ask("/", user=f"ada:guess-{n}")[0] for n in range(14)]
    assert codes[:11] == [401] * 11 and codes[11:] == [429] * 3
    code, headers, body = site.ask("/", user="ada:correct horse")
    assert (code, headers["retry-after"]) == (429, "30"), "a correct guess would be recognizable"
    assert b"Too many failed logins" in body
    assert not site.asked()
    for user in ("will:writes", "rita:reads"):
        assert site.ask("/", user=user)[0] == 200
    time.sleep(2.1)
    assert site.ask("/", user="ada:correct horse")[0] == 200


def test_failed_logins_of_a_known_user_are_limited_too(site: Site) -> None:
    for user in ("ada:correct horse", "will:writes"):
        assert {site.ask("/", user=user)[0] for _ in range(3)} == {200}
    codes = [site.ask("/", user=f"ada:guess-{n}")[0] for n in range(14)]
    assert codes[:11] == [401] * 11 and codes[11:] == [429] * 3
    assert site.ask("/", user="ada:correct horse")[0] == 429, "a correct guess would be recognizable"
    assert site.ask("/", user="will:writes")[0] == 200
    assert [path.name for path in (site.run / "suspects").iterdir()] == ["127.0.0.1 ada"]
    time.sleep(2.1)
    assert site.ask("/", user="ada:correct horse")[0] == 200


def test_known_login_grants_no_other_rights_and_expires(site: Site) -> None:
    create = "/api/2.0/mlflow/runs/create"
    for user in ("rita:reads", "will:writes"):
        assert site.ask("/", user=user)[0] == 200
    assert site.ask(create, method="POST", user="rita:reads")[0] == 403
    assert site.ask(create, method="POST", user="rita:wrong")[0] == 401
    users = site.run / "nginx/users"
    users.write_text("".join(line for line in users.open() if not line.startswith("will:")))
    assert site.ask("/", user="will:writes")[0] == 401


def test_refused_login_names_the_source_of_the_password(site: Site) -> None:
    for user in (None, "ada:wrong", "nobody:wrong"):
        code, headers, page = site.ask("/", user=user, Accept="text/html")
        assert (code, headers["content-type"], headers["cache-control"]) == (401, "text/html", "no-store")
        assert b"<code>/x</code>" in page and b"connect.py" in page and b"users.py" in page
        code, headers, body = site.ask("/api/2.0/mlflow/runs/create", method="POST", user=user, Accept="text/html")
        assert (code, headers["content-type"]) == (401, "application/json")
        assert headers["www-authenticate"] == 'Basic realm="MLflow"'
        told = json.loads(body)
        assert told["error_code"] == "UNAUTHENTICATED"
        assert "parameter /x" in told["message"] and "MLFLOW_TRACKING_USERNAME" in told["message"]
    assert not site.asked()


@pytest.mark.parametrize("host", [HOST, f"{HOST}:8443", "127.0.0.1"])
def test_redirect_of_mlflow_keeps_host_and_port(host: str, site: Site) -> None:
    code, headers, _ = site.ask("/moved", method="POST", host=host)
    assert (code, headers["location"]) == (308, f"http://{host}/there?x=1")
    assert site.ask("/moved/away")[1]["location"] == "http://s3.example.com/key"


def test_redirect_of_nginx_itself_keeps_host_and_port(site: Site) -> None:
    code, headers, _ = site.ask("/static-files/static/js", host=f"{HOST}:8443")
    assert (code, headers["location"]) == (301, "/static-files/static/js/")


def test_missing_report_returns_a_message(site: Site) -> None:
    for report in ("room", "backups"):
        code, headers, body = site.ask(f"/mlflow-host/{report}.json")
        assert (code, headers["content-type"]) == (503, "application/json")
        assert headers["retry-after"] and "within a minute" in json.loads(body)["message"]
    code, headers, body = site.ask("/mlflow-host/garbage.json")
    assert (code, headers["content-type"]) == (200, "application/json")
    empty = json.loads(body)
    assert (empty["at"], empty["summary"], empty["removed"]) == (None, "nothing has been removed yet", [])
    (site.folder / "srv/mlflow/reports/garbage.json").write_text('{"summary": "2 runs"}')
    assert json.loads(site.ask("/mlflow-host/garbage.json")[2]) == {"summary": "2 runs"}
    for report in ("room", "backups", "garbage"):
        assert site.ask(f"/mlflow-host/{report}.json", user=None)[0] == 401


@pytest.mark.parametrize("report", ["room", "backups"])
def test_reports_need_a_login(report: str, site: Site) -> None:
    (site.run / f"web/{report}.json").write_text('{"problems": []}')
    for _ in range(3):
        code, _, body = site.ask(f"/mlflow-host/{report}.json", user="will:writes")
        assert (code, json.loads(body)) == (200, {"problems": []})
    assert site.ask(f"/mlflow-host/{report}.json", user="will:wrong")[0] == 401


def test_password_spraying_is_limited_and_known_users_are_not(site: Site) -> None:
    assert site.ask("/", user="will:writes")[0] == 200
    codes = [site.ask("/", user=f"guess-{n}:password")[0] for n in range(110)]
    assert codes[:100] == [401] * 100 and codes[103:] == [429] * 7
    code, headers, body = site.ask("/", user="ada:correct horse")
    assert (code, headers["retry-after"]) == (429, "30"), "a correct guess would be recognizable"
    assert b"from this address" in body
    assert [request[1] for request in site.asked()] == ["/"]
    assert {site.ask("/", user="will:writes")[0] for _ in range(50)} == {200}
    assert site.ask("/", user="will:wrong")[0] == 401, "a name with an earlier login has its own limit"
    assert site.ask("/", user="ada:correct horse", source="127.0.0.2")[0] == 200


@pytest.mark.parametrize("name", ["../nginx", "..", "?", "", "a/b", "will wrong", "will\x00", "wi\nll", "é"])
def test_user_name_alone_does_not_count_as_a_known_login(name: str, site: Site) -> None:
    """nginx marks an earlier login with a file, and the path of this file contains the user's name."""
    assert site.ask("/", user="will:writes")[0] == 200
    codes = {site.ask("/", user=f"{name}:writes")[0] for _ in range(102)}
    assert codes == {401, 429}
    assert site.ask("/", user="ada:correct horse")[0] == 429
    assert [path.name for path in (site.run / "logins").iterdir()] == ["127.0.0.1 will"]


@pytest.mark.parametrize("name", ["ada\n", "\nada", "eve\n2026/11/29 12:00:00 [crit] 1#1: forged"])
def test_a_line_feed_in_a_name_is_a_wrong_login_and_no_line_of_the_log(name: str, site: Site) -> None:
    assert {site.ask("/", user=f"{name}:correct horse")[0] for _ in range(3)} == {401}
    for path in ("/static-files/x%0a2026/11/29%2012:00:00%20[crit]%201%231:%20forged", "/mlflow-host/room.json%0a"):
        assert site.ask(path)[0] in (200, 404)
    log = (site.folder / "nginx.log").read_text()
    assert "forged" not in log
    assert not [line for line in log.splitlines() if not line.startswith("20")], log


def test_the_socket_of_the_login_is_in_a_folder_that_only_nginx_may_enter(site: Site) -> None:
    folder = site.folder / "run/nginx/private"
    assert (folder / "login.sock").is_socket()
    assert (folder.stat().st_mode & 0o7777, folder.group()) == (0o710, "www-data")


@pytest.mark.parametrize("pair", ["127.0.0.1 ../x", "../../x", "127.0.0.1 a/b", "/tmp/x", "127.0.0.1 ada\t"])
def test_login_writes_no_file_for_an_invalid_pair(pair: str, site: Site) -> None:
    """The test connects to nginx's private socket, as another process on the machine could do."""
    before = sorted(site.folder.rglob("*"))
    for user, name in (("ada:correct horse", "X-New-Pair"), ("ada:wrong", "X-Known-Pair")):
        with socket.socket(socket.AF_UNIX) as asked:
            asked.connect(str(site.folder / "run/nginx/private/login.sock"))
            login = base64.b64encode(user.encode()).decode()
            headers = f"Host: x\r\nConnection: close\r\nAuthorization: Basic {login}\r\n{name}: {pair}\r\n"
            asked.sendall(f"GET / HTTP/1.1\r\n{headers}\r\n".encode())
            # nginx would write a file after the response and before it closes the connection, so read to the end.
            answer = b"".join(iter(lambda: asked.recv(4096), b""))
            assert answer.startswith(b"HTTP/1.1 20" if user != "ada:wrong" else b"HTTP/1.1 403")
    assert sorted(site.folder.rglob("*")) == before


def test_number_of_login_files_is_limited(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nginx, "MARKERS", 3)
    for number in range(5):
        marker = site.run / f"logins/192.0.2.{number} ada"
        marker.write_bytes(b"x" * (100 << 10))
        os.utime(marker, (number, number))
    nginx.prune_markers(site.run)
    left = {path.name: path.stat().st_size for path in (site.run / "logins").iterdir()}
    assert left == {f"192.0.2.{number} ada": 0 for number in (2, 3, 4)}


def test_requests_of_one_user_in_flight_are_bounded(site: Site) -> None:
    """The limit applies to one user at one address. Another user at the same address does not wait."""

    def open_one(user: str) -> http.client.HTTPConnection:
        connection = site.connection()
        login = "Basic " + base64.b64encode(user.encode()).decode()
        connection.request("GET", "/get-artifact", headers={"Host": HOST, "Authorization": login})
        return connection

    assert site.ask("/", user="rita:reads")[0] == site.ask("/", user="will:writes")[0] == 200
    waiting = [open_one("rita:reads") for _ in range(256)]
    ends = time.monotonic() + 20
    while len([request for request in site.asked() if request[1] == "/get-artifact"]) < 256:
        assert time.monotonic() < ends
        time.sleep(0.05)
    code, headers, body = site.ask("/", user="rita:reads")
    assert (code, "retry-after" in headers) == (429, False) and b"256 requests in flight" in body
    careful(headers)
    assert site.ask("/", user="will:writes")[0] == 200
    for upstream in site.upstreams:
        upstream.go_on.set()
    assert {connection.getresponse().read() for connection in waiting} == {b"first\nlast\n"}
    assert site.ask("/", user="rita:reads")[0] == 200


def test_successful_and_missing_logins_are_not_limited(site: Site) -> None:
    assert {site.ask("/", user=None)[0] for _ in range(60)} == {401}
    assert {site.ask("/")[0] for _ in range(200)} == {200}
    assert {site.ask("/x", method="POST", user="rita:reads")[0] for _ in range(60)} == {403}


def test_client_headers_cannot_replace_the_login(site: Site) -> None:
    for headers in ({"X_Login": "ok"}, {"X_Login_Key": ""}, {"X_May_Not": ""}, {"Cache_Control": "no-cache"}):
        assert site.ask("/", user=None, **headers)[0] == 401
        assert site.ask("/", method="DELETE", user="rita:reads", **headers)[0] == 403
    assert not site.asked()


# ── Health ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("host", [HOST, "10.0.0.7"])
def test_health_needs_no_login_and_contains_only_the_state(host: str, site: Site) -> None:
    code, _, body = site.ask("/healthz", user=None, host=host)
    assert (code, body) == (200, b"ok\n")


def test_health_is_false_when_the_database_does_not_answer(site: Site) -> None:
    for upstream in site.upstreams:
        upstream.database_answers = False
    code, headers, body = site.ask("/healthz", user=None)
    assert code == 503
    assert headers["retry-after"] == "2"
    assert json.loads(body) == {"error_code": "TEMPORARILY_UNAVAILABLE", "message": "MLflow does not answer"}


def test_health_is_false_when_no_process_answers(site: Site) -> None:
    stop(site)
    assert site.ask("/healthz", user=None)[0] == 503


def test_health_is_cached_for_one_second(site: Site) -> None:
    for _ in range(20):
        assert site.ask("/healthz", user=None)[0] == 200
    assert len(site.asked()) <= 2
    for upstream in site.upstreams:
        upstream.database_answers = False
    time.sleep(2.1)
    assert site.ask("/healthz", user=None)[0] == 503


def test_internal_locations_are_not_reachable(site: Site) -> None:
    for path in ("health", "load", "login", "status/status.json", "status/"):
        assert site.ask(f"/mlflow-host-{path}")[0] == 404
    assert not site.asked()


# ── While MLflow does not answer ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("user", [None, "ada:wrong", "nobody:wrong", "ada:correct horse"])
def test_page_needs_no_login(user: str | None, site: Site) -> None:
    stop(site)
    for _ in range(3):
        code, headers, body = site.ask("/", user=user, Accept="text/html")
        assert (code, "retry-after" in headers) == (503, False)
        assert b"MLflow is starting" in body
        assert "www-authenticate" not in headers, "a browser would ask for a password that does not work yet"
        code, headers, body = site.ask("/api/2.0/mlflow/runs/log-batch", method="POST", user=user)
        known = user == "ada:correct horse"
        assert (code, headers["content-type"]) == (429 if known else 503, "application/json")
        assert "retry-after" not in headers
        assert json.loads(body)["error_code"] == "TEMPORARILY_UNAVAILABLE"


@pytest.mark.parametrize("user", [None, "ada:correct horse"])
def test_large_artifact_gets_503_while_mlflow_is_down(user: str | None, site: Site) -> None:
    stop(site)
    path = "/api/2.0/mlflow-artifacts/artifacts/0/abc/artifacts/model.bin"
    assert site.ask(path, method="PUT", user=user, Content_Length=str(1 << 40))[0] == (429 if user else 503)


def test_a_request_that_mlflow_may_have_begun_is_not_to_be_repeated(site: Site) -> None:
    """After status 429, MLflow's clients repeat every request, even a request that creates data."""
    code, headers, _ = site.ask("/dies", method="POST")
    assert (code, "retry-after" in headers) == (503, False)
    assert len(site.asked()) == 1


def test_login_is_required_again_when_mlflow_is_up(site: Site) -> None:
    stop(site)
    assert site.ask("/", user=None)[0] == 503
    site.upstreams[:] = [Upstream(Path(str(upstream.server_address))) for upstream in site.upstreams]
    for upstream in site.upstreams:
        threading.Thread(target=upstream.serve_forever, args=(0.02,), daemon=True).start()
    assert site.ask("/", user=None)[0] == 401


def test_login_is_required_while_mlflow_is_slow(site: Site) -> None:
    for upstream in site.upstreams:
        upstream.seconds_to_health = 3
    began = time.monotonic()
    assert site.ask("/", user=None)[0] == 401
    assert time.monotonic() - began < 2.5


def test_requests_while_nginx_stops_are_to_be_repeated(site: Site) -> None:
    """While nginx stops, it no longer listens on any socket, including its private socket for logins."""
    (site.folder / "run/nginx/private/login.sock").unlink()
    for user in ("ada:correct horse", "ada:wrong", None):
        code, headers, body = site.ask("/api/2.0/mlflow/runs/search", method="POST", user=user)
        assert (code, headers["content-type"], "retry-after" in headers) == (429, "application/json", False)
        assert json.loads(body)["error_code"] == "TEMPORARILY_UNAVAILABLE"
    assert site.asked() == []


def test_a_machine_that_stops_lets_requests_in_progress_end_and_closes_connections(site: Site) -> None:
    """nginx closes idle connections when it stops. A new request on a closing connection would get a reset."""
    login = {"Host": HOST, "Authorization": "Basic " + base64.b64encode(b"ada:correct horse").decode()}
    idle, begun = site.connection(), site.connection()
    idle.request("GET", "/", headers=login)
    assert idle.getresponse().read()
    begun.request("GET", "/get-artifact", headers=login)
    in_progress = begun.getresponse()
    (site.folder / "run/nginx/stopping").touch()
    idle.request("POST", "/api/2.0/mlflow/runs/create", headers=login)
    answer = idle.getresponse()
    assert (answer.status, answer.headers["connection"], answer.headers["retry-after"]) == (429, "close", None)
    for path, accept, expected in (
        ("/api/2.0/mlflow/runs/search", "*/*", (429, "application/json")),
        ("/", "text/html", (503, "text/html")),
        ("/healthz", "*/*", (503, "application/json")),
    ):
        code, headers, _ = site.ask(path, user=None, Accept=accept)
        assert (code, headers["content-type"].split(";")[0], headers["connection"]) == (*expected, "close")
    for upstream in site.upstreams:
        upstream.go_on.set()
    assert in_progress.read() == b"first\nlast\n"


def test_mlflows_own_error_response_is_unchanged(site: Site) -> None:
    code, _, body = site.ask("/broken")
    assert (code, json.loads(body)["error_code"]) == (500, "INTERNAL_ERROR")


def test_restart_of_one_process_causes_no_error(site: Site) -> None:
    site.upstreams[0].shutdown()
    site.upstreams[0].server_close()
    assert [site.ask("/")[0] for _ in range(20)] == [200] * 20


def test_requests_reach_mlflow_as_soon_as_it_is_up(site: Site) -> None:
    stop(site)
    for _ in range(5):
        assert site.ask("/")[0] == 429
    site.upstreams[:] = [Upstream(Path(str(upstream.server_address))) for upstream in site.upstreams]
    for upstream in site.upstreams:
        threading.Thread(target=upstream.serve_forever, args=(0.02,), daemon=True).start()
    assert site.ask("/")[0] == 200


def test_both_processes_are_used(site: Site) -> None:
    for _ in range(20):
        site.ask("/")
    assert all(upstream.asked for upstream in site.upstreams)


def test_every_status_of_mlflow_is_passed_on(site: Site) -> None:
    code, _, body = site.ask("/busy", Accept="text/html")
    assert code == 503
    assert json.loads(body)["message"] == "MLflow said this"


# ── Transfers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "path",
    [
        "/api/2.0/mlflow-artifacts/artifacts/0/abc/artifacts/model.bin",
        "/ajax-api/2.0/mlflow-artifacts/artifacts/x",
        "/ajax-api/2.0/mlflow/upload-artifact?run_uuid=1&path=x",
    ],
)
def test_upload_is_streamed_to_mlflow(path: str, site: Site) -> None:
    """MLflow receives the first bytes of an upload before the client has sent the last bytes."""
    connection = site.connection()
    connection.putrequest("PUT", path, skip_host=True)
    connection.putheader("Host", HOST)
    connection.putheader("Authorization", "Basic " + base64.b64encode(b"ada:correct horse").decode())
    connection.putheader("Content-Length", str(40 << 20))
    connection.endheaders()
    connection.send(b"x" * (1 << 20))
    assert any(upstream.first_byte.wait(0.1) for _ in range(100) for upstream in site.upstreams)
    for _ in range(39):
        connection.send(b"x" * (1 << 20))
    assert connection.getresponse().status == 200
    assert site.asked()[0][3] == 40 << 20


@pytest.mark.parametrize("user", [None, "ada:wrong", "ada:correct horse"])
def test_too_large_body_is_refused_before_it_is_sent(user: str | None, site: Site) -> None:
    """nginx would buffer a large body on the root volume. Artifacts are not buffered and may have any size."""
    for path, wanted in (("/api/2.0/mlflow/runs/log-batch", 413), ("/graphql", 413)):
        assert (path, site.ask(path, method="POST", user=user, Content_Length=str(1 << 40))[0]) == (path, wanted)
    assert not site.asked()
    artifact = "/api/2.0/mlflow-artifacts/artifacts/0/abc/artifacts/model.bin"
    connection = site.connection()
    sent = {"Host": HOST, "Content-Length": str(1 << 40)}
    if user:
        sent["Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
    connection.request("PUT", artifact, headers=sent)
    if user == "ada:correct horse":
        connection.send(b"x" * 65536)
        assert any(upstream.first_byte.wait(0.1) for _ in range(100) for upstream in site.upstreams)
    else:
        assert connection.getresponse().status == 401
    connection.close()


@pytest.mark.parametrize("path", ["/get-artifact?path=x", "/gateway/chat/invocations"])
def test_response_is_streamed_to_the_client(path: str, site: Site) -> None:
    connection = site.connection()
    connection.request("GET", path, headers={"Host": HOST, "Authorization": "Basic YWRhOmNvcnJlY3QgaG9yc2U="})
    answer = connection.getresponse()
    assert answer.readline() == b"first\n"
    for upstream in site.upstreams:
        upstream.go_on.set()
    assert answer.read() == b"last\n"


def test_json_is_compressed_if_the_client_accepts_it(site: Site) -> None:
    _, headers, body = site.ask("/long", Accept_Encoding="gzip")
    assert headers["content-encoding"] == "gzip"
    assert json.loads(gzip.decompress(body))["path"] == "/long"
    assert "content-encoding" not in site.ask("/long")[1]


def test_websocket_upgrade_reaches_mlflow(site: Site) -> None:
    site.ask("/ws", Connection="Upgrade", Upgrade="websocket")
    headers = site.asked()[0][2]
    assert (headers["Upgrade"], headers["Connection"]) == ("websocket", "upgrade")


def test_ui_assets_are_served_from_disk_with_long_caching(site: Site) -> None:
    code, headers, body = site.ask("/static-files/static/js/main.0a1b2c3d.js", Accept_Encoding="gzip")
    assert code == 200
    assert headers["cache-control"] == "private, max-age=31536000, immutable"
    assert gzip.decompress(body) == b"from the compressed file"
    assert site.ask("/static-files/favicon.ico")[1]["cache-control"] == "private, max-age=3600"
    assert site.ask("/static-files/static/js/gone.js")[0] == 404
    assert not site.asked()


def test_path_reaches_mlflow_unchanged(site: Site) -> None:
    site.ask("/api/2.0/mlflow-artifacts/artifacts/a%2Fb%20c/d%25e?x=%2F")
    assert site.asked()[0][1] == "/api/2.0/mlflow-artifacts/artifacts/a%2Fb%20c/d%25e?x=%2F"


def test_undefined_template_variable_is_an_error() -> None:
    with pytest.raises(Exception, match="undefined"):
        nginx.render("site.conf.j2", TEMPLATES, names=["a"])


# ── The request log ───────────────────────────────────────────────────────────────────────────────────────────────────


METRIC = "/api/2.0/mlflow/runs/log-metric"


def requests_of(site: Site, count: int) -> list[request_log.Request]:
    """Wait until the log has `count` requests, and return the requests as mlflow_host.monitor parses them."""
    log, ends = site.folder / "var/log/nginx/access.log", time.monotonic() + 20
    while len(found := [*filter(None, map(request_log.parse, log.read_text().splitlines()))]) < count:
        assert time.monotonic() < ends, log.read_text()
        time.sleep(0.02)
    return found


def test_log_names_user_role_and_items_of_a_write_and_no_query(site: Site) -> None:
    assert site.ask(f"{METRIC}?token=hunter2", method="POST", user="will:writes")[0] == 200
    (found,) = requests_of(site, 1)
    assert (found.user, found.role, found.address) == ("will", "writer", "127.0.0.1")
    assert (found.method, found.path, found.status) == ("POST", METRIC, 200)
    assert (found.writes, found.accepted, found.reached_mlflow) == (True, True, True)
    assert (found.by, found.ids) == ("direct", (("run_id", "abc"), ("name", "a b")))
    assert "hunter2" not in (site.folder / "var/log/nginx/access.log").read_text()


def test_headers_for_the_log_are_not_sent_to_clients(site: Site) -> None:
    assert not [name for name in site.ask(METRIC, method="POST")[1] if name.startswith("x-mlflow-host")]


def test_searches_are_no_writes(site: Site) -> None:
    site.ask("/api/2.0/mlflow/runs/search?x=1", method="POST", user="rita:reads")
    site.ask("/api/2.0/mlflow/runs/get", user="rita:reads")
    assert [found.writes for found in requests_of(site, 2)] == [False, False]


REFUSED: list[tuple[str | None, dict[str, str], int, bool]] = [
    (None, {}, 401, False),
    (None, {"Accept": "text/html"}, 401, False),
    ("will:wrong", {}, 401, False),
    ("eve:writes", {}, 401, False),
    ("rita:reads", {}, 403, True),
    ("rita:wrong", {}, 401, False),
    ("will:writes", {"Origin": "https://evil.example"}, 403, False),
    ("rita:reads", {"Origin": "https://evil.example"}, 403, False),
    ("will:writes", {"Content_Length": str(1 << 40)}, 413, False),
]


def test_refused_writes_are_logged_as_they_were_asked(site: Site) -> None:
    for user, headers, code, _ in REFUSED:
        path = "/runs/1" if "Accept" in headers else METRIC
        assert site.ask(f"{path}?token=hunter2", method="POST", user=user, **headers)[0] == code
    found = requests_of(site, len(REFUSED))
    assert {(each.method, each.writes, each.reached_mlflow) for each in found} == {("POST", True, False)}
    # nginx answers before it logs, and its processes log independently, so lines can be out of order.
    assert sorted((each.user, each.status, each.accepted) for each in found) == sorted(
        ((user or "").partition(":")[0], code, accepted) for user, _, code, accepted in REFUSED
    )
    assert sorted(each.path for each in found) == sorted([METRIC, "/runs/1", *[METRIC] * 7])


def test_writes_refused_for_failed_logins_and_on_a_full_volume_are_logged(site: Site) -> None:
    for _ in range(30):
        if site.ask(METRIC, method="DELETE", user="will:wrong")[0] == 429:
            break
    (site.run / "nginx/volume-full").touch()
    assert site.ask(METRIC, method="POST")[0] == 507
    site.ask("/last")
    site.reload(lambda: requests_of(site, 3)[-1].path == "/last")
    found = {each.status: each for each in requests_of(site, 3)}
    assert (found[429].accepted, found[429].method, found[429].user) == (False, "DELETE", "will")
    assert (found[507].accepted, found[507].method, found[507].user) == (True, "POST", "ada")


def test_any_name_and_path_is_one_line_of_the_log(site: Site) -> None:
    names = ["a b", 'a"b', "é\n", "a\\x22", "-"]
    for name in names:
        assert site.ask(METRIC, method="POST", user=f"{name}:x")[0] == 401
    paths = ['/a"b', "/%22%0a%20x", "/x\\x22"]
    for path in paths:
        site.ask(path, method="PUT", user="will:writes")
    found = requests_of(site, len(names) + len(paths))
    assert [each.user for each in found[:5]] == ["a b", 'a"b', "é\n", "a\\x22", ""]
    assert [(each.method, each.path) for each in found[5:]] == [("PUT", path) for path in paths]


def test_write_while_mlflow_is_down_is_logged(site: Site) -> None:
    stop(site)
    assert site.ask(METRIC, method="POST", user="will:writes")[0] == 429
    assert site.ask("/runs/1", method="POST", user="will:writes", Accept="text/html")[0] == 503
    found = requests_of(site, 2)
    assert [(each.method, each.status, each.writes, each.accepted) for each in found] == [
        ("POST", 429, True, True),
        ("POST", 503, True, True),
    ]


# ── Metrics ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_metrics_are_for_every_user_and_come_from_the_monitor(site: Site) -> None:
    (site.folder / "run/mlflow-host-monitor").mkdir(mode=0o755)
    registry = CollectorRegistry()
    metrics.RequestMetrics(registry).add(())
    server = scraping.serve(site.folder / "run/mlflow-host-monitor/metrics.sock", registry)
    try:
        accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
        code, headers, body = site.ask("/mlflow-host/metrics", user="rita:reads", Accept=accept)
        assert (code, headers["content-type"].split(";")[0]) == (200, "application/openmetrics-text")
        assert body.endswith(b"# EOF\n") and b"# TYPE mlflow_host_requests counter" in body
        careful(headers)
        assert site.ask("/mlflow-host/metrics", user=None)[0] == 401
        assert site.ask("/mlflow-host/metrics", user="rita:wrong")[0] == 401
    finally:
        server.shutdown()
        server.server_close()
    assert not site.asked(), "a scrape does not reach MLflow"


def test_monitor_sees_requests_in_flight_and_the_load_of_each_process(site: Site) -> None:
    socket_of_nginx = site.folder / "run/nginx/monitor.sock"
    waiting = site.connection()
    waiting.request("GET", "/get-artifact", headers={"Host": HOST, "Authorization": "Basic YWRhOmNvcnJlY3QgaG9yc2U="})
    site.reload(lambda: bool(site.asked()))
    (found,) = metrics.Machine(nginx=socket_of_nginx).requests()
    assert [sample.value for sample in found.samples] == [1]
    for number in (1, 2):
        metrics.ask(socket_of_nginx, f"/processes/{number}")
        assert site.upstreams[number - 1].asked[-1][1] == "/mlflow-host-load"
    with pytest.raises(OSError, match="status 404"):
        metrics.ask(socket_of_nginx, "/processes/3")


def test_page_of_the_server_is_for_logged_in_people(site: Site) -> None:
    assert site.ask("/mlflow-host/")[0] == 404, "the monitor has not written it yet"
    (site.folder / "run/mlflow-host-monitor").mkdir(mode=0o755)
    (site.folder / "run/mlflow-host-monitor/index.html").write_text("<title>the page</title>")
    code, headers, body = site.ask("/mlflow-host/", user="rita:reads")
    assert (code, headers["content-type"], body) == (200, "text/html", b"<title>the page</title>")
    assert headers["cache-control"] == "no-store"
    careful(headers)
    assert site.ask("/mlflow-host", user="rita:reads")[1]["location"] == "/mlflow-host/"
    assert site.ask("/mlflow-host/", user=None)[0] == site.ask("/mlflow-host/", user="rita:wrong")[0] == 401
    assert not site.asked()
