"""Send SIGKILL to the database step or to PostgreSQL at random moments of an upgrade, a carry back and a merge.

After the kill, the database in service is the complete old database or the complete new database. The next run of the
database step gives the same result as a run without a kill.

MLFLOW_AMI_KILLS sets the number of kills (default 50). `make test` runs only the tests that are not marked slow.
MLFLOW_AMI_SEED sets the random seed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path

import pytest

from mlflow_host.boot import database
from mlflow_host.postgres import ownership
from mlflow_host.postgres.catalog import BOOKKEEPING, head, read_catalog
from mlflow_host.postgres.cluster import (
    WORK_PREFIX,
    Cluster,
    connection,
    copy_database,
    databases,
    drop,
    rows,
    run,
    value,
)
from mlflow_host.schema.column_fit import quoted
from scripts.drilling.worker_client import without_mlflow
from tests.schema import run_step
from tests.schema.environments import image, releases
from tests.schema.journey import Journey, journey
from tests.schema.private_cluster import PrivateCluster, private_cluster
from tests.schema.rds_like import to_argument

OLDER, NEWER = releases()[-3], releases()[-2]
"""MLflow 3.16 and 3.17 in November 2026. The migrations between these releases move the most data."""

SEED = int(os.environ.get("MLFLOW_AMI_SEED") or random.randrange(1 << 32))
KILLS = int(os.environ.get("MLFLOW_AMI_KILLS") or 50)
OPERATIONS = {"upgrade": NEWER, "carry back": OLDER, "merge": NEWER}
FEW = len(OPERATIONS)
"""The number of kills in `make test`: one per operation. The step and PostgreSQL are killed alternately."""
ROOT = Path(__file__).parents[2]

Sums = dict[str, tuple[int, int]]


@dataclass
class Prepared:
    """A cluster with copies of the databases from which each operation starts, and the result of each operation without
    a kill."""

    server: PrivateCluster
    folder: Path
    aside: dict[str, dict[str, str]]
    """Operation → name of a database before the step → name of the copy of that database."""
    outcome: dict[str, Sums]
    lines: dict[str, list[float]]
    """Operation → seconds between the lines that a step without a kill prints."""

    @property
    def cluster(self) -> Cluster:
        return self.server.cluster

    def reset(self, operation: str) -> None:
        live = self.cluster.database
        for name in databases(self.cluster):
            if name.startswith((WORK_PREFIX, f"{live}_kept_")) or name == live:
                drop(self.cluster, name)
        for name, aside in self.aside[operation].items():
            copy_database(self.cluster, aside, name)
            with connection(self.cluster) as opened:
                found = ownership.read(opened, aside)
                assert found
                ownership.write(opened, name, found)

    def start(self, operation: str, *options: str) -> subprocess.Popen[str]:
        path = ":".join(str(ROOT / folder) for folder in (".", "provisioning/rootfs/usr/lib/mlflow-host"))
        where = (to_argument(self.cluster), str(self.folder / "reports"), OPERATIONS[operation])
        return subprocess.Popen(
            [sys.executable, str(run_step.__file__), *where, *options],
            env={**without_mlflow(os.environ), "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    with private_cluster() as server, prepare(server, tmp_path_factory.mktemp("kills")) as ready:
        yield ready


@contextmanager
def prepare(server: PrivateCluster, folder: Path) -> Iterator[Prepared]:
    with journey(server.cluster, folder) as way:
        ready = Prepared(server, folder, {}, {}, {})
        way.stop(image(OLDER))
        for operation, version in OPERATIONS.items():
            ready.aside[operation] = _put_aside(way, operation)
            ready.lines[operation], ready.outcome[operation] = _undisturbed(way, version)
            if operation != "merge":
                way.write(image(version))
        yield ready


def _put_aside(way: Journey, operation: str) -> dict[str, str]:
    """Copy the database in service and the databases with pending merges, each with its ownership record."""
    cluster = way.cluster
    with connection(cluster) as opened:
        found = ownership.read(opened, cluster.database)
    assert found
    aside = {}
    for number, name in enumerate((cluster.database, *(entry.database for entry in found.waiting))):
        copy = f"aside_{operation.replace(' ', '_')}_{number}"
        copy_database(cluster, name, copy)
        with connection(cluster) as opened:
            content = ownership.read(opened, name)
            assert content
            ownership.write(opened, copy, content)
        aside[name] = copy
    return aside


def _undisturbed(way: Journey, version: str) -> tuple[list[float], Sums]:
    moments: list[float] = []
    database.bring(way.settings(image(version)), lambda message: moments.append(time.monotonic()))
    pauses = [after - before for before, after in pairwise([*moments, time.monotonic() + 0.2])]
    return pauses, _sums(way.cluster, way.cluster.database)


def _sums(cluster: Cluster, database: str) -> Sums:
    """Return the row count and a checksum of every MLflow table."""
    with connection(cluster, database) as opened:
        catalog = read_catalog(opened)
        found = {}
        for table in sorted(set(catalog.tables) - {BOOKKEEPING}):
            columns = ", ".join(quoted(column.name) for column in catalog.stored(table))
            query = f"SELECT count(*), coalesce(sum(hashtextextended(ROW({columns})::text, 0)), 0) FROM {quoted(table)}"
            count, total = rows(opened, query)[0]
            found[table] = (int(count), int(total))
        return found


def _cases(first: int, last: int) -> list[tuple[int, str, str]]:
    chosen = random.Random(SEED)
    victims = cycle(["PostgreSQL", "step"])
    everything = [(operation, victim) for _, operation, victim in zip(range(2 * FEW), cycle(OPERATIONS), victims)]
    return [(chosen.randrange(1 << 32), *everything[number % len(everything)]) for number in range(last)][first:]


def _kill_and_recover(ready: Prepared, seed: int, operation: str, victim: str) -> None:
    chosen = random.Random(seed)
    ready.reset(operation)
    before = {name: _sums(ready.cluster, name) for name in ready.aside[operation]}
    pauses = ready.lines[operation]
    line = chosen.randrange(len(pauses))
    pause = chosen.uniform(0, pauses[line])
    process = ready.start(operation)
    assert process.stdout
    for _ in range(line + 1):
        process.stdout.readline()
    time.sleep(pause)
    if victim == "step":
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    else:
        ready.server.kill()  # the step must detect the kill and end
        process.communicate(timeout=120)
        ready.server.start()

    check_and_finish(
        ready, operation, before, f"seed {SEED}: {operation}, {victim} killed {pause:.2f} s after line {line}"
    )


def check_and_finish(ready: Prepared, operation: str, before: dict[str, Sums], where: str) -> None:
    """Assert that the database in service is the complete old or new database, and that the next run finishes."""
    cluster, live = ready.cluster, ready.cluster.database
    assert live in databases(cluster), where
    with connection(cluster, live) as opened:
        reached = head(opened) == image(OPERATIONS[operation]).head
    now = _sums(cluster, live)
    if reached:
        assert now == ready.outcome[operation], where
    else:
        assert now == before[live], where
    for name in set(ready.aside[operation]) - {live}:
        assert _sums(cluster, name) == before[name], where

    again = ready.start(operation)
    _, stderr = again.communicate(timeout=300)
    assert again.returncode == 0, f"{where}: {stderr}"
    assert _sums(cluster, live) == ready.outcome[operation], where
    left_over = [name for name in databases(cluster) if name.startswith(WORK_PREFIX)]
    assert left_over == [], where
    assert not list((ready.folder / "reports").glob("*.pending")), where
    with connection(cluster, live) as opened:
        settings = run(opened, "CREATE TABLE writable ()") and value(opened, "SHOW default_transaction_read_only")
        assert settings == "off", where
        opened.rollback()


@pytest.mark.parametrize(("seed", "operation", "victim"), _cases(0, FEW))
def test_kill_loses_nothing_and_the_next_run_finishes(
    prepared: Prepared, seed: int, operation: str, victim: str
) -> None:
    _kill_and_recover(prepared, seed, operation, victim)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "operation", "victim"), _cases(FEW, KILLS))
def test_many_kills_lose_nothing(prepared: Prepared, seed: int, operation: str, victim: str) -> None:
    _kill_and_recover(prepared, seed, operation, victim)
