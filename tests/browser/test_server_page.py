"""The page /mlflow-host/ in Chromium, served by the shipped nginx configuration with its content security policy."""

from __future__ import annotations

import shutil
import tempfile
import urllib.parse
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from mlflow_host.monitor.history import History, Minute
from tests.support.servers import BUILD
from tests.unit.test_server_page import filled
from tests.unit.test_site import Site, running_site

pytestmark = [
    pytest.mark.service,
    pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed (scripts/prepare.sh installs it)"),
]


@pytest.fixture
def site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="mlflow-overview-") as name:
        Path(name).chmod(0o755)
        with running_site(Path(name)) as running:
            yield running


@pytest.mark.parametrize("width", [1280, 390])
def test_page_shows_its_plots_on_any_screen_and_breaks_no_policy(
    width: int, chromium: Chrome, site: Site, tmp_path: Path
) -> None:
    now = datetime.now(UTC)
    at = int(now.timestamp() // 60)
    minutes = [Minute(at - n, 600 + 40 * (n % 17), 0, 4 + n % 3, 20 + n % 11, 40 - n / 100) for n in range(300, 0, -1)]
    page = filled(tmp_path)
    target = site.folder / "run/mlflow-host-monitor"
    target.mkdir(mode=0o755)
    page.target = target / "index.html"
    page.write(History(tmp_path / "history.json", minutes, {"ada": now.isoformat()}), now)
    chromium.get_log("browser")  # type: ignore[no-untyped-call]  # discard messages of earlier pages
    chromium.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    try:
        login = f"ada:{urllib.parse.quote('correct horse')}"
        chromium.get(f"http://{login}@127.0.0.1:{site.port}/mlflow-host/")
        (BUILD / "browser").mkdir(parents=True, exist_ok=True)
        chromium.save_screenshot(str(BUILD / "browser" / f"overview_{width}.png"))
        text = chromium.find_element(By.TAG_NAME, "body").text
        assert "MLflow 3.17.2" in text and "full in" in text and "ada" in text
        plots = chromium.find_elements(By.CSS_SELECTOR, "svg path.plot")
        assert len(plots) == 4 and all(plot.size["width"] > 200 for plot in plots)
        overflow = chromium.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
        assert overflow <= 0, f"the page is {overflow} px wider than a window of {width} px"
        complaints = chromium.get_log("browser")  # type: ignore[no-untyped-call]
        assert [each for each in complaints if "favicon" not in each["message"]] == []
    finally:
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
