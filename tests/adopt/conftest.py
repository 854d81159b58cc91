"""Fixtures: an empty server without a machine, and scripts/adopt.py with this server as its target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.adopting import target
from tests.adopt.mariadb import MariaDB, private_mariadb
from tests.adopt.stack import Stack, cluster_of_a_machine, empty_stack
from tests.schema.private_cluster import PrivateCluster
from tests.support.services import ObjectStore, object_store


@pytest.fixture(scope="session")
def machine_cluster(request: pytest.FixtureRequest) -> Iterator[PrivateCluster]:
    with cluster_of_a_machine(getattr(request, "param", "machine")) as owned:
        yield owned


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("objects")) as store, pytest.MonkeyPatch.context() as patch:
        for name, text in store.environment.items():
            patch.setenv(name, text)
        yield store


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDB]:
    with private_mariadb() as owned:
        yield owned


@pytest.fixture
def stack(machine_cluster: PrivateCluster, objects: ObjectStore, tmp_path: Path) -> Iterator[Stack]:
    with empty_stack(machine_cluster, objects, tmp_path / "stack") as made:
        yield made


Adopt = Callable[..., int]
INTERRUPTED = 130


@pytest.fixture
def adopt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Adopt:
    """Run scripts/adopt.py with the stack as its target. Returns the exit status.

    If a signal interrupts adopt.py, the test session ends. Without this rule, SIGTERM to pytest would only make the
    current test fail."""
    from scripts import adopt as script

    monkeypatch.setattr(target, "choose", lambda arguments: stack.target)

    def run(*arguments: object) -> int:
        status = script.main(list(map(str, arguments)))
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        return status

    return run
