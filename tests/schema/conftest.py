from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.schema.journey import Journey, journey
from tests.schema.private_cluster import PrivateCluster
from tests.schema.rds_like import cluster_at


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[PrivateCluster]:
    """Yield a cluster like the machine's own, or like the place in the fixture's parameter."""
    with cluster_at(getattr(request, "param", "machine")) as owned:
        yield owned


@pytest.fixture
def on_the_way(server: PrivateCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journey]:
    """Yield a journey. MLFLOW_EXPERIMENT_ID names an experiment of another server, as after a use of MLflow's
    client."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "999999")
    with journey(server.cluster, tmp_path) as started:
        yield started
