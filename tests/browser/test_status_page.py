"""The page people see until MLflow answers, as Chromium shows it: what is being done, or why it failed."""

import re
from pathlib import Path

import pytest
from mlflow_host import status
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from servers import BUILD, REPOSITORY

PAGE = REPOSITORY / "provisioning" / "rootfs" / "usr" / "share" / "mlflow-host" / "page.html"
REASON = (
    "the bucket mlflow-dev-artifacts-0f3b6c1e is in eu-west-1, not in eu-central-1, or does not exist: "
    "set <artifacts> in the launch document right & launch again"
)


@pytest.fixture(autouse=True)
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish statuses into `tmp_path` with the page that ships in the image."""
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


def test_starting_names_the_step_under_way(chromium: Chrome, tmp_path: Path) -> None:
    for name in ("configure", "data-volume", "postgresql"):
        with status.step(name, tmp_path):
            pass
    status.Step("database", tmp_path).say("copying 64 tables")
    for width in (1280, 390):
        shown = show(chromium, tmp_path, f"starting_{width}", width)
        assert "MLflow is starting" in shown and "copying 64 tables" in shown
        places = [shown.index(name) for name in status.STEPS if name not in status.OPTIONAL]
        assert places == sorted(places)


def test_failure_gives_the_reason_as_it_was_written(chromium: Chrome, tmp_path: Path) -> None:
    with status.step("configure", tmp_path):
        pass
    with pytest.raises(SystemExit), status.step("data-volume", tmp_path):
        raise status.StepFailed(REASON)
    for width in (1280, 390):
        shown = show(chromium, tmp_path, f"failed_{width}", width)
        assert "MLflow could not start" in shown
        assert REASON in re.sub(r"\s+", " ", shown)


def test_page_needs_nothing_from_elsewhere() -> None:
    """It is shown when nothing else works, and must not tell another site who looks at it."""
    assert not re.search(r"(?:src|href|@import|url\()\s*=?\s*[\"'(]?(?:https?:)?//", PAGE.read_text())
