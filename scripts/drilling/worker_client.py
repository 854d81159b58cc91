"""Start a worker process with one release of MLflow. The worker writes and reads the data of a server or a database."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from scripts.drilling.expected_writes import Sections, Touched

WORKER = Path(__file__).with_name("mlflow_worker.py")


class WorkerError(Exception):
    """A request failed in the worker. The exception's text is the worker's traceback."""


def without_mlflow(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a worker, without MLflow's variables. MLflow stores the ID of the current experiment in an
    environment variable, and another database does not have this experiment."""
    return {name: value for name, value in environment.items() if not name.startswith("MLFLOW_")}


class WorkerClient:
    """Owns the worker process. If the worker uses a database, `folder` is the folder for artifacts. If the worker uses
    a server, `folder` is ""."""

    def __init__(self, python: Path, folder: str, environment: Mapping[str, str] | None = None):
        self._folder = folder
        self._stderr = TemporaryFile()  # noqa: SIM115, because the file stays open until the process ends
        self._process = subprocess.Popen(
            [python, "-W", "ignore", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**without_mlflow(os.environ), **(environment or {})},
            start_new_session=True,
        )

    def write(self, uri: str, stop: str) -> Touched:
        touched = self._ask("write", uri, self._folder, stop)
        return Touched(*({(section, key) for section, key in touched[kind]} for kind in ("changed", "deleted")))

    def read(self, uri: str) -> Sections:
        return dict(self._ask("read", uri))

    def _ask(self, *request: str) -> Any:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            self._stderr.seek(0)
            output = self._stderr.read().decode(errors="replace")[-2000:]
            raise WorkerError(f"the worker ended with exit status {self._process.wait()}: {output}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["result"]

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()
