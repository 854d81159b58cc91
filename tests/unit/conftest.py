"""Fixtures that several test files of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.services import ObjectStore, PostgreSQL, create_schema, object_store, postgresql


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the marker `service` to each test that uses the fixture `cluster`. `make check` omits tests with this marker,
    so `make check` needs no PostgreSQL."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.service)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSQL]:
    """Yield a PostgreSQL cluster with a database `mlflow` that contains the tables of the installed MLflow."""
    with postgresql(tmp_path_factory.mktemp("cluster") / "postgresql") as running:
        running.execute("create database mlflow")
        create_schema(running.uri())
        yield running


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """Yield an object store with the buckets `artifacts` and `models`."""
    with object_store(tmp_path_factory.mktemp("object-store")) as running:
        for bucket in ("artifacts", "models"):
            running.client().create_bucket(Bucket=bucket)
        yield running
