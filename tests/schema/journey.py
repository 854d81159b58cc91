"""Change one database to the schemas of several MLflow releases, one after the other.

At each stop the database step changes the schema, and the MLflow release of the stop reads all data of earlier stops.
The journey compares the data that this release reads with the data that earlier stops wrote. Then the release writes
more data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mlflow_host.boot import database
from mlflow_host.postgres.cluster import Cluster
from mlflow_host.schema import state
from mlflow_host.schema.release import ImageSchema
from scripts.drilling.expected_writes import ExpectedWrites
from scripts.drilling.worker_client import WorkerClient
from tests.schema.rds_like import uri


@dataclass
class Journey:
    cluster: Cluster
    folder: Path
    workers: dict[str, WorkerClient] = field(default_factory=dict)
    expected: ExpectedWrites = field(default_factory=ExpectedWrites)
    said: list[str] = field(default_factory=list)

    def worker(self, image: ImageSchema) -> WorkerClient:
        version = image.mlflow_version
        if version not in self.workers:
            self.workers[version] = WorkerClient(image.python, str(self.folder))
        return self.workers[version]

    @property
    def uri(self) -> str:
        return uri(self.cluster)

    def settings(self, image: ImageSchema) -> state.ChangeSettings:
        return state.ChangeSettings(self.cluster, image, self.folder / "reports", dump=None)

    def stop(self, image: ImageSchema, *, write: bool = True) -> list[str]:
        """Change the database to the schema of `image`, and return the differences between its data and the expected
        data. If `write` is true, write more data after the comparison."""
        worker = self.worker(image)
        self.said.append(database.bring(self.settings(image), self.said.append))
        found = self.expected.compare(image.mlflow_version, worker.read(self.uri))
        if write:
            self.write(image)
        return [str(finding) for finding in found]

    def write(self, image: ImageSchema) -> None:
        worker = self.worker(image)
        stop = f"{len(self.expected.written)}-{image.mlflow_version.replace('.', '-')}"
        self.expected.add(image.mlflow_version, worker.write(self.uri, stop), worker.read(self.uri))


@contextmanager
def journey(cluster: Cluster, folder: Path) -> Iterator[Journey]:
    on_the_way = Journey(cluster, folder)
    try:
        yield on_the_way
    finally:
        for worker in on_the_way.workers.values():
            worker.end()
