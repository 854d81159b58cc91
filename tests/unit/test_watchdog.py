"""The service `mlflow-host-watchdog` kills PostgreSQL or nginx only if the process hangs."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_host.upkeep import watchdog
from tests.support import services

SECONDS = 0.3


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[tuple[Path, socket.socket]]:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "socket"))
        opened.listen(1)
        yield tmp_path / "socket", opened


def test_program_that_accepts_and_sends_nothing_hangs(listening: tuple[Path, socket.socket]) -> None:
    path, _ = listening
    assert watchdog.hangs(path, b"x", SECONDS)


def test_program_that_no_longer_accepts_hangs(listening: tuple[Path, socket.socket]) -> None:
    path, _ = listening
    waiting = []
    with pytest.raises(BlockingIOError):
        for _ in range(10):
            waiting.append(socket.socket(socket.AF_UNIX))
            waiting[-1].setblocking(False)
            waiting[-1].connect(str(path))
    assert watchdog.hangs(path, b"x", SECONDS)
    for each in waiting:
        each.close()


def test_program_that_does_not_run_does_not_hang(listening: tuple[Path, socket.socket], tmp_path: Path) -> None:
    path, opened = listening
    assert not watchdog.hangs(tmp_path / "missing", b"x", SECONDS)
    opened.close()
    assert not watchdog.hangs(path, b"x", SECONDS)


@pytest.mark.service
def test_stopped_postgresql_hangs_and_a_running_one_answers(tmp_path: Path) -> None:
    with services.postgresql(tmp_path / "postgresql", {}) as cluster:
        path = cluster.sockets / f".s.PGSQL.{cluster.port}"
        log = tmp_path / "postgresql.log"
        before = log.read_text()
        assert not watchdog.hangs(path, watchdog.SSL_REQUEST)
        assert log.read_text() == before
        ((file,),) = cluster.execute("select current_setting('data_directory') || '/postmaster.pid'")
        postmaster = int(Path(file).read_text().split()[0])
        os.kill(postmaster, signal.SIGSTOP)
        try:
            assert watchdog.hangs(path, watchdog.SSL_REQUEST, SECONDS)
        finally:
            os.kill(postmaster, signal.SIGCONT)
        assert not watchdog.hangs(path, watchdog.SSL_REQUEST)


@pytest.fixture
def systemctl(tmp_path: Path) -> Path:
    """Create a stand-in for systemctl that writes its arguments to `calls`. A unit is inactive if a file `stopping`
    exists."""
    script = tmp_path / "systemctl"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ntest "$1" != is-active || test ! -e {tmp_path}/stopping\n'
    )
    script.chmod(0o755)
    return script


def kills(systemctl: Path) -> list[str]:
    calls = systemctl.with_name("calls")
    return [line for line in calls.read_text().splitlines() if line.startswith("kill")] if calls.exists() else []


class Time:
    """A simulated clock. A check of a hung program takes ANSWER_SECONDS, and each pause takes PAUSE_SECONDS."""

    def __init__(self, *answers: bool) -> None:
        self.answers, self.now = iter(answers), 100.0

    def hangs(self) -> bool:
        found = next(self.answers)
        self.now += watchdog.ANSWER_SECONDS * found
        return found

    def pass_checks(self, watch: watchdog.Watch, count: int) -> None:
        for _ in range(count):
            watch.check()
            self.now += watchdog.PAUSE_SECONDS


def watched(systemctl: Path, time: Time, unit: str = "nginx.service") -> watchdog.Watch:
    return watchdog.Watch(unit, time.hangs, str(systemctl), lambda: time.now)


def test_unit_is_killed_once_when_it_has_hung_for_15_seconds(systemctl: Path) -> None:
    time = Time(*[True] * 6)
    watch = watched(systemctl, time)
    time.pass_checks(watch, 2)
    assert not kills(systemctl)
    time.pass_checks(watch, 1)  # this check ends 16 seconds after the first check began
    assert kills(systemctl) == ["kill --signal=SIGKILL nginx.service"]
    time.pass_checks(watch, 2)
    assert len(kills(systemctl)) == 1
    time.pass_checks(watch, 1)
    assert len(kills(systemctl)) == 2


def test_answer_in_between_begins_the_count_again(systemctl: Path) -> None:
    time = Time(True, True, False, True, True)
    time.pass_checks(watched(systemctl, time), 5)
    assert not kills(systemctl)


def test_pause_of_the_machine_is_no_hang(systemctl: Path) -> None:
    time = Time(True, True, False)
    watch = watched(systemctl, time)
    time.pass_checks(watch, 1)
    time.now += 900
    time.pass_checks(watch, 2)
    assert not kills(systemctl)


def test_unit_that_starts_or_stops_is_not_killed(systemctl: Path, tmp_path: Path) -> None:
    (tmp_path / "stopping").touch()
    time = Time(*[True] * 5)
    time.pass_checks(watched(systemctl, time, "mlflow-host-postgresql.service"), 5)
    assert not kills(systemctl)
