"""Every boot step reports its progress. If a step fails, the reason is in the status file, in the journal, on the
console and on the page."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mlflow_host.boot import report_failure
from mlflow_host.machine import config, status
from mlflow_host.machine.status import StepFailed, step

SHARE = Path(__file__).parents[2] / "provisioning/rootfs/usr/share/mlflow-host"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("status", "web"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(status, "PAGE", SHARE / "page.html")
    monkeypatch.setattr(status.publish, "__defaults__", (tmp_path, SHARE / "page.html"))
    return tmp_path


def recorded(run: Path, name: str) -> dict[str, object]:
    return dict(json.loads((run / "status" / f"{name}.json").read_text()))


def test_successful_step_is_recorded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with step("database", run) as s:
        assert recorded(run, "database")["state"] == "running"
        s.say("copying 64 tables")
        assert recorded(run, "database")["message"] == "copying 64 tables"
        assert recorded(run, "database")["ended"] is None
    end = recorded(run, "database")
    assert end["state"] == "done"
    assert isinstance(end["seconds"], float)
    started, ended = (datetime.fromisoformat(str(end[key])) for key in ("started", "ended"))
    assert timedelta(0) <= ended - started < timedelta(seconds=10)
    assert capsys.readouterr().err == "database: copying 64 tables\n"


def test_failed_step_records_its_reason_and_exits_with_2(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, step("database", run):
        raise StepFailed("the bucket x does not exist: create it")
    assert ended.value.code == 2
    assert recorded(run, "database")["state"] == "failed"
    assert recorded(run, "database")["message"] == "the bucket x does not exist: create it"
    assert capsys.readouterr().err == "mlflow-host: database failed: the bucket x does not exist: create it\n"


def test_a_bug_in_a_step_is_recorded_and_keeps_its_traceback(run: Path) -> None:
    with pytest.raises(ZeroDivisionError), step("database", run):
        print(1 / 0)
    assert recorded(run, "database")["state"] == "failed"
    assert str(recorded(run, "database")["message"]).startswith("ZeroDivisionError: division by zero (this is a bug")


def test_a_failed_step_as_a_process_has_no_traceback(run: Path) -> None:
    code = f"""
        from pathlib import Path
        from mlflow_host.machine.status import StepFailed, step
        with step("ready", Path({str(run)!r})):
            raise StepFailed("no luck: try again")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(status.__file__).parents[2])},
    )
    assert (done.returncode, done.stderr) == (2, "mlflow-host: ready failed: no luck: try again\n")


def test_the_end_of_a_step_that_another_process_began_counts_from_its_beginning(run: Path) -> None:
    begun = status.BootStep("postgresql", run)
    begun.started = datetime.now(UTC) - timedelta(seconds=7)
    begun.record("running")
    status.finish("postgresql", "PostgreSQL 15 accepts connections", run)
    assert recorded(run, "postgresql")["state"] == "done"
    assert 7 <= float(str(recorded(run, "postgresql")["seconds"])) < 17


def test_waiting_ends_when_the_step_is_done_and_not_before(run: Path) -> None:
    waiting = threading.Thread(target=status.wait_until_done, args=("database", run, 0.01), daemon=True)
    waiting.start()
    for state in ("running", "failed", "running"):
        status.BootStep("database", run).record(state)
        waiting.join(0.2)
        assert waiting.is_alive(), state
    status.BootStep("database", run).record("done")
    waiting.join(10)
    assert not waiting.is_alive()


def test_overall_state_follows_the_steps(run: Path) -> None:
    assert status.read(run) == {"state": "starting", "message": status.STEPS["configure"], "steps": []}
    with step("configure", run):
        pass
    assert status.read(run)["message"] == status.STEPS["data-volume"]
    with step("data-volume", run) as s:
        s.say("waiting for the volume")
        assert status.read(run)["message"] == "waiting for the volume"
    with pytest.raises(SystemExit), step("database", run):
        raise StepFailed("reason")
    assert status.read(run)["state"] == "failed"
    assert status.read(run)["message"] == "database failed: reason"
    with step("database", run):
        pass
    with step("ready", run):
        assert status.read(run)["state"] == "starting"
    assert status.read(run)["state"] == "ready"
    assert [s["step"] for s in status.read(run)["steps"]] == ["configure", "data-volume", "database", "ready"]


def test_partial_status_file_is_ignored(run: Path) -> None:
    (run / "status" / "broken.json").write_text('{"step": ')
    with step("configure", run):
        pass
    assert [s["step"] for s in status.read(run)["steps"]] == ["configure"]


def test_both_pages_follow_each_change(run: Path) -> None:
    with step("configure", run) as s:
        s.say("reading <everything> & more")
        page, data = (run / "web/status.html").read_text(), json.loads((run / "web/status.json").read_text())
        assert "reading &lt;everything&gt; &amp; more" in page
        assert "<everything>" not in page
        assert data["message"] == "reading <everything> & more"
        assert data["error_code"] == "TEMPORARILY_UNAVAILABLE"
    assert '<li class="done"><span class="name">configure</span>' in (run / "web/status.html").read_text()


@pytest.mark.parametrize(
    ("state", "heading"),
    [("starting", "MLflow is starting"), ("failed", "MLflow could not start"), ("ready", "MLflow is restarting")],
)
def test_page_names_the_state(state: str, heading: str) -> None:
    page = status.render({"state": state, "message": "m", "steps": []}, (SHARE / "page.html").read_text())
    assert f"<h1>{heading}</h1>" in page
    assert f'data-state="{state}"' in page
    assert page.count('<li class="waiting">') == len(status.STEPS) - len(status.OPTIONAL)
    assert "$" not in page


def test_page_shows_the_result_of_the_disk_space_check(run: Path) -> None:
    (run / "web/room.json").write_text('{"problem": "the data volume has 3.0 GiB & its file system 1.0"}')
    status.publish(run)
    assert "the data volume has 3.0 GiB &amp; its file system 1.0<br>" in (run / "web/status.html").read_text()
    assert "3.0 GiB" in json.loads((run / "web/status.json").read_text())["room"]["problem"]


def test_first_page_shows_no_started_step(tmp_path: Path) -> None:
    shutil.copy(SHARE / "page.html", tmp_path)
    status.publish_first(tmp_path)
    first = (tmp_path / "booting.html").read_text()
    assert "<h1>MLflow is starting</h1>" in first
    assert first.count('<li class="waiting">') == len(status.STEPS) - len(status.OPTIONAL)
    said = json.loads((tmp_path / "booting.json").read_text())
    assert (said["error_code"], said["state"], said["steps"]) == ("TEMPORARILY_UNAVAILABLE", "starting", [])


@pytest.mark.parametrize(("result", "state"), [("oom-kill", "failed"), ("timeout", "failed"), ("success", "running")])
def test_killed_step_is_recorded_as_failed(result: str, state: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "RUN", run)
    monkeypatch.setattr(report_failure, "result_of", lambda unit: result)
    monkeypatch.setattr(report_failure, "last_words", lambda unit: "out of memory")
    status.BootStep("database", run).record("running")
    report_failure.main("mlflow-host-database.service")
    assert recorded(run, "database")["state"] == state
    if state == "failed":
        assert (
            recorded(run, "database")["message"] == f"mlflow-host-database.service ended with {result}: out of memory"
        )


def test_recorded_reason_is_not_overwritten(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "RUN", run)
    status.BootStep("database", run).record("failed", "its own reason")
    report_failure.main("mlflow-host-database.service")
    assert recorded(run, "database")["message"] == "its own reason"


def test_page_lists_the_fallbacks_of_the_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "web").mkdir()
    facts = tmp_path / "image.json"
    facts.write_text(json.dumps({"fallbacks": [{"what": "2 routes <for> readers", "why": "POST /x"}]}))
    monkeypatch.setattr(status, "IMAGE", facts)
    page = Path(__file__).parents[2] / "provisioning/rootfs/usr/share/mlflow-host/page.html"
    status.publish(tmp_path, page)
    assert json.loads((tmp_path / "web/status.json").read_text())["fallbacks"] == ["2 routes <for> readers"]
    shown = (tmp_path / "web/status.html").read_text()
    assert "This release of MLflow does not support 2 routes &lt;for&gt; readers<br>" in shown
    facts.write_text("{}")  # of an older image
    status.publish(tmp_path, page)
    assert "does not support" not in (tmp_path / "web/status.html").read_text()
