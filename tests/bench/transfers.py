"""Upload and download small, medium and large artifacts with MLflow's client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.bench import floor
from tests.bench.contenders import Contender, PeakMemory, memory_mb
from tests.support.services import ObjectStore

CLIENT = """
import json, os, sys, tempfile, time
import mlflow
folder, kind, below = sys.argv[1:]
with mlflow.start_run() as run:
    started = time.monotonic()
    mlflow.log_artifacts(folder, kind)
    uploaded = time.monotonic()
os.sync()
with tempfile.TemporaryDirectory(dir=below) as target:
    begun = time.monotonic()
    mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/{kind}", dst_path=target)
    print(json.dumps([uploaded - started, time.monotonic() - begun]))
"""


@dataclass(frozen=True)
class Load:
    name: str
    count: int
    size: int
    """The size of each file in bytes."""


LOADS = (Load("1 KB × 1,000", 1000, 1000), Load("10 MB", 1, 10 * 10**6), Load("1 GB", 1, 10**9))
QUICK_LOADS = (Load("1 KB × 100", 100, 1000), Load("10 MB", 1, 10 * 10**6))


@dataclass(frozen=True)
class Moved:
    """The speeds of upload and download in MB/s, and the largest growth of the server's memory during the transfer, in
    MB."""

    up: float
    down: float
    growth_mb: float


def make_files(load: Load, folder: Path) -> list[Path]:
    target = folder / load.name.replace(" ", "").replace(",", "")
    if not target.exists():
        target.mkdir()
        block = os.urandom(2**20)
        for number in range(load.count):
            with (target / f"file-{number:04}.bin").open("wb") as file:
                for start in range(0, load.size, len(block)):
                    file.write(block[: min(len(block), load.size - start)])
    return sorted(target.iterdir())


def move(
    contender: Contender, store: ObjectStore, load: Load, files: list[Path], folder: Path, settings: Mapping[str, str]
) -> Moved:
    """Run a client with the environment variables in `settings`. The client uploads the files and downloads them to
    `folder`.

    Raises CalledProcessError if the client fails.
    """
    before = memory_mb(contender.processes())
    environment = {**os.environ, **contender.client_environment, "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    environment |= {"REQUESTS_CA_BUNDLE": store.authority} if store.authority else {}
    environment |= settings
    command = [sys.executable, "-W", "ignore", "-c", CLIENT, str(files[0].parent), "files", str(folder)]
    with PeakMemory(contender) as peak:
        ended = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    up, down = json.loads(ended.stdout.splitlines()[-1])
    megabytes = load.count * load.size / 10**6
    return Moved(megabytes / up, megabytes / down, peak.mb - before)


def move_directly(store: ObjectStore, load: Load, files: list[Path], folder: Path) -> Moved:
    """Upload and download the files with boto3 only."""
    with tempfile.TemporaryDirectory(dir=folder) as target:
        up, down = floor.transfer(store, files, Path(target))
    megabytes = load.count * load.size / 10**6
    return Moved(megabytes / up, megabytes / down, 0.0)
