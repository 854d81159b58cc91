"""A stack without a machine: PostgreSQL, the object store, the server's processes, and the adoption unit's process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow_host.postgres import dump_file
from mlflow_host.postgres.cluster import (
    Cluster,
    connection,
    copy_database,
    create_empty,
    databases,
    drop,
    password_file,
    run,
    value,
)
from mlflow_host.schema.release import release
from scripts.adopting.target import Api, Target
from tests.adopt.run_unit import this_image
from tests.schema.private_cluster import PrivateCluster, alive
from tests.schema.rds_like import cluster_at, to_argument, uri
from tests.support.services import HOST_PACKAGE, ObjectStore, on_loopback, server_processes

ROOT = Path(__file__).parents[2]
EMPTY = "empty_server"
PASSPHRASE = "a passphrase for tests only"
BLANK = Path(tempfile.gettempdir()) / f"mlflow-ami-blank-{os.getpid()}.dump"
"""The dump of an empty database. In an image, schema.empty_database.FILE is such a dump, which the bake writes."""


@dataclass
class Stack:
    """An empty server, and the `Target` through which adopt.py accesses the server. `running`: the processes of the
    adoption unit."""

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


@contextmanager
def cluster_of_a_machine(place: str = "machine") -> Iterator[PrivateCluster]:
    """Start a cluster with the database EMPTY, and write a dump of EMPTY to BLANK."""
    with cluster_at(place) as owned:
        create_empty(owned.cluster, EMPTY)
        image = this_image()
        with release(owned.cluster, image) as mlflow:
            mlflow.create(EMPTY, image.head)
            mlflow.query_stores(EMPTY)
        try:
            with BLANK.open("wb") as file, password_file(owned.cluster) as login:
                command = dump_file.dump_command(owned.cluster, EMPTY, login.path)
                subprocess.run(command, stdout=file, check=True, pass_fds=login.descriptors)
            yield owned
        finally:
            BLANK.unlink()


@contextmanager
def empty_stack(owned: PrivateCluster, objects: ObjectStore, folder: Path) -> Iterator[Stack]:
    """Start an empty stack in `folder`, which must not exist. The databases of the previous stack are deleted."""
    cluster = owned.cluster
    for name in databases(cluster):
        if name.startswith(("mlflow", "mlflow_host_work")):
            drop(cluster, name)
    copy_database(cluster, EMPTY, cluster.database)
    mark = uuid.uuid4().hex[:10]
    buckets = {kind: f"{kind}-{mark}" for kind in ("artifacts", "models", "backups")}
    for bucket in buckets.values():
        objects.client().create_bucket(Bucket=bucket)
    (folder / "tmp").mkdir(parents=True)
    variables = {
        "MLFLOW_BACKEND_STORE_URI": uri(cluster),
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
                return  # systemd ignores a start request for a unit that is running
            arguments = [to_argument(cluster), buckets["backups"], objects.endpoint, folder / "reports", BLANK]
            command = [sys.executable, "-m", "tests.adopt.run_unit", name, *map(str, arguments)]
            path = ":".join(map(str, (ROOT, HOST_PACKAGE)))
            # The unit's shell writes its own process ID, so the ID is on disk even if adopt.py is killed.
            shell = ["sh", "-c", 'echo $$ >"$0.new" && mv "$0.new" "$0" && exec "$@"', str(running)]
            with log.open("ab") as output:
                made.running.append(
                    subprocess.Popen(
                        [*shell, *command],
                        env={**os.environ, "PYTHONPATH": path},
                        cwd=ROOT,
                        stdout=output,
                        stderr=output,
                    )
                )
            started = made.running[-1]
            while started.poll() is None and not (running.exists() and int(running.read_text()) == started.pid):
                time.sleep(0.01)

        made.target = Target(objects.client(), buckets, start, Api(url, {}), lambda: PASSPHRASE)
        yield made
        for each in made.running:
            with contextlib.suppress(ProcessLookupError):
                each.kill()
            each.wait()
        if running.exists():  # the adoption unit continues if adopt.py was killed
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(running.read_text()), signal.SIGKILL)
