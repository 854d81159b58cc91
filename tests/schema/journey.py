"""A database's way through releases of MLflow: at each stop the step brings it to that release, the release writes,
and everything that any earlier stop wrote is compared with what the release reads."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow_host import database
from mlflow_host.schema.cluster import Cluster
from mlflow_host.schema.release import Image

STORED = Path(__file__).with_name("stored.py")

Sections = dict[str, dict[str, Any]]

LISTS_OF_LATEST = {"latest_version", "latest_versions"}
"""What a registered model repeats of its versions."""


NARROWEST = 5000
"""An older release may show a text cut to the width of its column; from this width on that is no loss, as the whole
text waits in the kept database and must be back at the next stop of the release that wrote it."""


def without_mlflow(environment: Mapping[str, str]) -> dict[str, str]:
    """What a process of another release may inherit: MLflow puts the experiment in use into its own environment, where
    another database has no such experiment."""
    return {name: value for name, value in environment.items() if not name.startswith("MLFLOW_")}


class Reader:
    """MLflow of one release, writing to and reading from a database; owns the process."""

    def __init__(self, python: Path, folder: Path):
        self._folder = folder
        self._process = subprocess.Popen(
            [python, "-W", "ignore", STORED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=without_mlflow(os.environ),
        )

    def write(self, uri: str, stop: str) -> dict[str, list[list[str]]]:
        return dict(self._ask("write", uri, str(self._folder), stop))

    def read(self, uri: str) -> Sections:
        return dict(self._ask("read", uri))

    def _ask(self, *request: str) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the release's process ended"
        reply = json.loads(line)
        assert "error" not in reply, reply["error"]
        return reply["result"]

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@dataclass
class Journey:
    """`written` is what was read right after each stop's writing, with the release that read it."""

    cluster: Cluster
    folder: Path
    readers: dict[str, Reader] = field(default_factory=dict)
    written: list[tuple[str, Sections]] = field(default_factory=list)
    changed: list[set[tuple[str, str]]] = field(default_factory=list)
    deleted: set[tuple[str, str]] = field(default_factory=set)
    said: list[str] = field(default_factory=list)

    def reader(self, image: Image) -> Reader:
        version = image.mlflow_version
        if version not in self.readers:
            self.readers[version] = Reader(image.python, self.folder)
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
        missing = self.compare(image, reader.read(self.uri))
        if write:
            self.write(image)
        return missing

    def write(self, image: Image) -> None:
        reader = self.reader(image)
        touched = reader.write(self.uri, f"{len(self.written)}-{image.mlflow_version.replace('.', '-')}")
        self.changed.append({(section, key) for section, key in touched["changed"]})
        self.deleted |= {(section, key) for section, key in touched["deleted"]}
        self.written.append((image.mlflow_version, reader.read(self.uri)))

    def compare(self, image: Image, now: Sections) -> list[str]:
        missing = []
        for number, (version, then) in enumerate(self.written):
            changed_since = set().union(*self.changed[number + 1 :])
            same_release = version == image.mlflow_version
            for section, entries in then.items():
                if section not in now:
                    continue
                for key, was in entries.items():
                    if (section, key) in self.deleted:
                        if key in now[section]:
                            missing.append(f"{section} {key} of stop {number} was deleted and is back")
                    elif key not in now[section]:
                        missing.append(f"{section} {key} of stop {number} is missing")
                    elif (section, key) not in changed_since:
                        found = now[section][key]
                        missing += [
                            f"{section} {key} of stop {number}: {what}"
                            for what in differences(was, found, exact=same_release)
                        ]
        return missing


@contextmanager
def journey(cluster: Cluster, folder: Path) -> Iterator[Journey]:
    on_the_way = Journey(cluster, folder)
    try:
        yield on_the_way
    finally:
        for reader in on_the_way.readers.values():
            reader.end()


def differences(was: Any, found: Any, *, exact: bool, path: str = "") -> list[str]:
    """Where two answers differ; unless `exact`, fields that only one release has and cut texts do not count."""
    if isinstance(was, dict) and isinstance(found, dict):
        only = sorted((set(was) ^ set(found)) - LISTS_OF_LATEST) if exact else []
        told = [f"{path}/{key} is only {'before' if key in was else 'now'}" for key in only]
        for key in sorted((set(was) & set(found)) - LISTS_OF_LATEST):
            told += differences(was[key], found[key], exact=exact, path=f"{path}/{key}")
        return told
    if isinstance(was, list) and isinstance(found, list) and len(was) == len(found):
        return [
            told
            for place, (one, other) in enumerate(zip(was, found, strict=True))
            for told in differences(one, other, exact=exact, path=f"{path}[{place}]")
        ]
    if not exact and isinstance(was, str) and isinstance(found, str):
        cut = min(len(was), len(found))
        if cut >= NARROWEST:
            was, found = was[:cut], found[:cut]
    return [] if was == found else [f"{path} was {str(was)[:120]!r} and is {str(found)[:120]!r}"]
