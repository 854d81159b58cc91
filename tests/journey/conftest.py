"""Fixtures: a user of each role, and a drill that runs in parallel with a test that mostly waits."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from scripts.local_cloud import LocalCloud
    from tests.support.servers import Server


@dataclass(frozen=True)
class Drill:
    """A started drill. `story` is the file of the drill's log, which is complete after the drill has ended."""

    process: subprocess.Popen[bytes]
    result: Path
    story: Path


@pytest.fixture(scope="session")
def drill(
    cloud: LocalCloud, image: Mapping[str, Any], older_image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Drill]:
    """Start a drill between the older and the current image, in its own stack. If the drill still runs at the end of
    the tests, the fixture interrupts the drill."""
    from tests.support.servers import SCRIPTS

    folder = tmp_path_factory.mktemp("drill")
    result, story = folder / "result.json", folder / "story"
    command = [sys.executable, str(SCRIPTS / "drill.py"), older_image, image["ami_id"], "--json"]
    with result.open("wb") as told, story.open("wb") as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=told, stderr=said, start_new_session=True)
    try:
        yield Drill(process, result, story)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


@pytest.fixture(scope="session")
def drill_meanwhile(request: pytest.FixtureRequest, image: Mapping[str, Any]) -> None:
    """Start the drill early if a selected test needs the drill, because the test with this fixture mostly waits."""
    if any("drill" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("drill")


@pytest.fixture(scope="session")
def logins(server: Server) -> Iterator[dict[str, tuple[str, str]]]:
    """Create a user of `server` for each role. Yields a dictionary: role → (name, password)."""
    from tests.support.servers import script

    made: dict[str, tuple[str, str]] = {}
    try:
        for role in ("reader", "writer", "admin"):
            name = f"any-{role}"
            made[role] = (name, script("users.py", "add", name, "--role", role).stdout.strip())
        deadline = time.monotonic() + 90
        # The server loads new passwords first and new roles later. After the server has loaded both, nginx refuses a
        # reader's request with 403, and MLflow refuses an empty request with 400.
        create, due = "/api/2.0/mlflow/experiments/create", [403, 400, 400]
        while [server.ask(create, "POST", json={}, auth=login).status_code for login in made.values()] != due:
            assert time.monotonic() < deadline, "the server does not know the new users within 90 s"
            time.sleep(2)
        yield made
    finally:
        for name, _ in made.values():
            script("users.py", "remove", name)
