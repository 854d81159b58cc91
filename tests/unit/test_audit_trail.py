"""The audit trail has exactly one line for each write that succeeded or was refused, and contains no secret."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from mlflow_host.bake import reader_routes
from mlflow_host.contract import audit_trail
from mlflow_host.monitor import audit, request_log, run, upload
from mlflow_host.monitor.request_log import Follower, Position, Request
from mlflow_host.monitor.routes import Routes
from mlflow_host.server import request_ids
from mlflow_host.server.flask_shortcut import Message, Receive, Scope, Send
from tests.support.services import object_store

KNOWN = Routes(
    [
        ("POST", "/api/2.0/mlflow/runs/log-metric"),
        ("PUT", "/api/2.0/mlflow-artifacts/artifacts/<path:artifact_path>"),
        ("POST", "/api/3.0/mlflow/traces/<trace_id>/assessments"),
        ("PATCH", "/api/3.0/mlflow/x/<name:path>/y"),
    ]
)


def logged(**changed: str) -> str:
    """A line of nginx's log."""
    fields = {
        "time": "2026-11-30T06:10:00+00:00",
        "address": "203.0.113.7",
        "user": "ada",
        "method": "POST",
        "path": "/api/2.0/mlflow/runs/log-metric",
        "status": "200",
        "upstream": "200",
        "writes": "1",
        "accepted": "1",
        "role": "writer",
        "by": "direct",
        "ids": "run_id=abc",
    } | changed
    return (
        '{time} {address} {user} "{method} {path}" {status} 2 310 0.004 "{upstream}" {writes} {accepted} {role} '
        '"{by}" "{ids}"'.format(**fields)
    )


def parsed(**changed: str) -> Request:
    found = request_log.parse(logged(**changed))
    assert found is not None
    return found


# ── Lines ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_line_names_who_did_what_to_which_item() -> None:
    assert [*audit.Lines(KNOWN).of([parsed()])] == [
        {
            "time": "2026-11-30T06:10:00Z",
            "user": "ada",
            "role": "writer",
            "login": "accepted",
            "address": "203.0.113.7",
            "method": "POST",
            "route": "/api/2.0/mlflow/runs/log-metric",
            "ids": {"run_id": "abc"},
            "status": 200,
        }
    ]


def test_parts_of_a_path_are_ids() -> None:
    path = "/api/2.0/mlflow-artifacts/artifacts/0/abc/artifacts/model%20x.bin"
    (line,) = audit.Lines(KNOWN).of([parsed(method="PUT", path=path, ids="-")])
    assert line["route"] == "/api/2.0/mlflow-artifacts/artifacts/<path:artifact_path>"
    assert line["ids"] == {"artifact_path": "0/abc/artifacts/model x.bin"}
    assert KNOWN.match("PATCH", "/api/3.0/mlflow/x/a/b/y").ids == (("name", "a/b"),)
    assert KNOWN.match("POST", "/api/3.0/mlflow/traces/a/b/assessments").route == ""


def test_reads_have_no_line() -> None:
    assert [*audit.Lines(KNOWN).of([parsed(writes="0")])] == []


def test_user_and_path_are_written_as_they_were_sent() -> None:
    found = parsed(user=r"\xC3\xA9ve \x22x\x22 \x5C", path=r"/\xF0\x9F\xA6\x8A")
    assert (found.user, found.path) == ('éve "x" \\', "/🦊")
    assert parsed(user="-").user == ""


def test_lines_of_other_formats_are_no_requests() -> None:
    old = '2026-11-30T06:10:00+00:00 203.0.113.7 - "POST /x" 429 2 310 0.000 -'
    assert [request_log.parse(line) for line in ("", old, logged()[:-20])] == [None] * 3


def test_refusals_of_one_address_are_bounded_and_counted() -> None:
    lines = audit.Lines(KNOWN)
    refused = [parsed(status="401", upstream="-", accepted="0", user=f"u{n}") for n in range(50)]
    first = [*lines.of([*refused, parsed(address="203.0.113.8", status="401", accepted="0")])]
    assert len(first) == audit.REFUSALS + 1
    assert {(line["login"], line["role"]) for line in first} == {("refused", None)}
    (counted, line) = lines.of([parsed(time="2026-11-30T06:11:00+00:00", status="401", accepted="0")])
    assert counted == {
        "time": "2026-11-30T06:10:59Z",
        "address": "203.0.113.7",
        "login": "refused",
        "more_refusals": 50 - audit.REFUSALS,
    }
    assert line["status"] == 401
    assert len([*lines.of([parsed()] * 100)]) == 100, "accepted users are not bounded"


# ── IDs from the server's processes ───────────────────────────────────────────────────────────────────────────────────


def header(method: str, body: bytes, answer: bytes = b"{}", path: str = "/api/2.0/mlflow/x", query: str = "") -> str:
    """Return the header with IDs that the middleware adds to the response of an application that answers `answer`."""
    sent: list[Message] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": answer})

    async def receive(parts: list[bytes] = [body[:10], body[10:]]) -> Message:  # noqa: B006
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(request_ids.EXPERIMENT, b"7")]
    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": headers}
    asyncio.run(request_ids.naming_ids(application)(scope, receive, send))
    assert sent[1]["body"] == answer
    found: bytes = dict(sent[0]["headers"]).get(request_ids.IDS, b"-")
    return found.decode()


@pytest.mark.parametrize(
    ("body", "path", "found"),
    [
        (b' {"run_id": "REAL"}', "/api/2.0/mlflow/runs/delete", "run_id=REAL"),
        (b'"{\\"run_id\\": \\"REAL\\"}"', "/api/2.0/mlflow/runs/delete", "run_id=REAL"),
        (b'{"name": "prod", "x_id": "\\ud800"}', "/api/2.0/mlflow/registered-models/delete", "name=prod&x_id=%3F"),
        (b'{"aws_access_key_id": "secret"}', "/api/2.0/mlflow-artifacts/artifacts/0/a/x.json", "run_id=FAKE"),
        (b'{"pad": "' + bytes(20_000).replace(b"\0", b" ") + b'", "run_id": "R"}', "/api/x", "run_id=FAKE&cut=1"),
    ],
    ids=["a space before", "JSON in a text", "half a surrogate pair", "a file", "beyond the part that is read"],
)
def test_ids_are_those_that_mlflow_reads(body: bytes, path: str, found: str) -> None:
    assert header("POST", body, path=path, query="run_id=FAKE" if "FAKE" in found or "REAL" in found else "") == found


def test_fields_that_do_not_fit_are_said_to_be_cut() -> None:
    fields = {f"{letter}_id": letter * 200 for letter in "abcdef"} | {"run_id": "REAL"}
    found = header("POST", json.dumps(fields).encode())
    assert found.endswith("&cut=1") and len(found) <= request_ids.HEADER_CHARACTERS + len("&cut=1")


def test_header_has_ids_of_request_and_response_and_no_values() -> None:
    body = json.dumps({"run_id": "abc", "key": "password", "value": "hunter2", "user_id": "eve", "step": 3}).encode()
    assert header("POST", body) == "run_id=abc"
    created = json.dumps({"run": {"info": {"run_id": "new", "experiment_id": "5"}, "data": {"tags": []}}}).encode()
    assert header("POST", b'{"experiment_id": "5", "tags": []}', created) == "experiment_id=5&run_id=new"
    assert header("DELETE", b"", query="name=m%2F1&token=hunter2") == "name=m%2F1"
    assert header("POST", b'{"names": ["a"], "trace_ids": ["t1", "t2"]}') == "trace_ids=t1%2Ct2"
    assert header("POST", b"\x0a\x00", b"", path="/v1/traces") == "experiment_id=7"


def test_reads_get_no_header() -> None:
    assert header("GET", b"", query="run_id=abc") == "-"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'{"a":' * 100_000, b"\xff\xfe", b'{"run_id": {"a": 1}}', b'{"run_id": null}']
)
def test_any_body_is_passed_on(body: bytes) -> None:
    assert header("POST", body) == ("cut=1" if len(body) > request_ids.REQUEST_BYTES else "")


def test_first_ids_of_a_long_body_are_found() -> None:
    body = json.dumps({"run_id": "abc", "metrics": [{"key": "x" * 100, "value": 1}] * 1000}).encode()
    assert header("POST", body) == "run_id=abc&cut=1"


def test_header_is_bounded_and_ascii() -> None:
    body = json.dumps({f"a{letter}_id": "é\n" * 100 for letter in "bcdefgh"}).encode()
    found = header("POST", body)
    assert 0 < len(found) <= request_ids.HEADER_CHARACTERS + len("&cut=1") and found.isascii() and found.isprintable()


@pytest.mark.long
def test_every_route_that_writes_has_a_name() -> None:
    routes = [route for route in reader_routes.installed_routes() if route.method not in reader_routes.READING_METHODS]
    known = Routes([(route.method, route.path) for route in routes])
    for route in routes:
        path = route.path.replace("<", "").replace(">", "")
        assert known.match(route.method, path).route, route


# ── The log ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_log_is_followed_across_a_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "IDLE_READS", 2)
    log = tmp_path / "access.log"
    follower = Follower(log, Position())
    assert follower.read() == []
    log.write_text("a\nb\nhal")
    assert follower.read() == ["a", "b"]
    with log.open("a") as written:
        written.write("f\n")
        written.flush()
        log.rename(tmp_path / "access.log.1")
        log.write_text("new\n")
        assert follower.read() == ["half"]
        written.write("late\n")
        written.flush()
        assert follower.read() == ["late"]
    found = [follower.read() for _ in range(4)]
    assert [lines for lines in found if lines] == [["new"]]


def test_reading_resumes_in_a_renamed_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "IDLE_READS", 1)
    log = tmp_path / "access.log"
    log.write_text("a\nb\n")
    position = Position(log.stat().st_ino, 2)
    log.rename(tmp_path / "access.log.1")
    log.write_text("new\n")
    follower = Follower(log, position)
    assert [follower.read() for _ in range(4)] == [["b"], [], ["new"], []]


@pytest.mark.parametrize("moment", ["add", "record", "complete"])
def test_a_kill_loses_no_line_and_writes_none_twice(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, spool = tmp_path / "access.log", audit.Spool(tmp_path)
    numbers = [f"{number:032x}" for number in range(30)]
    log.write_text("".join(logged(ids=f"run_id={number}") + "\n" for number in numbers[:10]))
    stopped = threading.Event()
    stopped.set()

    class Killed(Exception):
        pass

    def killed(*_: Any) -> None:
        raise Killed

    run.follow(log, spool, KNOWN, stopped)
    with log.open("a") as file:
        file.writelines(logged(ids=f"run_id={number}") + "\n" for number in numbers[10:20])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if moment == "add":  # killed when the lines are written, but the position is not
            patch.setattr(audit.Spool, "record", killed)
        elif moment == "record":
            patch.setattr(audit.Spool, "complete", killed)
        else:
            rename = Path.rename

            def renamed_and_killed(path: Path, target: Path) -> None:
                rename(path, target)
                raise Killed

            patch.setattr(Path, "rename", renamed_and_killed)
        run.follow(log, spool, KNOWN, stopped)
    with log.open("a") as file:
        file.writelines(logged(ids=f"run_id={number}") + "\n" for number in numbers[20:])
    run.follow(log, spool, KNOWN, stopped)
    found = [json.loads(line)["ids"]["run_id"] for path in spool.waiting() for line in path.read_text().splitlines()]
    assert sorted(found) == numbers


def test_files_that_wait_for_too_long_are_deleted_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log, spool = tmp_path / "access.log", audit.Spool(tmp_path)
    stopped = threading.Event()
    stopped.set()
    log.touch()
    monkeypatch.setattr(audit, "WAITING_BYTES", 3 * 300)
    for number in range(6):
        with log.open("a") as file:
            file.write(logged(ids=f"run_id={number:032x}", time=f"2026-11-30T06:1{number}:00+00:00") + "\n")
        run.follow(log, spool, KNOWN, stopped)
    left = "".join(path.read_text() for path in spool.waiting())
    assert f"{5:032x}" in left and f"{0:032x}" not in left
    assert "of the audit trail is deleted" in capsys.readouterr().err


# ── Objects ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_object_name_has_the_times_of_its_lines() -> None:
    span = audit_trail.Span(datetime(2026, 11, 29, 23, 59, tzinfo=UTC), datetime(2026, 11, 30, 0, 9, tzinfo=UTC))
    key = audit_trail.key(audit_trail.file_name(span, "9f86d081"), "vol-0123")
    assert key == "audit/2026/11/29/20261129T235900Z-20261130T000900Z-vol-0123-9f86d081.jsonl.gz"
    assert audit_trail.span_of(key) == span
    assert audit_trail.span_of("audit/2026/11/29/else.jsonl.gz") is None


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with object_store(tmp_path_factory.mktemp("store")) as running:
        client = running.client()
        client.create_bucket(Bucket="backups")
        yield client


@pytest.mark.service
def test_complete_files_are_added_to_the_bucket_once(store: Any, tmp_path: Path) -> None:
    spool = audit.Spool(tmp_path)
    line = json.dumps(next(audit.Lines(KNOWN).of([parsed()])))
    spool.add([line, line], Position(1, 2))
    spool.complete(Position(1, 2))
    spool.add(["{}"], Position(1, 3))
    (waiting,) = spool.waiting()
    content = waiting.read_bytes()
    (key,) = upload.send(spool, store, "backups", "vol-0123")
    assert gzip.decompress(store.get_object(Bucket="backups", Key=key)["Body"].read()) == content
    assert spool.waiting() == [] and spool.current.exists()
    waiting.write_bytes(content + b"\n")  # simulate a kill between upload and deletion
    assert upload.send(spool, store, "backups", "vol-0123") == [key]
    assert gzip.decompress(store.get_object(Bucket="backups", Key=key)["Body"].read()) == content


def test_follower_of_a_growing_log_ends_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nginx writes 2,000 lines while the service stops, and the service reads all lines."""
    monkeypatch.setattr(run, "PAUSE_SECONDS", 0.01)
    log, spool, stopping = tmp_path / "access.log", audit.Spool(tmp_path), threading.Event()
    running = threading.Thread(target=run.follow, args=(log, spool, KNOWN, stopping))
    running.start()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in range(2000):
        os.write(handle, f"{logged(ids=f'run_id={number:032x}')}\n".encode())
        if number == 1000:
            time.sleep(0.05)
    os.close(handle)
    stopping.set()
    running.join(30)
    found = [json.loads(line)["ids"]["run_id"] for path in spool.waiting() for line in path.read_text().splitlines()]
    assert found == [f"{number:032x}" for number in range(2000)]
