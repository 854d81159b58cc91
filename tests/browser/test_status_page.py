"""The page that nginx serves before MLflow runs, in Chromium: it shows the running step, or the reason of a failure."""

import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from mlflow_host.boot import private_ca
from mlflow_host.machine import nginx, status
from tests.support.servers import BUILD, REPOSITORY
from tests.support.services import free_port
from tests.support.shipped_nginx import HOST, running_nginx, starting_site

PAGE = REPOSITORY / "provisioning" / "rootfs" / "usr" / "share" / "mlflow-host" / "page.html"
REASON = (
    "the bucket mlflow-dev-artifacts-0f3b6c1e is in eu-west-1, not in eu-central-1, or does not exist: "
    "set <artifacts> in the launch document right & launch again"
)


@pytest.fixture(autouse=True)
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make status.publish write the statuses of boot steps to `tmp_path`, with the status page that the image
    contains."""
    (tmp_path / "status").mkdir()
    (tmp_path / "web").mkdir()
    monkeypatch.setattr(status, "publish", lambda run: publish(run, PAGE))


publish = status.publish


def show(chromium: Chrome, run: Path, name: str, width: int = 1280) -> str:
    chromium.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    try:
        chromium.get((run / "web" / "status.html").as_uri())
        (BUILD / "browser").mkdir(parents=True, exist_ok=True)
        chromium.save_screenshot(str(BUILD / "browser" / f"status_{name}.png"))
        overflow = chromium.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
        assert overflow <= 0, f"the page is {overflow} px wider than a window of {width} px"
    finally:
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    return chromium.find_element(By.TAG_NAME, "body").text


def test_page_names_the_running_step(chromium: Chrome, tmp_path: Path) -> None:
    for name in ("configure", "data-volume", "postgresql"):
        with status.step(name, tmp_path):
            pass
    status.BootStep("database", tmp_path).say("copying 64 tables")
    for width in (1280, 390):
        shown = show(chromium, tmp_path, f"starting_{width}", width)
        assert "MLflow is starting" in shown and "copying 64 tables" in shown
        places = [shown.index(name) for name in status.STEPS if name not in status.OPTIONAL]
        assert places == sorted(places)


def test_page_shows_the_reason_of_a_failure_unchanged(chromium: Chrome, tmp_path: Path) -> None:
    with status.step("configure", tmp_path):
        pass
    with pytest.raises(SystemExit), status.step("data-volume", tmp_path):
        raise status.StepFailed(REASON)
    for width in (1280, 390):
        shown = show(chromium, tmp_path, f"failed_{width}", width)
        assert "MLflow could not start" in shown
        assert REASON in re.sub(r"\s+", " ", shown)


class Answering(BaseHTTPRequestHandler):
    """A web server in place of MLflow's site on a configured machine. If `location` is set, the server redirects to
    `location`. The server records the Authorization headers."""

    location = ""
    asked: list[str | None]

    def do_GET(self) -> None:
        self.asked.append(self.headers["Authorization"])
        self.send_response(308 if self.location else 200)
        if self.location:
            self.send_header("Location", self.location + self.path)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<title>MLflow</title>this is MLflow")

    def log_message(self, *_: object) -> None:
        return


def answering(port: int, location: str = "") -> ThreadingHTTPServer:
    handler = type("Own", (Answering,), {"location": location, "asked": []})
    server = ThreadingHTTPServer((HOST, port), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


@pytest.fixture
def machine() -> Iterator[Path]:
    """Create a folder that the user of nginx's workers can read."""
    with tempfile.TemporaryDirectory(prefix="mlflow-status-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def until_shown(chromium: Chrome, text: str, seconds: float = 60) -> None:
    ends = time.monotonic() + seconds
    while text not in (shown := chromium.execute_script("return document.body ? document.body.innerText : ''")):
        assert time.monotonic() < ends, f"{text!r} is not shown, but {shown!r}"
        time.sleep(0.2)


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed (scripts/prepare.sh installs it)")
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_open_tab_recovers_after_an_outage(
    scheme: str, chromium: Chrome, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = {"http": free_port(), "https": free_port()}
    run, page = machine / "run/mlflow-host", machine / "usr/share/mlflow-host/page.html"
    configuration = starting_site(machine, {80: f"{HOST}:{ports['http']}", 443: f"{HOST}:{ports['https']}"})

    def say(message: str) -> None:
        status.BootStep("database", run).record("running", message)
        publish(run, page)

    if scheme == "https":
        # This machine serves the stack's certificate, because the page reloads itself if the certificate is temporary.
        made = private_ca.ensure((HOST,), machine / "srv/mlflow/certificates")
        monkeypatch.setattr(nginx, "reload", lambda: None)
        nginx.put_starting_certificate(nginx.Certificate(made.certificate, made.key, trusted=False), run=run)
    say("copying 64 tables")
    with running_nginx(configuration, ports["http"], machine / "nginx.log"):
        chromium.get(f"{scheme}://{HOST}:{ports[scheme]}/models?page=2#/here")
        until_shown(chromium, "copying 64 tables")
        say("verifying 64 tables")
        until_shown(chromium, "verifying 64 tables")
    until_shown(chromium, "The server is not reachable at the moment.")
    assert "verifying 64 tables" in chromium.find_element(By.TAG_NAME, "body").text
    time.sleep(5)
    status.BootStep("database", run).record("failed", REASON)
    publish(run, page)
    with running_nginx(configuration, ports["http"], machine / "nginx.log"):
        until_shown(chromium, "MLflow could not start")
        until_shown(chromium, REASON)
    away = answering(free_port())
    site = answering(ports["http"], f"http://{HOST}:{away.server_port}") if scheme == "http" else None
    try:
        if site:
            until_shown(chromium, "this is MLflow")
            assert chromium.current_url == f"http://{HOST}:{away.server_port}/models?page=2#/here"
    finally:
        for server in (away, *filter(None, [site])):
            server.shutdown()
            server.server_close()


def test_page_loads_no_external_resource() -> None:
    """The status page must work when no other service works, and must not reveal its viewers to another site."""
    assert not re.search(r"(?:src|href|@import|url\()\s*=?\s*[\"'(]?(?:https?:)?//", PAGE.read_text())
