"""The service `mlflow-host-logs` sends every line to CloudWatch Logs (moto) within PutLogEvents' limits."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import NoCredentialsError
from hypothesis import given
from hypothesis import strategies as st

from mlflow_host.contract import launch
from mlflow_host.logs import batch, journal, run
from mlflow_host.logs.batch import Batch
from mlflow_host.logs.journal import Event, Journal
from mlflow_host.machine import config
from mlflow_host.machine.status import StepFailed
from tests.support.moto_server import moto_server

GROUP = "/mlflow-ami/dev"
NOW = int(time.time() * 1000)


def line(number: int, unit: str = "mlflow-server@1.service", message: Any = "", at: int = NOW, **more: Any) -> bytes:
    fields = {
        "__CURSOR": f"s={number}",
        "__REALTIME_TIMESTAMP": str(at * 1000),
        "_PID": "77",
        "_SYSTEMD_UNIT": unit,
        "PRIORITY": "6",
        "MESSAGE": message or f"line {number}",
    }
    return json.dumps({**fields, **more}).encode() + b"\n"


def event(raw: bytes) -> Event | None:
    return journal.parse(raw)[1]


# Lines


@pytest.mark.parametrize(
    ("unit", "stream"),
    [
        ("nginx.service", "nginx"),
        ("mlflow-server@2.service", "mlflow"),
        ("mlflow-host-configure.service", "host"),
        ("mlflow-host-postgresql.service", "host"),
        ("ssh.service", ""),
        ("", ""),
    ],
)
def test_streams_are_those_of_nginx_mlflow_and_the_host(unit: str, stream: str) -> None:
    found = event(line(1, unit))
    assert (found.stream if found else "") == stream


def test_event_has_unit_priority_and_message() -> None:
    found = event(line(1, message="né", PRIORITY="4"))
    assert found and json.loads(found.text) == {"unit": "mlflow-server@1.service", "priority": 4, "message": "né"}
    assert found.at == NOW


def test_a_line_of_systemd_about_a_unit_is_the_units_and_no_other_program_can_write_one() -> None:
    about: dict[str, Any] = {"UNIT": "mlflow-host-gc.service"}
    told = event(line(1, "init.scope", "Failed with result 'exit-code'.", _PID="1", **about))
    assert told and told.stream == "host" and json.loads(told.text)["unit"] == "mlflow-host-gc.service"
    assert event(line(1, "cron.service", **about)) is None


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ([104, 105, 255], "hi\ufffd"),
        (["one", [116, 119, 111]], "one\ntwo"),
        (None, ""),
        ("\ud800", "?"),
    ],
)
def test_messages_that_are_no_single_text_are_sent(message: Any, text: str) -> None:
    fields: dict[str, Any] = {"MESSAGE": message}
    found = event(line(1, **fields))
    assert found and json.loads(found.text)["message"] == text


def test_message_beyond_the_limit_is_cut_and_says_so() -> None:
    found = event(line(1, message="\x01é" * 100_000))
    assert found and len(found.text.encode()) <= journal.EVENT_BYTES
    content = json.loads(found.text)
    assert content["cut"] is True and len(content["message"].encode()) > 39_000


# Batches

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["nginx", "mlflow", "host"]),
        st.integers(0, 3 * batch.SPAN),
        st.sampled_from([0, 1, 1000, 200_000, journal.EVENT_BYTES]),
    ),
    max_size=60,
)


@given(EVENTS)
def test_every_request_is_within_the_limits_and_every_event_is_in_one(made: list[tuple[str, int, int]]) -> None:
    events = [Event(stream, at, f"{number:03}" + "é" * (size // 2)) for number, (stream, at, size) in enumerate(made)]
    events = [each._replace(text=each.text.encode()[: journal.EVENT_BYTES].decode(errors="ignore")) for each in events]
    batches = [Batch()]
    for number, each in enumerate(events):
        if not batches[-1].takes(each):
            batches.append(Batch())
        batches[-1].add(str(number), each)
    sent: list[Event] = []
    for one in batches:
        for stream, request in one.streams.items():
            times = [each.at for each in request]
            assert {each.stream for each in request} == {stream}
            assert times == sorted(times) and times[-1] - times[0] < 24 * 3600 * 1000
            assert sum(len(each.text.encode()) + 26 for each in request) <= 1_048_576 and len(request) <= 10_000
            sent += request
    assert sorted(sent) == sorted(events)
    assert not events or batches[-1].cursor == str(len(events) - 1)


def test_number_of_events_of_a_stream_is_limited() -> None:
    full = Batch()
    for number in range(10_000):
        full.add(str(number), Event("nginx", NOW, "x"))
    assert not full.takes(Event("nginx", NOW, "x")) and full.takes(Event("mlflow", NOW, "x"))


def test_line_of_another_unit_only_moves_the_cursor() -> None:
    one = Batch()
    one.add("s=1", None)
    assert (one.cursor, one.streams) == ("s=1", {})


# Read the journal: `tail` stands in for journalctl, and line N has the cursor s=N

FOLLOW = ("sh", "-c", 'exec tail -n +$((${1##*=} + 1)) -f "$0"')
LONG = 60
"""Seconds after which a test fails."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "journal"
    path.touch()
    return path


def follow(file: Path, cursor: str = "") -> Journal:
    return Journal(cursor, [*FOLLOW, str(file)])


def test_lines_come_complete_also_those_in_several_parts(file: Path) -> None:
    opened = follow(file)
    long = line(1, message="x" * 300_000)
    with file.open("wb", buffering=0) as out:
        out.write(long + line(2)[:10])
        assert opened.read(LONG) == [long.rstrip(b"\n")]
        assert opened.read(0.1) == []
        out.write(line(2)[10:])
        assert opened.read(LONG) == [line(2).rstrip(b"\n")]
    opened.close()


def test_line_that_would_fill_the_memory_is_left_out(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "LINE_BYTES", 100_000)
    file.write_bytes(line(1) + line(2, message="x" * 1_000_000) + line(3))
    found: list[bytes] = []
    opened = follow(file)
    while len(found) < 2 and (lines := opened.read(LONG)):
        found += lines
    opened.close()
    assert found == [line(1).rstrip(b"\n"), line(3).rstrip(b"\n")]


def test_end_of_journalctl_is_an_error_that_restarts_the_service() -> None:
    with pytest.raises(journal.JournalEnded, match="status 3"):
        Journal("", ["sh", "-c", "exit 3"]).read(LONG)


def test_cursor_is_passed_to_journalctl(file: Path) -> None:
    file.write_bytes(line(1) + line(2))
    opened = follow(file, "s=1")
    assert opened.read(LONG) == [line(2).rstrip(b"\n")]
    opened.close()


def test_options_are_those_of_this_systemd() -> None:
    """If the installed systemd did not support an option, journalctl would exit immediately."""
    command = [*journal.FOLLOW, "--directory=/nonexistent", "--since=yesterday"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return
    assert "unrecognized" not in done.stderr and "Failed to parse" not in done.stderr, done.stderr


# The whole way


class Cloud:
    """A stand-in for CloudWatch Logs. `put` fails `failures` times, and then accepts events."""

    def __init__(self, failures: int = 0):
        self.failures = failures
        self.accepted: list[tuple[str, str]] = []

    def put(self, stream: str, events: Sequence[Event]) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError("unreachable")
        self.accepted += [(stream, json.loads(each.text)["message"]) for each in events]


def shipped(file: Path, put: run.Put, saved: list[str], stopping: threading.Event) -> None:
    opened = follow(file, saved[-1] if saved else "")
    select.select([opened._output], [], [], LONG)
    try:
        run.ship(opened, put, saved.append, stopping)
    finally:
        opened.close()


@pytest.fixture
def stopped() -> threading.Event:
    found = threading.Event()
    found.set()
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "READ_SECONDS", 0.5)


def test_all_lines_are_sent_before_a_stop_and_the_cursor_is_that_of_the_last(
    file: Path, stopped: threading.Event
) -> None:
    file.write_bytes(b"".join([line(1, "nginx.service"), line(2), line(3, "ssh.service")]))
    cloud, saved = Cloud(), list[str]()
    shipped(file, cloud.put, saved, stopped)
    assert cloud.accepted == [("nginx", "line 1"), ("mlflow", "line 2")]
    assert saved == ["s=3"]
    file.write_bytes(file.read_bytes() + line(4))
    shipped(file, cloud.put, saved, stopped)
    assert cloud.accepted[2:] == [("mlflow", "line 4")], "a restart goes on after the cursor"


def test_lines_are_sent_in_batches_while_the_service_runs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "BATCH_SECONDS", 0.2)
    cloud, saved, stopping = Cloud(), list[str](), threading.Event()
    file.write_bytes(line(1))
    thread = threading.Thread(target=shipped, args=(file, cloud.put, saved, stopping))
    thread.start()
    deadline = time.monotonic() + LONG
    while not saved and time.monotonic() < deadline:
        time.sleep(0.02)
    stopping.set()
    thread.join()
    assert (cloud.accepted, saved) == ([("mlflow", "line 1")], ["s=1"])


@pytest.mark.long
def test_refused_lines_are_sent_again_and_in_order(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch, "EVENTS", 2)
    cloud, saved, stopping = Cloud(failures=2), list[str](), threading.Event()
    pauses: list[float] = []

    def wait(seconds: float | None = None) -> bool:
        pauses.append(seconds or 0)
        return False

    monkeypatch.setattr(stopping, "wait", wait)
    file.write_bytes(b"".join(line(number) for number in range(1, 6)))
    thread = threading.Timer(2.5, stopping.set)
    thread.start()
    shipped(file, cloud.put, saved, stopping)
    assert [message for _, message in cloud.accepted] == [f"line {number}" for number in range(1, 6)]
    assert pauses == [1, 2] and saved == ["s=2", "s=4", "s=5"]
    assert capsys.readouterr().err.count("2 lines of mlflow are not in CloudWatch Logs yet: unreachable; the role") == 2


def test_cursor_stays_before_lines_that_were_not_accepted(file: Path, stopped: threading.Event) -> None:
    file.write_bytes(line(1))
    cloud, saved = Cloud(failures=1), list[str]()
    shipped(file, cloud.put, saved, stopped)
    assert (cloud.accepted, saved) == ([], [])
    shipped(file, cloud.put, saved, stopped)
    assert (cloud.accepted, saved) == ([("mlflow", "line 1")], ["s=1"])


def test_streams_that_were_accepted_are_not_sent_twice_after_an_error(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud, stopping = Cloud(), threading.Event()
    monkeypatch.setattr(stopping, "wait", lambda seconds: False)
    tried: list[str] = []

    def put(stream: str, events: Sequence[Event]) -> None:
        tried.append(stream)
        if tried == ["nginx", "mlflow"]:
            raise OSError("unreachable")
        cloud.put(stream, events)

    one = Batch()
    for number, stream in enumerate(("nginx", "mlflow")):
        one.add(str(number), Event(stream, NOW, json.dumps({"message": stream})))
    assert run.deliver(one, put, lambda cursor: None, stopping)
    assert tried == ["nginx", "mlflow", "mlflow"] and len(cloud.accepted) == 2


@pytest.fixture
def logs() -> Iterator[Any]:
    """Yield boto3's client for CloudWatch Logs in moto, with one log group."""
    connect: Any = boto3.client
    with moto_server() as endpoint:
        made = connect(
            "logs",
            endpoint_url=endpoint,
            region_name="eu-central-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        made.create_log_group(logGroupName=GROUP)
        yield made
        made.delete_log_group(logGroupName=GROUP)


def messages(logs: Any, stream: str) -> list[str]:
    found = logs.get_log_events(logGroupName=GROUP, logStreamName=stream, startFromHead=True)["events"]
    return [each["message"] for each in found]


def test_stream_of_a_new_machine_is_created_and_then_used(logs: Any) -> None:
    put = run.to_cloudwatch(lambda: logs, GROUP, "i-0123456789abcdef0")
    put("nginx", [Event("nginx", NOW, "first")])
    put("nginx", [Event("nginx", NOW + 1, "second")])
    assert messages(logs, "i-0123456789abcdef0/nginx") == ["first", "second"]


def test_missing_log_group_is_an_error_that_keeps_the_lines(logs: Any) -> None:
    put = run.to_cloudwatch(lambda: logs, "/deleted", "i-0")
    with pytest.raises(logs.exceptions.ResourceNotFoundException):
        put("nginx", [Event("nginx", NOW, "first")])


def test_client_without_credentials_is_replaced_and_one_that_works_is_kept(logs: Any) -> None:
    session: Any = boto3.Session()
    nameless = session.client("logs", region_name="eu-central-1")
    nameless.meta.events.register("before-sign", no_credentials)
    made = [logs, nameless]
    put = run.to_cloudwatch(made.pop, GROUP, "i-3")
    with pytest.raises(NoCredentialsError):
        put("host", [Event("host", NOW, "first")])
    for text in ("first", "second"):
        put("host", [Event("host", NOW, text)])
    assert messages(logs, "i-3/host") == ["first", "second"] and made == []


def no_credentials(**_: Any) -> None:
    raise NoCredentialsError


def test_old_lines_that_cloudwatch_rejects_are_reported_and_do_not_stop_the_others(
    logs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    put = run.to_cloudwatch(lambda: logs, GROUP, "i-1")
    put("host", [Event("host", NOW - 15 * 86_400_000, "old"), Event("host", NOW, "new")])
    assert messages(logs, "i-1/host") == ["new"]
    assert "refuses some or all of 2 lines of host: {'tooOldLogEventEndIndex'" in capsys.readouterr().err


def test_request_that_cloudwatch_never_accepts_is_reported_and_left_out(
    logs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    put = run.to_cloudwatch(lambda: logs, GROUP, "i-2")
    put("host", [Event("host", NOW, "first")])
    put("host", [Event("host", NOW, "b"), Event("host", NOW - 1, "a")])
    assert messages(logs, "i-2/host") == ["first"]
    assert "refuses some or all of 2 lines of host: An error occurred (Inv" in capsys.readouterr().err


DOCUMENT = launch.LaunchDocument(
    launch.Stack("dev", "eu-central-1"),
    launch.Buckets("a-bucket", "m-bucket", "b-bucket"),
    launch.CredentialsParameter("/mlflow-ami/dev/credentials"),
    launch.DataVolume("vol-0123456789abcdef0"),
    launch.Web(("52.1.2.3",)),
)


def test_stack_without_a_log_group_sends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "Journal", lambda cursor: pytest.fail("the journal is read"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(config, "launch_document", lambda: DOCUMENT)
    assert run.main() == 0
    assert "the stack has no log group" in capsys.readouterr().out


def test_machine_without_a_launch_document_sends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> launch.LaunchDocument:
        raise StepFailed("the launch document is missing")

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(config, "launch_document", fail)
    assert run.main() == 0
    assert "no line is sent to CloudWatch Logs: the launch document is missing" in capsys.readouterr().out
