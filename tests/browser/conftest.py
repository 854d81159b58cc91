"""Fixtures: a headless Chromium, and a Chromium that is logged in to the server."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

    from tests.support.servers import Server

# Without the switches for networking, Chromium would send requests to Google's hosts.
SWITCHES = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1500,1000",
]


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for switch in SWITCHES:
        options.add_argument(switch)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # The tests accept any certificate, like a user who accepts the warning. Other tests verify the certificate.
    options.accept_insecure_certs = True
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def browser(chromium: Chrome, server: Server, request: pytest.FixtureRequest) -> Iterator[Chrome]:
    """Yield the logged-in browser. A screenshot of the browser's last page is written to build/browser/, even if the
    test fails."""
    from tests.support.servers import BUILD

    log_in(chromium, server)
    chromium.get_log("browser")  # type: ignore[no-untyped-call]  # discard messages of earlier pages
    yield chromium
    folder = BUILD / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    chromium.save_screenshot(str(screenshot_path(folder, request.node.name)))


def log_in(chromium: Chrome, server: Server) -> None:
    """Log in with a URL that contains the password. The browser then keeps the login for later pages."""
    secret = f"{server.username}:{urllib.parse.quote(server.password, safe='')}@"
    chromium.get(f"{server.url}/version".replace("://", f"://{secret}", 1))


def screenshot_path(folder: Path, test: str) -> Path:
    return folder / (re.sub(r"[^\w-]+", "-", test.removeprefix("test_")).strip("-") + ".png")
