"""A stack without a machine: PostgreSQL, the object store, the server's processes, and the unit as a process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mlflow_host.postgres import dump_file
from mlflow_host.postgres.cluster import Cluster, connection, copy_database, create_empty, databases, drop, run, value
from mlflow_host.schema.release import release
from scripts.adopting import target
from scripts.adopting.target import Api, Target
from tests.adopt.mariadb import MariaDB, private_mariadb
from tests.adopt.run_unit import this_image
from tests.schema.private_cluster import PrivateCluster, alive, private_cluster
from tests.support.services import HOST_PACKAGE, ObjectStore, object_store, on_loopback, server_processes

ROOT = Path(__file__).parents[2]
EMPTY = "empty_server"
PASSPHRASE = "a passphrase for tests only"
BLANK = Path(tempfile.gettempdir()) / f"mlflow-ami-blank-{os.getpid()}.dump"
"""The dump that the bake writes to schema.empty_database.FILE."""


@dataclass
class Stack:
    """An empty server, and the `Target` with which adopt.py uses it. `running`: the unit's processes."""

    cluster: Cluster
    target: Target
    folder: Path
    store: ObjectStore
    log: Path
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def sql(self, query: str, database: str | None = None) -> Any:
        with connection(self.cluster, database or self.cluster.database) as opened:
            return value(opened, query)

    def execute(self, statement: str) -> int:
        with connection(self.cluster, self.cluster.database) as opened:
            return run(opened, statement)

    def keys(self, kind: str) -> set[str]:
        pages = self.store.client().get_paginator("list_objects_v2").paginate(Bucket=self.target.buckets[kind])
        return {found["Key"] for page in pages for found in page.get("Contents", ())}


@pytest.fixture(scope="session")
def machine_cluster() -> Iterator[PrivateCluster]:
    with private_cluster() as owned:
        create_empty(owned.cluster, EMPTY)
        image = this_image()
        with release(owned.cluster, image) as mlflow:
            mlflow.create(EMPTY, image.head)
            mlflow.query_stores(EMPTY)
        with BLANK.open("wb") as file:
            subprocess.run(dump_file.dump_command(owned.cluster, EMPTY), stdout=file, check=True)
        yield owned
        BLANK.unlink()


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
    cluster = machine_cluster.cluster
    for name in databases(cluster):
        if name.startswith(("mlflow", "mlflow_host_work")):
            drop(cluster, name)
    copy_database(cluster, EMPTY, cluster.database)
    mark = uuid.uuid4().hex[:10]
    buckets = {kind: f"{kind}-{mark}" for kind in ("artifacts", "models", "backups")}
    for bucket in buckets.values():
        objects.client().create_bucket(Bucket=bucket)
    folder = tmp_path / "stack"
    (folder / "tmp").mkdir(parents=True)
    variables = {
        "MLFLOW_BACKEND_STORE_URI": cluster.uri(cluster.database),
        "MLFLOW_ARTIFACTS_DESTINATION": f"mlflow-host-proxied://{buckets['artifacts']}/{buckets['models']}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ALLOWED_HOSTS": "localhost,127.0.0.1:*",
        "MLFLOW_CRYPTO_KEK_PASSPHRASE": PASSPHRASE,
        "TMPDIR": str(folder / "tmp"),
        **objects.environment,
    }
    with server_processes(folder, variables) as (process,), on_loopback(process.socket) as url:
        log, running = folder / "unit.log", folder / "unit.pid"
        made = Stack(cluster, None, folder, objects, log)  # type: ignore[arg-type]

        def start(name: str) -> None:
            for each in made.running:
                each.poll()
            if running.exists() and alive(int(running.read_text())):
                return  # systemd ignores a start of a unit that is running
            where = [
                cluster.host,
                cluster.user,
                buckets["backups"],
                objects.endpoint,
                str(folder / "reports"),
                str(BLANK),
            ]
            path = ":".join(map(str, (ROOT, HOST_PACKAGE)))
            with log.open("ab") as output:
                made.running.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.adopt.run_unit", name, *where],
                        env={**os.environ, "PYTHONPATH": path},
                        cwd=ROOT,
                        stdout=output,
                        stderr=output,
                    )
                )
            running.write_text(str(made.running[-1].pid))

        made.target = Target(objects.client(), buckets, start, Api(url, {}), lambda: PASSPHRASE)
        yield made
        for each in made.running:
            with contextlib.suppress(ProcessLookupError):
                each.kill()
            each.wait()
        if running.exists():  # of an adopt.py that was killed
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(running.read_text()), signal.SIGKILL)


Adopt = Callable[..., int]


@pytest.fixture
def adopt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Adopt:
    """Run scripts/adopt.py with the stack as its target. Returns the exit status."""
    from scripts import adopt as script

    monkeypatch.setattr(target, "choose", lambda arguments: stack.target)
    return lambda *arguments: script.main(list(map(str, arguments)))
