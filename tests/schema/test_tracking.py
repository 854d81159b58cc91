"""The store that writes its statements itself, and the answers that PostgreSQL writes, are as MLflow's own would be."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_host import tracking
from schema.environments import environment, releases
from services import HOST_PACKAGE, PostgreSQL, create_schema, postgresql

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
"""Of each path, how many requests must not have been left to MLflow."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSQL]:
    with postgresql(tmp_path_factory.mktemp("cluster") / "postgresql") as running:
        yield running


@pytest.mark.parametrize("version", RELEASES)
def test_it_is_as_if_mlflows_own_had_been_asked(cluster: PostgreSQL, version: str) -> None:
    found = compared(cluster, version, seed=20261122)
    assert [pair for pair in zip(found["direct"], found["own"], strict=True) if pair[0] != pair[1]] == []
    for table, rows in found["own tables"].items():
        assert found["direct tables"][table] == rows, table
    assert len(found["own tables"]["metrics"]) > 1000 and len(found["own tables"]["runs"]) > 18
    assert found["statements"] > 450, "it left nearly everything to MLflow's own"
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
def test_all_of_these_releases_word_what_it_repeats_as_it_was_compared(version: str) -> None:
    """When a new release fails here: read what it words otherwise, follow it in mlflow_host.direct_store where that
    says something else, see the test above pass with it, and add the hash to mlflow_host.tracking."""
    code = "import mlflow, pathlib; print(pathlib.Path(mlflow.__file__).parent)"
    python = str(environment(version))
    package = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    assert tracking.not_compared(package) == []
