"""The drill's books: whatever is lost between two stops is found, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import drill
import pytest
from drilling.ledger import Ledger, Touched, differences, leaves
from local_cloud import LocalCloud

NOTHING = Touched(set(), set())
FIRST = {"runs": {"a": {"metrics": [1, 2, 3]}, "b": {"metrics": []}}, "queues": {"q": {"items": ["x"]}}}


def ledger() -> Ledger:
    """One stop of the newer release, which knows queues."""
    opened = Ledger()
    assert len(opened.enter("2", NOTHING, FIRST)) == 3
    return opened


def told(opened: Ledger, release: str, now: dict[str, dict[str, object]]) -> list[str]:
    return [str(finding) for finding in opened.compare(release, now)]


def test_what_is_as_it_was_is_no_finding() -> None:
    opened = ledger()
    assert told(opened, "2", FIRST) == []
    assert opened.known(FIRST) == {("runs", "a"), ("runs", "b"), ("queues", "q")}
    assert opened.waiting(FIRST) == set()


def test_what_is_gone_is_missing() -> None:
    assert told(ledger(), "2", {**FIRST, "runs": {"a": FIRST["runs"]["a"]}}) == ["runs b of stop 0 is missing"]


def test_a_kind_of_thing_that_the_release_does_not_know_waits_and_is_missed_where_it_does() -> None:
    opened = ledger()
    older = {"runs": FIRST["runs"]}
    assert told(opened, "1", older) == []
    assert opened.waiting(older) == {("queues", "q")}
    opened.enter("1", NOTHING, older)
    assert told(opened, "2", {**FIRST, "queues": {}}) == ["queues q of stop 0 is missing"]


def test_one_value_of_a_history_that_differs_is_a_change() -> None:
    changed = {**FIRST, "runs": {**FIRST["runs"], "a": {"metrics": [1, 2, 4]}}}
    assert told(ledger(), "2", changed) == ["runs a of stop 0: /metrics[2] was '3' and is '4'"]
    shortened = {**FIRST, "runs": {**FIRST["runs"], "a": {"metrics": [1, 2]}}}
    assert told(ledger(), "2", shortened) == ["runs a of stop 0: /metrics was '[1, 2, 3]' and is '[1, 2]'"]


def test_what_a_stop_changed_or_deleted_itself_is_no_loss_but_must_not_come_back() -> None:
    opened = ledger()
    now = {**FIRST, "runs": {"a": {"metrics": [9]}}}
    opened.enter("2", Touched({("runs", "a")}, {("runs", "b")}), now)
    assert told(opened, "2", now) == []
    assert told(opened, "2", {**now, "runs": {**now["runs"], "b": {}}}) == ["runs b of stop 0 was deleted and is back"]
    assert told(opened, "2", FIRST)[0] == "runs b of stop 0 was deleted and is back"


def test_fields_of_one_release_only_count_between_stops_of_that_release() -> None:
    was, found = {"name": "n", "new": 1}, {"name": "n"}
    assert differences(was, found, exact=False) == []
    assert differences(was, found, exact=True) == ["/new is only before"]


def test_an_older_release_may_show_a_text_cut_to_its_column() -> None:
    long, cut = "x" * 6000, "x" * 5000
    assert differences(long, cut, exact=False) == []
    assert differences(long, cut, exact=True) != []
    assert differences("x" * 600, "x" * 500, exact=False) != []


def test_leaves_count_single_values() -> None:
    assert leaves(FIRST["runs"]) == 3 and leaves({"a": [1, {"b": None}], "c": "text"}) == 3


STOP = drill.Stop("ami-1", "3.17.2", "upgrade done", 50, 4000, 0, 0, 2, 30, 31.25, ())


def exit_status(stops: list[drill.Stop], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> int:
    """Of a drill that went like this; baking and launching left out."""
    monkeypatch.setenv("MLFLOW_AMI_LOCAL_CLOUD", str(tmp_path))
    monkeypatch.setenv("MLFLOW_AMI_REHEARSAL", "of-the-tests")
    for part in ("up", "down"):
        monkeypatch.setattr(LocalCloud, part, lambda self: None)
    monkeypatch.setattr(drill, "drill", lambda cloud, images: stops)
    return drill.main(["ami-0123456789abcdef0", "ami-0123456789abcdef1"])


def test_the_exit_status_and_the_table_tell_of_losses(
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


def test_an_outage_lasts_from_the_last_answer_to_the_next() -> None:
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
def test_an_argument_that_names_no_image_is_refused(wrong: str) -> None:
    done = subprocess.run([sys.executable, drill.__file__, wrong, "3.12.0"], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{wrong!r} is neither an image's id nor a release of MLflow" in done.stderr
