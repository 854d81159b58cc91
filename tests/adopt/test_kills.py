"""If the unit is killed at any moment, the server is unchanged or complete, and a second run finishes."""

from __future__ import annotations

import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from scripts import adopt as script
from scripts.adopting import target
from tests.adopt.conftest import Adopt, Stack
from tests.adopt.test_adopt import Filled, fill

pytestmark = pytest.mark.service
ROWS = "SELECT (SELECT count(*) FROM runs), (SELECT count(*) FROM metrics), (SELECT count(*) FROM model_versions)"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """A source with so many rows that loading takes some time."""
    import sqlite3

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


def counts(stack: Stack) -> tuple[int, int, int]:
    from mlflow_host.postgres.cluster import connection, rows

    with connection(stack.cluster, stack.cluster.database) as opened:
        return tuple(rows(opened, ROWS)[0])


def kills(seed: int) -> list[tuple[str, float]]:
    """(the unit's last message before a kill, seconds from that message to the kill) by kill."""
    chance = random.Random(seed)
    moments = [
        "creating an empty database", "loading the source's rows", "fitting the rows", "finding the artifacts",
        "dumping the database", "merging the rows", "merging the rows", "merging the rows", "merging the rows",
    ]  # fmt: skip
    return [(moment, chance.uniform(0, 1.2)) for moment in moments]


def adopt_with_a_kill(stack: Stack, adopt: Adopt, source: Filled, moment: str, after: float) -> int:
    """Kill the unit `after` seconds after its message `moment`; returns adopt.py's exit status."""

    def kill_then() -> None:
        seen = 0
        while not over.wait(0.02):
            text = stack.log.read_text() if stack.log.exists() else ""
            if moment in text[begun:]:
                seen = 1
                break
        if seen:
            time.sleep(after)
            stack.running[-1].kill()

    begun = len(stack.log.read_text()) if stack.log.exists() else 0
    over = threading.Event()
    killer = threading.Thread(target=kill_then, daemon=True)
    killer.start()
    try:
        return adopt(source.source)
    finally:
        over.set()
        killer.join()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_unit_leaves_the_server_whole_and_a_second_run_finishes(
    stack: Stack, adopt: Adopt, large: Filled, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(target, "SILENT_SECONDS", 25)
    before = counts(stack)
    whole: Any = None
    survived = []
    for moment, after in kills(seed) if seed > 1 else kills(seed)[1:6:2]:
        status = adopt_with_a_kill(stack, adopt, large, moment, after)
        now = counts(stack)
        survived.append((moment, round(after, 2), status, now))
        if status == 0:
            whole = whole or now
        assert now in (before, whole) or (whole is None and now[1] >= 60_000), survived
        whole = now if now != before else whole
    print(survived)
    monkeypatch.setattr(target, "SILENT_SECONDS", 300)
    assert script.main([large.source]) == 0
    assert counts(stack)[1] == 60_000 + 128
