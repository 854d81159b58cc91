"""Run the README commands that need a server, exactly as printed, in a new user's shell in another folder."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.local_cloud import LocalCloud
from tests.support.readme_commands import PATH, clone, commands, run
from tests.support.servers import Server, on_machine, own_stack

pytestmark = pytest.mark.machine

CONNECT = 'eval "$(scripts/connect.py)"'
EXAMPLES = [command for command in commands() if "scripts/examples/" in command]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(tmp_path_factory.mktemp("somewhere else"))


@pytest.fixture
def where(state_dir: Path) -> Iterator[dict[str, str]]:
    """Yield the environment variable that selects the local cloud. Apart from this variable, the shell is that of a new
    user."""
    yield {"MLFLOW_AMI_LOCAL_CLOUD": str(state_dir)}


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_log_to_the_server_that_connect_names(
    example: str, server: Server, checkout: Path, where: dict[str, str]
) -> None:
    assert CONNECT in commands()
    done = run(f"{CONNECT}\n{example}", checkout, **where)
    assert done.returncode == 0, done.stderr
    assert server.url in done.stdout


def test_users_are_added_and_removed(server: Server, checkout: Path, where: dict[str, str]) -> None:
    before = people(checkout, where)  # other tests share the server and may have created users
    added = run("scripts/users.py add ada", checkout, **where)
    assert added.returncode == 0, added.stderr
    assert len(added.stdout.strip()) == 24
    assert typed("scripts/users.py add bob --role reader --prompt", checkout, where, "correct-horse-battery") == 0
    assert run("scripts/users.py rotate ada", checkout, **where).returncode == 0
    assert people(checkout, where) == before | {"ada": "writer", "bob": "reader"}
    assert run("scripts/users.py remove bob", checkout, **where).returncode == 0
    assert run("scripts/users.py remove ada", checkout, **where).returncode == 0
    assert people(checkout, where) == before and before["admin"] == "admin"


@pytest.mark.parametrize("command", ["mlflow-host-restore list", "mlflow-host-gc"])
def test_commands_on_the_machine(command: str, server: Server, cloud: LocalCloud) -> None:
    assert command in commands()
    on_machine(cloud, server, *command.split())


@pytest.mark.slow
def test_demo_starts_and_stops(
    server: Server, cloud: LocalCloud, base: str, checkout: Path, where: dict[str, str], request: pytest.FixtureRequest
) -> None:
    """The demo has its own stack, so that `make demo-down` keeps the other tests' server and the cloud running."""
    if base != "debian12":
        pytest.skip("`make demo` takes debian12")
    if not prepared(checkout):
        pytest.skip("`make demo` would install into this .venv, which is not this checkout's own")
    with own_stack(cloud, "readme"):
        environment = where | {"MLFLOW_AMI_REHEARSAL": "readme"} | certificates()
        shown = run("make demo", checkout, **environment)
        assert shown.returncode == 0, shown.stderr
        assert "is up: open it in a browser" in shown.stdout
        down = run("make demo-down", checkout, **environment)
        assert down.returncode == 0, down.stderr
    assert server.answers()


def prepared(checkout: Path) -> bool:
    """Return whether scripts/prepare.sh has already installed everything for the tests, which includes everything for
    the demo."""
    inputs = "$(cat pyproject.toml provisioning/requirements.lock | cksum | tr ' ' -)"
    return run(f'test -e ".venv/prepared-{inputs}-test"', checkout).returncode == 0


def certificates() -> dict[str, str]:
    """Return the environment variables with the CA certificates of a network whose proxy re-signs TLS."""
    names = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
    return {name: os.environ[name] for name in names if name in os.environ}


def people(checkout: Path, where: dict[str, str]) -> dict[str, str]:
    shown = run("scripts/users.py list --json", checkout, **where)
    assert shown.returncode == 0, shown.stderr
    return dict(json.loads(shown.stdout))


def typed(command: str, checkout: Path, where: dict[str, str], password: str) -> int:
    """Run a command on a terminal, type the password at both prompts, and return the exit status."""
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", "bash", "-c", command],
        cwd=checkout, env={"HOME": str(checkout), "PATH": PATH, **where}, stdin=inside, stdout=inside, stderr=inside,
    )  # fmt: skip
    os.close(inside)
    shown = b""
    for question in (b"Password for bob: ", b"The same again: "):
        deadline = time.monotonic() + 60
        while question not in shown and time.monotonic() < deadline:
            shown += os.read(terminal, 1000)
        assert question in shown, shown
        os.write(terminal, password.encode() + b"\n")
    status = process.wait(timeout=60)
    os.close(terminal)
    return status
