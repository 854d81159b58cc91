"""The image's release of MLflow, in a process of its own that creates, migrates and opens databases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_host.machine import config
from mlflow_host.postgres.cluster import Cluster

WORKER = Path(__file__).with_name("release_worker.py")

ARTIFACT_ROOT = "mlflow-artifacts:/"
"""Artifact root of the server, from which MLflow derives the location of new experiments."""


class ReleaseError(Exception):
    """A task failed in MLflow; the text is MLflow's error."""


@dataclass(frozen=True)
class ImageSchema:
    """Facts from image.json, and the Python interpreter that has the image's MLflow."""

    python: Path
    head: str
    count: int
    mlflow_version: str
    image_version: str = ""
    enumerations: Mapping[str, Sequence[str]] | None = None
    """The values that MLflow can read, by "table.column", of the columns that hold an enumeration. None in the facts of
    an image that was baked before they were recorded: MLflow is asked."""


def of_this_image() -> ImageSchema:
    """The facts of the image that runs, and this interpreter. Raises OSError without image.json."""
    facts = json.loads(config.IMAGE_FACTS.read_text())
    return ImageSchema(
        python=Path(sys.executable),
        head=facts["migration_head"],
        count=int(facts["migration_count"]),
        mlflow_version=facts["mlflow_version"],
        image_version=facts["image_version"],
        enumerations=facts.get("enumerations"),
    )


@dataclass(frozen=True)
class StoreAnswers:
    """`answers`: number of results of MLflow's stores by kind; `unread`: a sentence for each kind not read in full."""

    answers: dict[str, int]
    unread: tuple[str, ...] = ()


class Release:
    """Owns a process that has imported MLflow."""

    def __init__(self, cluster: Cluster, process: subprocess.Popen[str]):
        self._cluster, self._process = cluster, process

    def head(self) -> str:
        return str(self._ask("head"))

    def create(self, database: str, revision: str) -> None:
        self._ask("create", uri=self._cluster.uri(database), revision=revision)

    def upgrade(self, database: str, revision: str) -> None:
        self._ask("upgrade", uri=self._cluster.uri(database), revision=revision)

    def enumerations(self) -> dict[str, list[str]]:
        """The values that MLflow can read, by "table.column", of the columns that hold an enumeration."""
        return dict(self._ask("enumerations"))

    def query_stores(self, database: str) -> StoreAnswers:
        reply = self._ask("query_stores", uri=self._cluster.uri(database), artifact_root=ARTIFACT_ROOT)
        return StoreAnswers(dict(reply["answers"]), tuple(reply["unread"]))

    def _ask(self, task: str, **arguments: str) -> Any:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"task": task, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ReleaseError(f"MLflow's process ended with exit status {self._process.wait()} in the task {task!r}")
        reply = json.loads(line)
        if "error" in reply:
            raise ReleaseError(reply["error"].splitlines()[0][:500])
        return reply["result"]


@contextmanager
def release(cluster: Cluster, image: ImageSchema) -> Iterator[Release]:
    """Start the worker without waiting for it; kill it when the block ends."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("MLFLOW_", "PYTHON"))}
    process = subprocess.Popen(
        [str(image.python), "-P", str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**kept, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "PYTHONWARNINGS": "ignore"},
    )
    try:
        yield Release(cluster, process)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream:
                stream.close()
