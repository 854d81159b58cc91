"""The bench's contender that is what the image ships starts with the present templates, and is measured."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.bench import load
from tests.bench.contenders import ours
from tests.support.services import object_store

pytestmark = pytest.mark.service


def test_what_the_image_ships_can_be_measured() -> None:
    # Not pytest's folder: nginx's workers are another user, and it is closed to them.
    with tempfile.TemporaryDirectory(prefix="mlflow-bench-") as name, object_store(Path(name) / "store") as store:
        Path(name).chmod(0o755)
        folder = Path(name) / "ours"
        folder.mkdir(mode=0o755)
        with ours(folder, store) as contender:
            for operation in ("log-metric", "get run"):
                measured = load.run(contender.target, operation, contender.data, 2, 1.0)
                assert measured.errors == [] and measured.latencies
