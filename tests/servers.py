"""Launched servers as the tests see them: by the scripts a person runs, and the real MLflow client."""

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
from local_cloud import LocalCloud
from rehearsal import stack, state

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = REPOSITORY / "scripts"
BUILD = REPOSITORY / "build"
EXAMPLES = sorted((SCRIPTS / "examples").glob("*.py"))
QUESTION = "/api/2.0/mlflow/experiments/get?experiment_id=0"
"""Answered from the database."""
OLDER = "3.12.0"
"""The release of MLflow that is upgraded from and rolled back to."""


@dataclass(frozen=True)
class Server:
    """A launched server, as `rehearse.py status --json` describes it."""

    url: str
    username: str
    password: str = field(repr=False)
    instance_id: str
    ami_id: str
    mlflow_version: str
    buckets: Mapping[str, str]
    exports: Mapping[str, str] = field(repr=False)
    """What scripts/connect.py tells a client to put into its environment."""
    server_certificate: str | None = None
    """File with the certificate of the authority that HTTPS is verified by."""
    seconds_to_first_answer: float | None = field(default=None, compare=False)
    """From RunInstances to the first authenticated 200, as `rehearse.py up` measured it."""

    def ask(self, path: str, method: str = "GET", **options: Any) -> requests.Response:
        """One request without a login, verified by the server's own authority; `options` as requests has them."""
        verify = self.server_certificate or True
        options = {"timeout": 10, "verify": verify, "allow_redirects": False} | options
        return requests.request(method, self.url + path, **options)

    def answers(self) -> bool:
        """Whether MLflow does, to somebody who is logged in."""
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
    """Delete the stack with all its data, what it protects included; the cloud stays up and its images stay."""
    with stack.exclusive():
        current = state.load(stack.state_path())
        if current.resources:
            stack.destroy(cloud, stack.clients(cloud), current, say=print, done=lambda step: None)


@contextmanager
def own_stack(cloud: LocalCloud, name: str) -> Iterator[None]:
    """What is launched while the block runs is a stack of that name, without a server before and after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(stack.NAMED_BY, name)
        destroy_server(cloud)
        try:
            yield
        finally:
            destroy_server(cloud)


def on_machine(cloud: LocalCloud, server: Server, *command: str) -> str:
    """What a command prints on the machine; the test fails with what it said unless it succeeds."""
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


@contextmanager
def client_of(server: Server) -> Iterator[mlflow.MlflowClient]:
    """For as long as the block runs, this process's MLflow is a client of `server`, by connect.py's exports alone.

    What MLflow exports itself meanwhile, such as the active experiment, is gone afterwards, too.
    """
    before = dict(os.environ)
    os.environ.update(server.exports)
    try:
        yield mlflow.MlflowClient()
    finally:
        os.environ.clear()
        os.environ.update(before)


def script(name: str, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a script of ours as a person would; the test fails with what it said unless it exits with `expect`."""
    return run([sys.executable, str(SCRIPTS / name), *arguments], expect=expect)


def run(
    command: list[str], expect: int = 0, env: Mapping[str, str] | None = None, given: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command with `given` on standard input; the test fails unless it exits with `expect`."""
    done = subprocess.run(command, capture_output=True, text=True, env=env, input=given)
    if done.returncode != expect:
        pytest.fail(
            f"{shlex.join(command)}\nended with {done.returncode}, not {expect}:\n{done.stdout}{done.stderr}",
            pytrace=False,
        )
    return done
