"""A database's way through releases of MLflow: at each stop the step brings it to that release, the release writes,
and everything that any earlier stop wrote is compared with what the release reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from drilling.ledger import Ledger
from drilling.reader import Reader
from mlflow_host import database
from mlflow_host.schema.cluster import Cluster
from mlflow_host.schema.release import Image


@dataclass
class Journey:
    cluster: Cluster
    folder: Path
    readers: dict[str, Reader] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    said: list[str] = field(default_factory=list)

    def reader(self, image: Image) -> Reader:
        version = image.mlflow_version
        if version not in self.readers:
            self.readers[version] = Reader(image.python, str(self.folder))
        return self.readers[version]

    @property
    def uri(self) -> str:
        return self.cluster.uri(self.cluster.database)

    def settings(self, image: Image) -> database.Settings:
        return database.Settings(self.cluster, image, self.folder / "reports", dump=None)

    def stop(self, image: Image, *, write: bool = True) -> list[str]:
        """Bring the database to the image's release, compare, write. Returns what is missing or not as it was."""
        reader = self.reader(image)
        self.said.append(database.bring(self.settings(image), self.said.append))
        found = self.ledger.compare(image.mlflow_version, reader.read(self.uri))
        if write:
            self.write(image)
        return [str(finding) for finding in found]

    def write(self, image: Image) -> None:
        reader = self.reader(image)
        stop = f"{len(self.ledger.written)}-{image.mlflow_version.replace('.', '-')}"
        self.ledger.enter(image.mlflow_version, reader.write(self.uri, stop), reader.read(self.uri))


@contextmanager
def journey(cluster: Cluster, folder: Path) -> Iterator[Journey]:
    on_the_way = Journey(cluster, folder)
    try:
        yield on_the_way
    finally:
        for reader in on_the_way.readers.values():
            reader.end()
