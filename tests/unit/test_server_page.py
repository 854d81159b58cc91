"""Test the content of the page /mlflow-host/, and the history from which the page is generated."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mlflow_host.monitor import run
from mlflow_host.monitor.history import MINUTES, History, Minute, days_until_full
from mlflow_host.monitor.page import Page, age
from tests.support.shipped_nginx import ROOTFS
from tests.unit.test_audit_trail import parsed

NOW = datetime(2026, 11, 30, 12, 0, tzinfo=UTC)
AT = int(NOW.timestamp() // 60)
TEMPLATE = ROOTFS / "usr/share/mlflow-host/overview.html"


def page_of(folder: Path) -> Page:
    for name in ("web", "status", "reports", "backups"):
        (folder / name).mkdir(exist_ok=True)
    return Page(folder / "index.html", TEMPLATE, run=folder, data=folder, facts=folder / "image.json")


def filled(folder: Path) -> Page:
    """Return the page of a machine whose reports fill every section."""
    page = page_of(folder)
    facts = {"mlflow_version": "3.17.2", "image_version": "20261130T000000Z", "migration_head": "dc11669786a5"}
    (folder / "image.json").write_text(json.dumps(facts))
    (folder / "web/room.json").write_text(
        json.dumps({"used_percent": 41.5, "free_mib": 9000, "problem": "<b>full</b>"})
    )
    (folder / "web/backups.json").write_text(json.dumps({"problems": ["the last dump is 40 hours old"]}))
    (folder / "backups/dump.json").write_text(json.dumps({"at": "2026-11-30T03:00:00Z"}))
    step = {"step": "database", "state": "done", "message": "upgrade done", "seconds": 4.25}
    (folder / "status/database.json").write_text(json.dumps(step))
    report = {
        "action": "upgrade",
        "at": "2026-11-29T00:00:00Z",
        "from_version": "3.12.0",
        "to_version": "3.17.2",
        "kept_database": "mlflow_kept_x",
        "seconds": {"copy": 3.0, "verify": 1.5},
    }
    (folder / "reports/20261129T000000Z-upgrade.json").write_text(json.dumps(report))
    (folder / "reports/garbage.json").write_text(
        json.dumps({"at": "2026-11-29T02:40:00Z", "summary": "3 runs removed"})
    )
    return page


def history(folder: Path, minutes: int = 300) -> History:
    made = [Minute(AT - n, 60 * (n % 7), n % 3, 4.5, 20.5, 40 - n / 300) for n in range(minutes, 0, -1)]
    return History(
        folder / "history.json", made, {"ada": "2026-11-30T11:50:00+00:00", "bob<i>": "2026-11-28T11:00:00Z"}
    )


def test_page_shows_the_state_of_the_server(tmp_path: Path) -> None:
    shown = filled(tmp_path).render(history(tmp_path), NOW)
    text = re.sub(r"<[^>]+>", " ", shown)
    for part in (
        *("MLflow 3.17.2, image 20261130T000000Z, schema dc11669786a5", "41.5 %, 9,000 MiB left"),
        *("the last dump is 40 hours old", "9 hours ago", "upgrade done (4.2 s)"),
        *("upgrade from MLflow 3.12.0 to 3.17.2", "3 runs removed", "10 minutes ago", "2 days ago", "4.5 ms, 20.5 ms"),
    ):
        assert part in text, part
    assert shown.count("<svg") == 3
    assert "&lt;b&gt;full&lt;/b&gt;" in shown and "bob&lt;i&gt;" in shown and "<i>" not in shown


def test_page_of_a_new_machine_is_complete(tmp_path: Path) -> None:
    shown = page_of(tmp_path).render(History(tmp_path / "history.json"), NOW)
    assert shown.count("<section>") == 8
    assert "no data yet" in shown and "nobody yet" in shown and "none on this data volume" in shown


def test_page_loads_nothing_and_runs_no_script(tmp_path: Path) -> None:
    shown = filled(tmp_path).render(history(tmp_path), NOW)
    assert not re.search(r"<script|\son\w+=|javascript:|https?://|url\(|@import", shown)


def test_line_has_a_gap_where_the_server_was_off(tmp_path: Path) -> None:
    minutes = [Minute(AT - n, 60, 0, 1, 2, 40) for n in (90, 89, 88, 10, 9)]
    shown = page_of(tmp_path).render(History(tmp_path / "h", minutes), NOW)
    (line,) = re.findall(r'aria-label="plot in /s">.*?<path class="plot" d="([^"]+)"', shown)
    assert (line.count("M"), line.count("L")) == (2, 3)


def test_minute_counts_requests_and_latencies_of_mlflow(tmp_path: Path) -> None:
    kept = History(tmp_path / "history.json")
    kept.add(
        [parsed(), parsed(status="503"), parsed(path="/get-artifact"), parsed(upstream="-", accepted="0", user="eve")]
    )
    kept.end_minute(AT, 12.344)
    again = History.load(tmp_path / "history.json")
    assert again.minutes == [Minute(AT, 4, 1, 4.0, 4.0, 12.34)]
    assert set(again.seen) == {"ada"}
    kept.end_minute(AT + 1, 12.3)
    assert kept.minutes[-1][:4] == (AT + 1, 0, 0, 0.0)


def test_history_is_limited_to_a_day(tmp_path: Path) -> None:
    kept = History(tmp_path / "h", [Minute(AT - n, 1, 0, 1, 1, 1) for n in range(2 * MINUTES, 0, -1)])
    kept.end_minute(AT, 1)
    assert (len(kept.minutes), kept.minutes[0].at) == (MINUTES, AT - MINUTES + 1)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"minutes": [[1]], "seen": {}}'])
def test_unreadable_history_is_an_empty_one(content: str, tmp_path: Path) -> None:
    (tmp_path / "h").write_text(content)
    assert History.load(tmp_path / "h").minutes == []


def test_forecast_continues_the_growth(tmp_path: Path) -> None:
    growing = [Minute(AT + n, 0, 0, 0, 0, 50 + n * 10 / MINUTES) for n in range(120)]  # 10 % a day
    assert days_until_full(growing) == pytest.approx(4.92, abs=0.05)
    assert days_until_full(growing[:59]) is None
    assert days_until_full([each._replace(disk_percent=50) for each in growing]) is None
    assert days_until_full([each._replace(disk_percent=100 - each.disk_percent) for each in growing]) is None


def test_age_is_in_words() -> None:
    assert [age(NOW - timedelta(minutes=n), NOW) for n in (0, 59, 119, 120, 2880)] == [
        *("0 minutes ago", "59 minutes ago", "119 minutes ago", "2 hours ago", "2 days ago")
    ]
    assert age(None, NOW) == "none yet"


def test_page_is_written_each_minute_and_its_failure_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = page_of(tmp_path)
    minutes = run.Minutes(History(tmp_path / "history.json"), page, minute=AT)
    minutes.tick()
    assert page.target.stat().st_mode & 0o777 == 0o644
    page.template = tmp_path / "missing"
    minutes.minute = AT
    minutes.tick()
    assert "the page /mlflow-host/ is not written" in capsys.readouterr().err
