"""With each tested release, the fast path returns the same responses and stores the same rows as MLflow's own code."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_host.server.fast_path import compatibility
from tests.schema.environments import environment, releases
from tests.support.services import HOST_PACKAGE, PostgreSQL, create_schema, postgresql

RELEASES = [
    pytest.param(version, marks=() if version == releases()[-2] else pytest.mark.slow) for version in releases()
]

LEAST_ANSWERED = {
    "runs/create": 15,
    "runs/log-metric": 80,
    "runs/log-batch": 10,
    "runs/get": 18,
    "runs/search": 150,
    "metrics/get-history": 50,
}
"""Minimum number of requests per endpoint that the fast path must handle itself."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSQL]:
    with postgresql(tmp_path_factory.mktemp("cluster") / "postgresql") as running:
        yield running


@pytest.mark.parametrize("version", RELEASES)
def test_responses_and_tables_equal_those_of_mlflow(cluster: PostgreSQL, version: str) -> None:
    found = compared(cluster, version, seed=20261122)
    assert [pair for pair in zip(found["direct"], found["own"], strict=True) if pair[0] != pair[1]] == []
    for table, rows in found["own tables"].items():
        assert found["direct tables"][table] == rows, table
    assert len(found["own tables"]["metrics"]) > 1000 and len(found["own tables"]["runs"]) > 18
    assert found["statements"] > 450, "MLflow handled nearly every request"
    for path, least in LEAST_ANSWERED.items():
        assert found["answered"][f"{path} itself"] > least and found["answered"][f"{path} not"] > 3


def compared(cluster: PostgreSQL, version: str, seed: int) -> dict[str, Any]:
    python = str(environment(version))
    uris = []
    for name in ("own", "direct"):
        database = f"{name}_{version.replace('.', '_')}_{seed}"
        cluster.execute(f"create database {database}")
        create_schema(cluster.uri(database), python)
        uris.append(cluster.uri(database))
    ended = subprocess.run(
        [python, str(Path(__file__).with_name("compare_stores.py")), *uris, str(seed)],
        env={**os.environ, "PYTHONPATH": str(HOST_PACKAGE)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


@pytest.mark.parametrize("version", RELEASES)
def test_each_release_matches_the_compared_digests(version: str) -> None:
    """If a new release fails, read the changes in its sources, and adapt fast_path/store.py to the changed behaviour.
    When `test_responses_and_tables_equal_those_of_mlflow` passes with the release, add the digest of its sources to
    fast_path/compatibility.py."""
    code = "import mlflow, pathlib; print(pathlib.Path(mlflow.__file__).parent)"
    python = str(environment(version))
    package = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    assert compatibility.not_compared(package) == []
