"""Service `mlflow-host-watchdog`: PostgreSQL or nginx is killed when it hangs, and only then."""

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
    """Writes its arguments to `calls`; the unit is active unless there is a file `stopping`."""
    script = tmp_path / "systemctl"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ntest "$1" != is-active || test ! -e {tmp_path}/stopping\n'
    )
    script.chmod(0o755)
    return script


def kills(systemctl: Path) -> list[str]:
    calls = systemctl.with_name("calls")
    return [line for line in calls.read_text().splitlines() if line.startswith("kill")] if calls.exists() else []


def test_unit_is_killed_once_when_it_has_hung_for_15_seconds(systemctl: Path) -> None:
    watch = watchdog.Watch("nginx.service", lambda: True, str(systemctl))
    for now in (100.0, 106.0, 112.0):
        watch.check(now)
    assert not kills(systemctl)
    watch.check(118.0)
    assert kills(systemctl) == ["kill --signal=SIGKILL nginx.service"]
    for now in (121.0, 127.0, 133.0):
        watch.check(now)
    assert len(kills(systemctl)) == 1
    watch.check(139.0)
    assert len(kills(systemctl)) == 2


def test_answer_in_between_begins_the_count_again(systemctl: Path) -> None:
    answers = iter([True, True, False, True, True, True])
    watch = watchdog.Watch("nginx.service", lambda: next(answers), str(systemctl))
    for now in (100.0, 106.0, 112.0, 114.0, 120.0, 126.0):
        watch.check(now)
    assert not kills(systemctl)


def test_pause_of_the_machine_is_no_hang(systemctl: Path) -> None:
    answers = iter([True, True, False])
    watch = watchdog.Watch("nginx.service", lambda: next(answers), str(systemctl))
    for now in (100.0, 900.0, 902.0):
        watch.check(now)
    assert not kills(systemctl)


def test_unit_that_starts_or_stops_is_not_killed(systemctl: Path, tmp_path: Path) -> None:
    (tmp_path / "stopping").touch()
    watch = watchdog.Watch("mlflow-host-postgresql.service", lambda: True, str(systemctl))
    for now in (100.0, 106.0, 112.0, 118.0, 124.0):
        watch.check(now)
    assert not kills(systemctl)
