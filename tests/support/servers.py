"""Launch servers for tests with the scripts that users run, and use the servers with the real MLflow client."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests

from scripts.local_cloud import LocalCloud
from scripts.rehearsal import stack, state, tools

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "scripts"
BUILD = REPOSITORY / "build"
EXAMPLES = sorted((SCRIPTS / "examples").glob("*.py"))
QUESTION = "/api/2.0/mlflow/experiments/get?experiment_id=0"
"""Path of a request for which MLflow reads from the database."""
OLDER = "3.12.0"
"""The MLflow release from which tests upgrade and to which tests roll back."""


@dataclass(frozen=True)
class Server:
    """A launched server, with the facts that `rehearse.py status --json` prints."""

    url: str
    username: str
    password: str = field(repr=False)
    instance_id: str
    ami_id: str
    mlflow_version: str
    buckets: Mapping[str, str]
    exports: Mapping[str, str] = field(repr=False)
    """The environment variables that scripts/connect.py prints for a client."""
    server_certificate: str | None = None
    """File with the authority's certificate, which clients use to verify the server's HTTPS certificate."""
    seconds_to_first_answer: float | None = field(default=None, compare=False)
    """Seconds from RunInstances to the first authenticated status 200, as `rehearse.py up` measured them."""

    def ask(self, path: str, method: str = "GET", **options: Any) -> requests.Response:
        """Send one request without a login, and verify HTTPS with the server's own authority. `options` are passed to
        `requests.request`."""
        verify = self.server_certificate or True
        options = {"timeout": 10, "verify": verify, "allow_redirects": False} | options
        return requests.request(method, self.url + path, **options)

    def answers(self) -> bool:
        """Return whether MLflow responds to a logged-in user with status 200."""
        try:
            return self.ask(QUESTION, auth=self.login).status_code == 200
        except requests.RequestException:
            return False

    @property
    def login(self) -> tuple[str, str]:
        return self.username, self.password


def launch_server(*arguments: str) -> Server:
    """`rehearse.py up` with these arguments."""
    launched = json.loads(script("rehearse.py", "up", *arguments, "--json").stdout)
    return replace(describe_server(), seconds_to_first_answer=launched["seconds_to_first_answer"])


def destroy_server(cloud: LocalCloud) -> None:
    """Delete the stack with all its data, including protected resources. The local cloud and its images remain."""
    with stack.exclusive():
        current = state.load(stack.state_path())
        if current.resources:
            by = stack.engine_for("auto", current)
            by.destroy(cloud, stack.clients(cloud), current, say=print, done=lambda step: None)


@contextmanager
def own_stack(cloud: LocalCloud, name: str) -> Iterator[None]:
    """Servers launched during the block belong to the stack `name`. The stack is deleted before and after the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(stack.NAMED_BY, name)
        destroy_server(cloud)
        try:
            yield
        finally:
            destroy_server(cloud)


def on_machine(cloud: LocalCloud, server: Server, *command: str) -> str:
    """Run a command on the machine and return its output. If the command fails, the test fails and shows the output."""
    done = cloud.exec(server.instance_id, list(command), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def describe_server() -> Server:
    status = json.loads(script("rehearse.py", "status", "--json").stdout)
    words = shlex.split(script("connect.py").stdout, comments=True)
    names = Server.__dataclass_fields__
    return Server(
        **{name: value for name, value in status.items() if name in names},
        exports=dict(word.split("=", 1) for word in words if "=" in word),
    )


def bake_with(packer: Path) -> dict[str, Any]:
    """Bake a new image with the Packer binary `packer`, and return the output of bake.py."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(packer.parent), os.environ["PATH"]]),
        "PACKER_PLUGIN_PATH": str(tools.PACKER_PLUGINS),
    }
    command = [sys.executable, str(SCRIPTS / "bake.py"), "--local", "--json"]
    return dict(json.loads(run(command, env=environment).stdout))


@contextmanager
def client_of(server: Server) -> Iterator[mlflow.MlflowClient]:
    """During the block, MLflow in this process is a client of `server`, and uses only connect.py's variables.

    Variables that MLflow sets during the block, such as the active experiment, are removed after the block.
    """
    before = dict(os.environ)
    os.environ.update(server.exports)
    try:
        yield mlflow.MlflowClient()
    finally:
        os.environ.clear()
        os.environ.update(before)


def script(name: str, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a script of scripts/ like a user. If the exit status is not `expect`, the test fails and shows the output."""
    return run([sys.executable, str(SCRIPTS / name), *arguments], expect=expect)


def run(
    command: list[str], expect: int = 0, env: Mapping[str, str] | None = None, given: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command with the text `given` on standard input. If the exit status is not `expect`, the test fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=env, input=given)
    if done.returncode != expect:
        pytest.fail(
            f"{shlex.join(command)}\nended with {done.returncode}, not {expect}:\n{done.stdout}{done.stderr}",
            pytrace=False,
        )
    return done
