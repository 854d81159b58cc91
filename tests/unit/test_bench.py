"""Each program of the bench starts without pytest, and the bench measures our server with the current templates."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.bench import load
from tests.bench.contenders import ours
from tests.support.services import object_store

BENCH = Path(__file__).parents[1] / "bench"


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(path.stem for path in BENCH.glob("*.py") if "argparse" in path.read_text()))
def test_each_program_starts_without_pytest(name: str) -> None:
    module = "tests.bench" if name == "__main__" else f"tests.bench.{name}"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=BENCH.parents[1], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout[:6]) == (0, "usage:"), done.stderr


@pytest.mark.service
def test_what_the_image_ships_can_be_measured() -> None:
    # nginx's workers run as another user, who cannot access pytest's folder.
    with tempfile.TemporaryDirectory(prefix="mlflow-bench-") as name, object_store(Path(name) / "store") as store:
        Path(name).chmod(0o755)
        folder = Path(name) / "ours"
        folder.mkdir(mode=0o755)
        with ours(folder, store) as contender:
            for operation in ("log-metric", "get run"):
                measured = load.run(contender.target, operation, contender.data, 2, 1.0)
                assert measured.errors == [] and measured.latencies
