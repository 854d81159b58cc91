"""Fixtures for several tests of one part."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.services import PostgreSQL, create_schema, postgresql


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSQL]:
    """A cluster whose database `mlflow` has the tables of the installed MLflow."""
    with postgresql(tmp_path_factory.mktemp("cluster") / "postgresql") as running:
        running.execute("create database mlflow")
        create_schema(running.uri())
        yield running
