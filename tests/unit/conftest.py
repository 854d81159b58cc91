"""Fixtures for several tests of one part."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.services import ObjectStore, PostgreSQL, create_schema, object_store, postgresql


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use `cluster`: `make check` leaves them out, and runs without PostgreSQL."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.service)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSQL]:
    """A cluster whose database `mlflow` has the tables of the installed MLflow."""
    with postgresql(tmp_path_factory.mktemp("cluster") / "postgresql") as running:
        running.execute("create database mlflow")
        create_schema(running.uri())
        yield running


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """An object store with the buckets `artifacts` and `models`."""
    with object_store(tmp_path_factory.mktemp("object-store")) as running:
        for bucket in ("artifacts", "models"):
            running.client().create_bucket(Bucket=bucket)
        yield running
