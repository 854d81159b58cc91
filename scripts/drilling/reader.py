"""A process with one release of MLflow that writes to and reads from a server or a database."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from drilling.ledger import Sections, Touched

STORED = Path(__file__).with_name("stored.py")


class ReaderError(Exception):
    """MLflow could not write or read what it was asked to; the text is its traceback."""


def without_mlflow(environment: Mapping[str, str]) -> dict[str, str]:
    """What a process of another release may inherit: MLflow puts the experiment in use into its own environment, where
    another database has no such experiment."""
    return {name: value for name, value in environment.items() if not name.startswith("MLFLOW_")}


class Reader:
    """Owns the process; `folder` takes artifacts of a database's experiments, "" leaves them to the server."""

    def __init__(self, python: Path, folder: str, environment: Mapping[str, str] | None = None):
        self._folder = folder
        self._complaints = TemporaryFile()  # noqa: SIM115, as it lives as long as the process
        self._process = subprocess.Popen(
            [python, "-W", "ignore", STORED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
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
            self._complaints.seek(0)
            said = self._complaints.read().decode(errors="replace")[-2000:]
            raise ReaderError(f"MLflow's process ended with exit status {self._process.wait()}: {said}")
        reply = json.loads(line)
        if "error" in reply:
            raise ReaderError(reply["error"])
        return reply["result"]

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._complaints.close()
