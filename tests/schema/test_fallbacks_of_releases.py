"""Run the bake's check with the oldest and the newest release that can be baked. The server starts with each of the two
releases, and the check reports the fallbacks."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from scripts import lock
from tests.schema.environments import releases, server_environment
from tests.support.services import HOST_PACKAGE

CHECK = """
import json
from mlflow_host.bake import check_release, reader_routes
result, found = check_release.check()
unsorted = reader_routes.sort_posts(reader_routes.installed_routes())[1]
print(json.dumps([result, [vars(entry) for entry in [*found, *reader_routes.fallback(unsorted)]]]))
"""


def check(python: Path, *path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the bake's record of the MLflow release that is installed for the interpreter `python`: the facts, and the
    reason for each fallback. Python searches the folders `path` first for modules."""
    environment = {**os.environ, "PYTHONPATH": ":".join(map(str, [*path, HOST_PACKAGE]))}
    ended = subprocess.run([python, "-W", "ignore", "-c", CHECK], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    facts, found = json.loads(ended.stdout.splitlines()[-1])
    return facts, {entry["what"]: entry["why"] for entry in found}


def test_newest_release_lacks_nothing() -> None:
    facts, fallbacks = check(server_environment(releases()[-1]))
    assert facts["mlflow"] == releases()[-1]
    assert fallbacks == {}


@pytest.mark.slow
def test_oldest_release_that_can_be_baked_starts_without_the_fast_path() -> None:
    oldest = lock.oldest_release()
    facts, fallbacks = check(server_environment(oldest))
    assert facts["mlflow"] == oldest
    assert fallbacks.keys() == {"the fast path of all endpoints"}
