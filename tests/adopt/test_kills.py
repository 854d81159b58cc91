"""If the adoption unit or adopt.py is killed at any moment, the server has either none or all of the adopted rows. A
second run of adopt.py finishes the adoption."""

from __future__ import annotations

import dataclasses
import multiprocessing
import random
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from mlflow_host.postgres.cluster import connection, rows
from scripts import adopt as script
from scripts.adopting import target
from tests.adopt.conftest import Adopt
from tests.adopt.stack import Stack
from tests.adopt.test_adopt import Filled, fill

pytestmark = pytest.mark.service
COUNTED = ("experiments", "runs", "params", "tags", "metrics", "latest_metrics", "model_versions", "spans", "inputs")
ROWS = f"SELECT {', '.join(f'(SELECT count(*) FROM {table})' for table in COUNTED)}"
MOMENTS = (
    ("unit", "creating an empty database"), ("unit", "loading the source's rows"), ("unit", "fitting the rows"),
    ("unit", "migrating them"), ("unit", "finding the artifacts"), ("unit", "dumping the database"),
    ("unit", "merging the rows"), ("unit", "merging the rows"), ("unit", "merging the rows"),
    ("adopt.py", "sending"), ("adopt.py", "listing the artifacts"), ("adopt.py", "the machine: merging the rows"),
    ("adopt.py", "reading everything back"),
)  # fmt: skip
"""For each test: the process to kill, and the last message before the kill."""
SOON_OVER = {"finding the artifacts": 0.2, "merging the rows": 0.6}
"""Message → number of seconds after this message in which the adoption unit certainly still runs. The test kills the
unit or adopt.py during these seconds."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """A source with 60,000 additional metric rows, so that loading takes some time."""
    folder = tmp_path_factory.mktemp("large")
    made = fill(Path(sys.executable), f"sqlite:///{folder}/mlflow.db", f"file://{folder}/artifacts")
    opened = sqlite3.connect(folder / "mlflow.db")
    opened.executemany(
        "INSERT INTO metrics (key, value, timestamp, step, is_nan, run_uuid) VALUES ('many', ?, ?, ?, 0, ?)",
        ((step / 7, 1_600_000_000_000 + step, step, made["run"]) for step in range(60_000)),
    )
    opened.execute(
        "INSERT INTO latest_metrics (key, value, timestamp, step, is_nan, run_uuid) "
        "SELECT key, value, timestamp, step, is_nan, run_uuid FROM metrics WHERE key = 'many' AND step = 59999"
    )
    opened.commit()
    opened.close()
    return Filled(str(folder / "mlflow.db"), made["run"], folder)


Counts = tuple[int, ...]


def counts(stack: Stack) -> Counts:
    with connection(stack.cluster, stack.cluster.database) as opened:
        return tuple(rows(opened, ROWS)[0])


def kill_when(
    moment: str, after: float, said: Callable[[], str], kill: Callable[[], None], over: Callable[[], bool]
) -> None:
    """Wait for the message `moment`, wait another `after` seconds, and then call `kill`."""
    while not over():
        time.sleep(0.02)
        if moment in said():
            time.sleep(after)
            kill()
            return


def adopt_with_the_unit_killed(stack: Stack, adopt: Adopt, source: str, moment: str, after: float) -> int | None:
    """Run adopt.py and kill the adoption unit. Returns the unit's exit status, or None if the unit was not killed."""
    status: list[int] = []

    def kill() -> None:
        stack.running[-1].kill()
        status.append(stack.running[-1].wait())
        if status == [-signal.SIGKILL]:
            target.SILENT_SECONDS = 0  # adopt.py need not wait

    over = threading.Event()
    stack.log.touch()
    killer = threading.Thread(
        target=kill_when, args=(moment, after, stack.log.read_text, kill, over.is_set), daemon=True
    )
    killer.start()
    try:
        adopt(source)
    finally:
        over.set()
        killer.join()
    return status[0] if status else None


def adopt_with_the_script_killed(stack: Stack, source: str, moment: str, after: float, log: Path) -> int | None:
    """Run adopt.py and kill it. The adoption unit continues, like on a machine. Returns adopt.py's exit status."""

    def child() -> None:
        """Run adopt.py with new connections, so that the kill does not break the connections of the parent process."""
        stack.target = dataclasses.replace(
            stack.target, s3=stack.store.client(), api=target.Api(stack.target.api.url, {})
        )
        sys.stderr = log.open("w", buffering=1)
        script.main([source])

    log.touch()
    running = multiprocessing.get_context("fork").Process(target=child)
    running.start()
    kill_when(moment, after, log.read_text, running.kill, lambda: not running.is_alive())
    running.join()
    return running.exitcode


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_adoption_leaves_the_server_whole_and_a_second_run_finishes(
    stack: Stack, adopt: Adopt, large: Filled, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    api = stack.target.api
    api.post("/api/2.0/mlflow/experiments/create", name="ours")
    own = api.post("/api/2.0/mlflow/runs/create", experiment_id="1", start_time=5)["run"]["info"]["run_id"]
    ours = (
        "SELECT (SELECT e::text FROM experiments e WHERE experiment_id = 1) || r::text FROM runs r "
        f"WHERE run_uuid = '{own}'"
    )
    before, untouched = counts(stack), stack.sql(ours)
    with closing(sqlite3.connect(large.source)) as opened:
        there = opened.execute(ROWS).fetchone()
    added = {"experiments": -1}  # the source's experiment Default is merged into the server's
    whole = tuple(b + t + added.get(table, 0) for table, b, t in zip(COUNTED, before, there, strict=True))
    victim, moment = MOMENTS[seed % len(MOMENTS)]
    after = random.Random(seed).uniform(0, SOON_OVER.get(moment, 1.2))
    monkeypatch.setattr(target, "SILENT_SECONDS", 120)
    if victim == "unit":
        status = adopt_with_the_unit_killed(stack, adopt, large.source, moment, after)
    else:
        status = adopt_with_the_script_killed(stack, large.source, moment, after, tmp_path / "adopt.log")
    assert status == -signal.SIGKILL, (victim, moment, after)
    assert counts(stack) in (before, whole), (victim, moment, after)
    assert stack.sql(ours) == untouched
    target.SILENT_SECONDS = 300
    assert adopt(large.source) == 0
    assert counts(stack) == whole
    assert stack.sql(ours) == untouched
