"""Test the drill: it finds all data that was lost between two stops, and reports no loss that did not happen. Further
tests check the exit status and the measured outage."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import drill
from scripts.drilling.expected_writes import ExpectedWrites, Sections, Touched, differences, leaves
from scripts.imaging import ec2_images, promoting
from scripts.local_cloud import LocalCloud

NOTHING = Touched(set(), set())
FIRST: Sections = {"runs": {"a": {"metrics": [1, 2, 3]}, "b": {"metrics": []}}, "queues": {"q": {"items": ["x"]}}}


def one_stop() -> ExpectedWrites:
    """Return the expected data after one stop with the newer release, which supports queues."""
    expected = ExpectedWrites()
    assert len(expected.add("2", NOTHING, FIRST)) == 3
    return expected


def findings(expected: ExpectedWrites, release: str, now: Sections) -> list[str]:
    return [str(finding) for finding in expected.compare(release, now)]


def test_unchanged_data_has_no_findings() -> None:
    expected = one_stop()
    assert findings(expected, "2", FIRST) == []
    assert expected.supported(FIRST) == {("runs", "a"), ("runs", "b"), ("queues", "q")}
    assert expected.unsupported(FIRST) == set()


def test_absent_object_is_missing() -> None:
    now = {**FIRST, "runs": {"a": FIRST["runs"]["a"]}}
    assert findings(one_stop(), "2", now) == ["runs b of stop 0 is missing"]


def test_unsupported_kind_is_missing_only_for_a_release_that_supports_it() -> None:
    expected = one_stop()
    older = {"runs": FIRST["runs"]}
    assert findings(expected, "1", older) == []
    assert expected.unsupported(older) == {("queues", "q")}
    expected.add("1", NOTHING, older)
    assert findings(expected, "2", {**FIRST, "queues": {}}) == ["queues q of stop 0 is missing"]


def test_one_different_value_in_a_metric_history_is_a_change() -> None:
    changed = {**FIRST, "runs": {**FIRST["runs"], "a": {"metrics": [1, 2, 4]}}}
    assert findings(one_stop(), "2", changed) == ["runs a of stop 0: /metrics[2] was '3' and is '4'"]
    shortened = {**FIRST, "runs": {**FIRST["runs"], "a": {"metrics": [1, 2]}}}
    assert findings(one_stop(), "2", shortened) == ["runs a of stop 0: /metrics was '[1, 2, 3]' and is '[1, 2]'"]


def test_deliberate_changes_and_deletions_are_no_losses_but_deleted_objects_must_stay_deleted() -> None:
    expected = one_stop()
    now = {**FIRST, "runs": {"a": {"metrics": [9]}}}
    expected.add("2", Touched({("runs", "a")}, {("runs", "b")}), now)
    assert findings(expected, "2", now) == []
    back = {**now, "runs": {**now["runs"], "b": {}}}
    assert findings(expected, "2", back) == ["runs b of stop 0 was deleted and exists again"]
    assert findings(expected, "2", FIRST)[0] == "runs b of stop 0 was deleted and exists again"


def test_fields_of_only_one_release_are_compared_between_stops_of_that_release() -> None:
    was, found = {"name": "n", "new": 1}, {"name": "n"}
    assert differences(was, found, exact=False) == []
    assert differences(was, found, exact=True) == ["/new exists only before"]


def test_links_that_an_older_server_does_not_return_are_no_change_until_its_own_release_reads() -> None:
    was = {"spans": [{"links": [{"span_id": "a"}], "name": "predict"}]}
    found = {"spans": [{"links": [], "name": "predict"}]}
    assert differences(was, found, exact=False) == differences(found, was, exact=False) == []
    assert differences(was, found, exact=True) != []
    other = {"spans": [{"links": [{"span_id": "b"}], "name": "predict"}]}
    assert differences(was, other, exact=False) == ["/spans[0]/links[0]/span_id was 'a' and is 'b'"]


def test_text_cut_to_the_column_of_an_older_release_is_equal() -> None:
    long, cut = "x" * 6000, "x" * 5000
    assert differences(long, cut, exact=False) == []
    assert differences(long, cut, exact=True) != []
    assert differences("x" * 600, "x" * 500, exact=False) != []


def test_leaves_count_single_values() -> None:
    assert leaves(FIRST["runs"]) == 3 and leaves({"a": [1, {"b": None}], "c": "text"}) == 3


STOP = drill.Stop("ami-1", "3.17.2", "upgrade done", 50, 4000, 0, 0, 2, 30, 31.25, ())


TAGGED: list[tuple[list[str], str]] = []
WANTED = ["ami-0123456789abcdef0", "ami-0123456789abcdef1"]


def an_image(id: str, *, finished: bool = True) -> ec2_images.Image:
    tags = {ec2_images.OURS: f"version-of-{id}", "mlflow-ami:mlflow-version": "3.17.2"}
    tags |= {"mlflow-ami:format": "1"} if finished else {}
    return ec2_images.Image(id, "", "", "available", tags, ())


def test_missing_images_are_reported_before_the_launch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_AMI_LOCAL_CLOUD", str(tmp_path))
    for part in ("up", "down"):
        monkeypatch.setattr(LocalCloud, part, lambda self: None)
    monkeypatch.setattr(LocalCloud, "client", lambda self, service: None)
    monkeypatch.setattr(ec2_images, "find", lambda ec2: [an_image(WANTED[0]), an_image(WANTED[1], finished=False)])
    monkeypatch.setattr(drill, "run_script", lambda *arguments: pytest.fail("it launched or baked something"))
    assert drill.main([WANTED[0], WANTED[1]]) == 2
    assert f"has no finished image {WANTED[1]}" in capsys.readouterr().err


def exit_status(stops: list[drill.Stop], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *more: str) -> int:
    """Run a drill with the results `stops`, without baking and launching, and return its exit status."""
    monkeypatch.setenv("MLFLOW_AMI_LOCAL_CLOUD", str(tmp_path))
    monkeypatch.setenv("MLFLOW_AMI_REHEARSAL", "of-the-tests")
    for part in ("up", "down"):
        monkeypatch.setattr(LocalCloud, part, lambda self: None)
    monkeypatch.setattr(drill, "drill", lambda cloud, images: stops)
    monkeypatch.setattr(LocalCloud, "region", "eu-central-1")
    client = SimpleNamespace(create_tags=lambda Resources, Tags: TAGGED.append((Resources, Tags[0]["Key"])))
    monkeypatch.setattr(LocalCloud, "client", lambda self, service: client)
    monkeypatch.setattr(ec2_images, "find", lambda ec2: [an_image(wanted) for wanted in WANTED])
    TAGGED.clear()
    return drill.main([*WANTED, *more])


def test_exit_status_and_table_show_losses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = replace(STOP, outage_seconds=None)
    assert exit_status([first, STOP], monkeypatch, tmp_path) == 0
    shown = capsys.readouterr()
    assert "nothing is lost" in shown.err
    assert [line.split() for line in shown.out.splitlines()] == [
        ["stop", "MLflow", "image", "written", "compared", "values", "missing", "changed", "waiting", "outage"],
        ["1", "3.17.2", "ami-1", "30", "50", "4,000", "0", "0", "2"],
        ["2", "3.17.2", "ami-1", "30", "50", "4,000", "0", "0", "2", "31.2", "s"],
    ]
    worse = replace(STOP, missing=1, changed=2, losses=("at stop 2: runs b of stop 0 is missing",))
    assert exit_status([first, worse], monkeypatch, tmp_path) == 1
    assert "runs b of stop 0 is missing" in capsys.readouterr().err


def test_passed_drill_is_recorded_on_the_newer_image_and_a_failed_one_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = replace(STOP, outage_seconds=None)
    assert exit_status([first, STOP], monkeypatch, tmp_path, "--json") == 0
    assert [([WANTED[1]], f"mlflow-ami:drill:version-of-{WANTED[0]}")] == TAGGED
    printed = tmp_path / "drill.json"
    printed.write_text(capsys.readouterr().out)
    found = promoting.read_drill(printed)
    assert [found[end]["image_version"] for end in ("older", "newer")] == [f"version-of-{each}" for each in WANTED]
    assert exit_status([first, replace(STOP, missing=1)], monkeypatch, tmp_path) == 1
    assert TAGGED == []


@pytest.mark.long
def test_outage_lasts_from_the_last_response_to_the_next() -> None:
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.headers["Authorization"] else 401)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    @contextmanager
    def up(port: int) -> Iterator[int]:
        server = ThreadingHTTPServer(("127.0.0.1", port), Answers)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.server_port
        server.shutdown()
        server.server_close()

    with up(0) as port:
        there = {
            "url": f"http://127.0.0.1:{port}",
            "username": "admin",
            "password": "secret",
            "server_certificate": None,
        }
        watched = drill.watching(there)
        outage = watched.__enter__()
        time.sleep(1)
    down = time.monotonic()
    time.sleep(1.5)
    with up(port):
        lasted = time.monotonic() - down
        watched.__exit__(None, None, None)
    assert lasted - 0.2 < outage() < lasted + 3


@pytest.mark.parametrize("wrong", ["newest", "3.12", "ami-", "i-0123456789abcdef0"])
def test_argument_that_names_no_image_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        drill.main([wrong, "3.12.0"])
    assert ended.value.code == 2
    assert f"{wrong!r} is neither an image ID nor a release of MLflow" in capsys.readouterr().err
