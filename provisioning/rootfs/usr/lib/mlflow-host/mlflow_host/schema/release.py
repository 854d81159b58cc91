"""The image's own release of MLflow, asked to build, migrate and open databases."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_host.schema.cluster import Cluster

WORKER = Path(__file__).with_name("release_worker.py")

ARTIFACT_ROOT = "mlflow-artifacts:/"
"""What the server gives new experiments as their location."""


class ReleaseError(Exception):
    """MLflow could not do what it was asked for; the text is MLflow's."""


@dataclass(frozen=True)
class Image:
    """What the step needs to know of image.json, and the interpreter that imports the image's MLflow."""

    python: Path
    head: str
    count: int
    mlflow_version: str
    image_version: str = ""


class Release:
    """A process that has MLflow imported; owns that process."""

    def __init__(self, cluster: Cluster, process: subprocess.Popen[str]):
        self._cluster, self._process = cluster, process

    def head(self) -> str:
        return str(self._ask("head"))

    def create(self, database: str, revision: str) -> None:
        self._ask("create", uri=self._cluster.uri(database), revision=revision)

    def upgrade(self, database: str, revision: str) -> None:
        self._ask("upgrade", uri=self._cluster.uri(database), revision=revision)

    def answer(self, database: str) -> dict[str, int]:
        reply = self._ask("answer", uri=self._cluster.uri(database), artifact_root=ARTIFACT_ROOT)
        return {name: int(number) for name, number in reply.items()}

    def _ask(self, task: str, **arguments: str) -> Any:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"task": task, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ReleaseError(f"MLflow's process ended with exit status {self._process.wait()} at the task {task!r}")
        reply = json.loads(line)
        if "error" in reply:
            raise ReleaseError(reply["error"].splitlines()[0][:500])
        return reply["result"]


@contextmanager
def release(cluster: Cluster, image: Image) -> Iterator[Release]:
    """Starts at once and is asked later; gone when the block ends, whatever it was doing."""
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
