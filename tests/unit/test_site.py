"""What nginx does with the site made at boot: a real nginx, with a stand-in for MLflow's processes behind it."""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import os
import shutil
import signal
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from mlflow_host import config, credentials, launch, sizing, status, web
from services import free_port
from shipped_nginx import HOST as LOOPBACK
from shipped_nginx import ROOTFS, move, moved, nginx

USERS = (
    credentials.User("ada", "correct horse", "admin"),
    credentials.User("bob", "{PLAIN}no", "writer"),
    credentials.User("rita", "reads", "reader"),
    credentials.User("will", "writes", "writer"),
)
HOST = "mlflow.example.com"
TEMPLATES = ROOTFS / "usr/share/mlflow-host/templates"

pytestmark = pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed (scripts/prepare.sh does)")


class Upstream(socketserver.ThreadingUnixStreamServer):
    """Stands in for one MLflow process: says what it was asked, and behaves as its path tells."""

    daemon_threads = True

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        super().__init__(str(path), Asked)
        path.chmod(0o666)
        self.asked: list[tuple[str, str, dict[str, str], int]] = []
        self.database_answers = True
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
        """Its length, read as it comes."""
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
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path, dict(self.headers.items()), self.body()))
        if self.path.startswith("/api/2.0/mlflow/experiments/search"):
            self.answer(200 if self.server.database_answers else 503, b'{"experiments": []}')
        elif self.path.startswith("/busy"):
            self.answer(503, b'{"error_code": "TEMPORARILY_UNAVAILABLE", "message": "MLflow said this"}')
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
        """Have nginx read its configuration again, and wait for what that changes."""
        os.kill(self.nginx, signal.SIGHUP)
        ends = time.monotonic() + 20
        while not until():
            assert time.monotonic() < ends, "nginx goes on as before"
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
        """Status, headers (names in lower case) and body. Underscores in header names stand for hyphens."""
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
        credentials=launch.Credentials("/x"),
        data_volume=launch.DataVolume("vol-01234567"),
        web=launch.Web((HOST, "127.0.0.1")),
    )
    sized = sizing.size(sizing.Machine(2048, 2))
    return config.host_config(document, replace(sized, server_processes=processes))


def unconfigured(folder: Path, port: int) -> Path:
    """The configuration of a machine that starts, below `folder` and on `port` instead of 80. Returns nginx.conf."""
    configuration = move(folder, {80: f"{LOOPBACK}:{port}"})
    shipped = folder / "usr/share/mlflow-host"
    status.publish(folder / "run/mlflow-host", shipped / "page.html")
    shutil.copy(shipped / "starting.conf", folder / "run/mlflow-host/nginx/site.conf")
    return configuration


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not pytest's: nginx's workers are another user, and pytest's folders are closed to them."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="mlflow-site-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def site(folder: Path) -> Iterator[Site]:
    """The site of a machine with two MLflow processes, which run."""
    port = free_port()
    configuration = unconfigured(folder, port)
    run = folder / "run/mlflow-host"
    ui = folder / "ui"
    (ui / "static/js").mkdir(parents=True)
    (ui / "static/js/main.0a1b2c3d.js").write_text("console.log(1);" * 500)
    (ui / "static/js/main.0a1b2c3d.js.gz").write_bytes(gzip.compress(b"from the compressed file"))
    (ui / "favicon.ico").write_text("icon")
    rendered = web.render_site(host_config(2), ui, templates=TEMPLATES, run=run)
    rendered = moved(rendered, folder, {80: f"{LOOPBACK}:{port}"})
    rendered = rendered.replace("max-age=30 always", "max-age=1 always")  # how long too many failures are held against
    (run / "nginx/site.conf").write_text(rendered)
    (run / "nginx/users").write_text(credentials.password_file(USERS))
    (run / "nginx/roles.map").write_text("".join(f'"{user.name}" {user.role};\n' for user in USERS))
    (folder / "usr/share/mlflow-host/reader-posts.map").write_text('"~^/api/2\\.0/mlflow/runs/search(\\?|$)" 1;\n')
    upstreams = [Upstream(folder / f"run/mlflow/server-{n}.sock") for n in (1, 2)]
    for upstream in upstreams:
        threading.Thread(target=upstream.serve_forever, args=(0.02,), daemon=True).start()
    try:
        with nginx(configuration, port, folder / "nginx.log") as process:
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
def test_starting_page_is_for_people_and_json_for_programs(path: str, accept: str, kind: str, folder: Path) -> None:
    port = free_port()
    with nginx(unconfigured(folder, port), port, folder / "nginx.log"):
        site = Site(port, [], folder / "run/mlflow-host", folder)
        code, headers, body = site.ask(path, user=None, host="anything.at.all", Accept=accept)
        assert (code, headers["content-type"].split(";")[0]) == (503, kind)
        assert headers["retry-after"] == "2"
        assert headers["cache-control"] == "no-store"
        assert (b"MLflow is starting" in body) if kind == "text/html" else json.loads(body)["state"] == "starting"
        assert site.ask(path, method="POST", user=None, Accept=accept)[0] == 503


def test_reason_of_a_failure_is_on_the_page(folder: Path) -> None:
    port = free_port()
    with nginx(unconfigured(folder, port), port, folder / "nginx.log"):
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


# ── Who gets in ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("user", [None, "ada:wrong", "ada:", "bob:no", "eve:correct horse", "ADA:correct horse"])
def test_nothing_without_the_password(user: str | None, site: Site) -> None:
    for path in ("/", "/health", "/version", "/api/2.0/mlflow/runs/get", "/static-files/favicon.ico", "/get-artifact"):
        code, headers, _ = site.ask(path, user=user)
        assert (path, code) == (path, 401)
        assert headers["www-authenticate"] == 'Basic realm="MLflow"'
    assert not site.asked()


def test_every_answer_tells_browsers_to_be_careful(site: Site) -> None:
    for path, user in (("/", None), ("/", "ada:correct horse"), ("/static-files/favicon.ico", "ada:correct horse")):
        headers = site.ask(path, user=user)[1]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers.get("x-frame-options") == ("SAMEORIGIN" if path == "/" else None)


def test_password_opens_and_goes_no_further(site: Site) -> None:
    assert site.ask("/api/2.0/mlflow/runs/get?run_id=1")[0] == 200
    ((_, path, headers, _),) = site.asked()
    assert path == "/api/2.0/mlflow/runs/get?run_id=1"
    assert "Authorization" not in headers


def test_a_full_volume_is_read_and_not_written_to(site: Site) -> None:
    def writes(user: str | None = "ada:correct horse") -> int:
        return site.ask("/api/2.0/mlflow/runs/create", method="POST", user=user)[0]

    assert writes() == 200
    room = site.run / "nginx/room.map"
    room.write_text("default 1;\n")
    site.reload(lambda: writes() == 507)
    code, _, body = site.ask("/api/2.0/mlflow/runs/log-metric", method="POST")
    assert (code, json.loads(body)["error_code"]) == (507, "RESOURCE_EXHAUSTED")
    assert "dataVolumeGib" in json.loads(body)["message"]
    assert site.ask("/api/2.0/mlflow/runs/get?run_id=1")[0] == 200
    assert site.ask("/api/2.0/mlflow/runs/search", method="POST")[0] == 200
    assert writes(user=None) == writes(user="ada:wrong") == 401
    room.write_text("default 0;\n")
    site.reload(lambda: writes() == 200)


@pytest.mark.parametrize("host", ["evil.example.com", "localhost", "169.254.169.254", f"{HOST}.evil.com", "_", ""])
def test_only_names_served_are_answered(host: str, site: Site) -> None:
    code, _, body = site.ask("/", host=host)
    assert code in (400, 403)
    assert b"ada" not in body
    assert not site.asked()


@pytest.mark.parametrize("host", [HOST, f"{HOST}:8080", HOST.upper(), "127.0.0.1"])
def test_names_served_reach_mlflow_as_it_expects_them(host: str, site: Site) -> None:
    assert site.ask("/", host=host)[0] == 200
    assert site.asked()[0][2]["Host"] == host.split(":")[0].lower()


@pytest.mark.parametrize("origin", ["http://evil.example.com", "null", f"https://{HOST}", f"http://{HOST}.evil.com"])
def test_pages_of_other_origins_are_refused(origin: str, site: Site) -> None:
    assert site.ask("/api/2.0/mlflow/runs/create", method="POST", Origin=origin)[0] == 403
    assert not site.asked()


def test_pages_of_this_origin_are_served(site: Site) -> None:
    assert site.ask("/api/2.0/mlflow/runs/create", method="POST", Origin=f"http://{HOST}")[0] == 200


def test_forwarded_headers_of_a_client_are_not_believed(site: Site) -> None:
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


def test_role_of_a_user_is_told_to_nobody_without_the_password(site: Site) -> None:
    for user in ("rita:wrong", "will:wrong", "nobody:wrong"):
        assert site.ask("/api/2.0/mlflow/runs/create", method="POST", user=user)[0] == 401


@pytest.mark.parametrize("user", ["will:writes", "ada:correct horse"])
def test_writer_and_admin_write(user: str, site: Site) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        assert site.ask("/api/2.0/mlflow/runs/create", method=method, user=user)[0] == 200


def test_guessing_is_slowed_down_for_the_one_name_and_address(site: Site) -> None:
    codes = [site.ask("/", user=f"ada:guess-{n}")[0] for n in range(14)]
    assert codes[:11] == [401] * 11 and codes[11:] == [429] * 3
    code, headers, body = site.ask("/", user="ada:correct horse")
    assert (code, headers["retry-after"]) == (429, "30"), "a right guess would give itself away"
    assert b"Too many failed logins" in body
    assert not site.asked()
    for user in ("will:writes", "rita:reads"):
        assert site.ask("/", user=user)[0] == 200
    time.sleep(2.1)
    assert site.ask("/", user="ada:correct horse")[0] == 200


def test_guessing_at_who_has_logged_in_before_is_slowed_down_as_well(site: Site) -> None:
    for user in ("ada:correct horse", "will:writes"):
        assert {site.ask("/", user=user)[0] for _ in range(3)} == {200}
    codes = [site.ask("/", user=f"ada:guess-{n}")[0] for n in range(14)]
    assert codes[:11] == [401] * 11 and codes[11:] == [429] * 3
    assert site.ask("/", user="ada:correct horse")[0] == 429, "a right guess would give itself away"
    assert site.ask("/", user="will:writes")[0] == 200
    assert [path.name for path in (site.run / "suspects").iterdir()] == ["127.0.0.1 ada"]
    time.sleep(2.1)
    assert site.ask("/", user="ada:correct horse")[0] == 200


def test_who_has_logged_in_before_may_do_no_more_and_no_longer(site: Site) -> None:
    create = "/api/2.0/mlflow/runs/create"
    for user in ("rita:reads", "will:writes"):
        assert site.ask("/", user=user)[0] == 200
    assert site.ask(create, method="POST", user="rita:reads")[0] == 403
    assert site.ask(create, method="POST", user="rita:wrong")[0] == 401
    users = site.run / "nginx/users"
    users.write_text("".join(line for line in users.open() if not line.startswith("will:")))
    assert site.ask("/", user="will:writes")[0] == 401


@pytest.mark.parametrize("report", ["room", "backups"])
def test_reports_are_there_for_who_logs_in_and_for_who_has(report: str, site: Site) -> None:
    (site.run / f"web/{report}.json").write_text('{"problems": []}')
    for _ in range(3):
        code, _, body = site.ask(f"/mlflow-host/{report}.json", user="will:writes")
        assert (code, json.loads(body)) == (200, {"problems": []})
    assert site.ask(f"/mlflow-host/{report}.json", user="will:wrong")[0] == 401


def test_guessing_through_many_names_ends_and_who_logged_in_before_does_not_notice(site: Site) -> None:
    assert site.ask("/", user="will:writes")[0] == 200
    codes = [site.ask("/", user=f"guess-{n}:password")[0] for n in range(110)]
    assert codes[:100] == [401] * 100 and codes[103:] == [429] * 7
    code, headers, body = site.ask("/", user="ada:correct horse")
    assert (code, headers["retry-after"]) == (429, "30"), "a right guess would give itself away"
    assert b"from this address" in body
    assert [request[1] for request in site.asked()] == ["/"]
    assert {site.ask("/", user="will:writes")[0] for _ in range(50)} == {200}
    assert site.ask("/", user="will:wrong")[0] == 401, "a known name is held to its own limit"
    assert site.ask("/", user="ada:correct horse", source="127.0.0.2")[0] == 200


@pytest.mark.parametrize("name", ["../nginx", "..", "?", "", "a/b", "will wrong", "will\x00", "wi\nll", "é"])
def test_no_name_makes_a_stranger_known(name: str, site: Site) -> None:
    """A name becomes part of a path, below which a file says that it has logged in before."""
    assert site.ask("/", user="will:writes")[0] == 200
    codes = {site.ask("/", user=f"{name}:writes")[0] for _ in range(102)}
    assert codes == {401, 429}
    assert site.ask("/", user="ada:correct horse")[0] == 429
    assert [path.name for path in (site.run / "logins").iterdir()] == ["127.0.0.1 will"]


def test_right_logins_and_missing_ones_are_never_too_many(site: Site) -> None:
    assert {site.ask("/", user=None)[0] for _ in range(60)} == {401}
    assert {site.ask("/")[0] for _ in range(200)} == {200}
    assert {site.ask("/x", method="POST", user="rita:reads")[0] for _ in range(60)} == {403}


def test_nothing_a_client_sends_speaks_for_the_login(site: Site) -> None:
    for headers in ({"X_Login": "ok"}, {"X_Login_Key": ""}, {"X_May_Not": ""}, {"Cache_Control": "no-cache"}):
        assert site.ask("/", user=None, **headers)[0] == 401
        assert site.ask("/", method="DELETE", user="rita:reads", **headers)[0] == 403
    assert not site.asked()


# ── Health ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("host", [HOST, "10.0.0.7"])
def test_health_is_open_and_tells_nothing_else(host: str, site: Site) -> None:
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


def test_health_asks_mlflow_at_most_once_a_second_and_then_again(site: Site) -> None:
    for _ in range(20):
        assert site.ask("/healthz", user=None)[0] == 200
    assert len(site.asked()) <= 2
    for upstream in site.upstreams:
        upstream.database_answers = False
    time.sleep(2.1)
    assert site.ask("/healthz", user=None)[0] == 503


def test_inner_locations_cannot_be_asked_for(site: Site) -> None:
    for path in ("health", "login", "status/status.json", "status/"):
        assert site.ask(f"/mlflow-host-{path}")[0] == 404
    assert not site.asked()


# ── While MLflow does not answer ──────────────────────────────────────────────────────────────────────────────────────


def test_page_is_behind_the_login_once_there_is_one(site: Site) -> None:
    stop(site)
    assert site.ask("/", user=None, Accept="text/html")[0] == 401
    code, headers, body = site.ask("/", Accept="text/html")
    assert (code, headers["retry-after"]) == (503, "2")
    assert b"MLflow is starting" in body
    code, headers, body = site.ask("/api/2.0/mlflow/runs/log-batch", method="POST")
    assert (code, headers["content-type"]) == (503, "application/json")
    assert json.loads(body)["error_code"] == "TEMPORARILY_UNAVAILABLE"


def test_who_comes_while_nginx_stops_is_told_to_come_again(site: Site) -> None:
    """By then it listens no more, on its own socket for logins either."""
    (site.folder / "run/nginx/login.sock").unlink()
    for user in ("ada:correct horse", "ada:wrong", None):
        code, headers, body = site.ask("/api/2.0/mlflow/runs/search", method="POST", user=user)
        assert (code, headers["retry-after"], headers["content-type"]) == (503, "2", "application/json")
        assert json.loads(body)["error_code"] == "TEMPORARILY_UNAVAILABLE"
    assert site.asked() == []


def test_what_mlflow_itself_says_of_an_error_of_its_own_passes(site: Site) -> None:
    code, _, body = site.ask("/broken")
    assert (code, json.loads(body)["error_code"]) == (500, "INTERNAL_ERROR")


def test_one_process_restarting_is_not_noticed(site: Site) -> None:
    site.upstreams[0].shutdown()
    site.upstreams[0].server_close()
    assert [site.ask("/")[0] for _ in range(20)] == [200] * 20


def test_mlflow_is_back_as_soon_as_it_answers(site: Site) -> None:
    stop(site)
    for _ in range(5):
        assert site.ask("/")[0] == 503
    site.upstreams[:] = [Upstream(Path(str(upstream.server_address))) for upstream in site.upstreams]
    for upstream in site.upstreams:
        threading.Thread(target=upstream.serve_forever, args=(0.02,), daemon=True).start()
    assert site.ask("/")[0] == 200


def test_both_processes_are_used(site: Site) -> None:
    for _ in range(20):
        site.ask("/")
    assert all(upstream.asked for upstream in site.upstreams)


def test_answer_of_mlflow_itself_is_passed_on_whatever_its_status(site: Site) -> None:
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
def test_upload_streams_to_mlflow_as_it_comes(path: str, site: Site) -> None:
    """The first bytes are with MLflow before the client has sent the last."""
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
def test_body_that_no_request_of_mlflows_has_is_refused_before_it_comes(user: str | None, site: Site) -> None:
    """It would be kept on the root volume. An artifact is not, and may have any size."""
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
def test_answer_streams_to_the_client_as_it_comes(path: str, site: Site) -> None:
    connection = site.connection()
    connection.request("GET", path, headers={"Host": HOST, "Authorization": "Basic YWRhOmNvcnJlY3QgaG9yc2U="})
    answer = connection.getresponse()
    assert answer.readline() == b"first\n"
    for upstream in site.upstreams:
        upstream.go_on.set()
    assert answer.read() == b"last\n"


def test_json_is_compressed_for_who_asks(site: Site) -> None:
    _, headers, body = site.ask("/long", Accept_Encoding="gzip")
    assert headers["content-encoding"] == "gzip"
    assert json.loads(gzip.decompress(body))["path"] == "/long"
    assert "content-encoding" not in site.ask("/long")[1]


def test_websocket_upgrade_reaches_mlflow(site: Site) -> None:
    site.ask("/ws", Connection="Upgrade", Upgrade="websocket")
    headers = site.asked()[0][2]
    assert (headers["Upgrade"], headers["Connection"]) == ("websocket", "upgrade")


def test_hashed_files_of_the_user_interface_come_from_disk_and_are_kept_for_long(site: Site) -> None:
    code, headers, body = site.ask("/static-files/static/js/main.0a1b2c3d.js", Accept_Encoding="gzip")
    assert code == 200
    assert headers["cache-control"] == "private, max-age=31536000, immutable"
    assert gzip.decompress(body) == b"from the compressed file"
    assert site.ask("/static-files/favicon.ico")[1]["cache-control"] == "private, max-age=3600"
    assert site.ask("/static-files/static/js/gone.js")[0] == 404
    assert not site.asked()


def test_path_reaches_mlflow_as_the_client_wrote_it(site: Site) -> None:
    site.ask("/api/2.0/mlflow-artifacts/artifacts/a%2Fb%20c/d%25e?x=%2F")
    assert site.asked()[0][1] == "/api/2.0/mlflow-artifacts/artifacts/a%2Fb%20c/d%25e?x=%2F"


def test_name_nobody_gave_is_noticed() -> None:
    with pytest.raises(Exception, match="undefined"):
        web.render("site.conf.j2", TEMPLATES, names=["a"])
