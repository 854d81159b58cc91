"""Run the image's MLflow in a separate worker process, which creates, migrates and opens databases."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_host.machine import config
from mlflow_host.postgres.cluster import Cluster, password_file
from mlflow_host.postgres.login import PasswordFile

WORKER = Path(__file__).with_name("release_worker.py")

ARTIFACT_ROOT = "mlflow-artifacts:/"
"""The server's artifact root. MLflow puts the artifacts of a new experiment below this root."""


RENEW_SECONDS = 300
"""While a task runs, the worker's password is renewed after this time, because a task may open several connections and
a token of Amazon RDS is valid for 15 minutes."""


class ReleaseError(Exception):
    """A task of the worker process failed. The exception's text is MLflow's error."""


@dataclass(frozen=True)
class ImageSchema:
    """Values from image.json, and the Python interpreter for which the image's MLflow is installed."""

    python: Path
    head: str
    count: int
    mlflow_version: str
    image_version: str = ""
    enumerations: Mapping[str, Sequence[str]] | None = None
    """The values that MLflow accepts in each enumeration column ("table.column"). If image.json is too old to contain
    these values, the field is None, and the worker process reads the values from MLflow."""


def of_this_image() -> ImageSchema:
    """Return the values of the running image, and this process's interpreter. Raises OSError if image.json is
    missing."""
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
    """`answers` is the number of results by kind (runs, traces, …). `unread` has a sentence for each failed search, and
    for each table with rows that MLflow could not read."""

    answers: dict[str, int]
    unread: tuple[str, ...] = ()


class Release:
    """A running worker process, and the database cluster on which MLflow performs the worker's tasks."""

    def __init__(self, cluster: Cluster, process: subprocess.Popen[str], login: PasswordFile):
        self._cluster, self._process, self._login = cluster, process, login

    def head(self) -> str:
        return str(self._ask("head"))

    def create(self, database: str, revision: str) -> None:
        self._ask("create", uri=self._uri(database), revision=revision)

    def upgrade(self, database: str, revision: str) -> None:
        self._ask("upgrade", uri=self._uri(database), revision=revision)

    def enumerations(self) -> dict[str, list[str]]:
        """Return the values that MLflow accepts in each enumeration column; the keys are "table.column"."""
        return dict(self._ask("enumerations"))

    def query_stores(self, database: str) -> StoreAnswers:
        reply = self._ask("query_stores", uri=self._uri(database), artifact_root=ARTIFACT_ROOT)
        return StoreAnswers(dict(reply["answers"]), tuple(reply["unread"]))

    def _uri(self, database: str) -> str:
        return self._cluster.uri(database, self._login.path)

    def _ask(self, task: str, **arguments: str) -> Any:
        assert self._process.stdin and self._process.stdout
        self._login.renew()
        try:
            self._process.stdin.write(json.dumps({"task": task, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            while not select.select([self._process.stdout], [], [], RENEW_SECONDS)[0]:
                self._login.renew()
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
    """Start the worker process, and kill it when the `with` block ends. Does not wait for the import of MLflow."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("MLFLOW_", "PYTHON"))}
    with password_file(cluster) as login:
        process = subprocess.Popen(
            [str(image.python), "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**kept, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "PYTHONWARNINGS": "ignore"},
            pass_fds=login.descriptors,
        )
        try:
            yield Release(cluster, process, login)
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream:
                    stream.close()
