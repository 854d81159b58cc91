"""Test `rehearse.py up` with a separate stack on the tests' local cloud: launch, a second `up`, replacement and
interruption of the machine. The stack keeps its data."""

from __future__ import annotations

import json
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from base64 import b64encode
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.machine

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
NAME = "rehearsal-tests"


@pytest.fixture(scope="module")
def stack_of_our_own(cloud: Any, image: Mapping[str, Any]) -> Iterator[str]:
    """Let the tests use a separate stack, and yield the ID of the AMI to launch. At the end, the stack and its data are
    deleted."""
    from scripts.rehearsal import stack
    from tests.support.servers import own_stack

    with own_stack(cloud, NAME):
        yield image["ami_id"]
    assert NAME not in stack.state_paths()


def rehearse(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, str(SCRIPTS / "rehearse.py"), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def up(ami: str, *settings: str) -> dict[str, Any]:
    return dict(json.loads(rehearse("up", "--json", "--ami", ami, *settings).stdout))


def described(changes: list[dict[str, Any]]) -> list[str]:
    """Return the operations in sorted order, because the program registers independent resources in any order."""
    return sorted(json.dumps(each, sort_keys=True) for each in changes)


def call(server: Mapping[str, Any], path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    login = b64encode(f"{server['username']}:{server['password']}".encode()).decode()
    request = urllib.request.Request(
        f"{server['url']}/api/2.0/mlflow/{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Basic {login}", "Content-Type": "application/json"},
    )
    trusted = ssl.create_default_context(cafile=server["server_certificate"])
    with urllib.request.urlopen(request, timeout=60, context=trusted) as response:
        return dict(json.load(response))


def test_launch_leave_alone_replace_interrupt_and_go_on(stack_of_our_own: str) -> None:
    ami = stack_of_our_own
    first = up(ami)
    assert first["state"] == "ready"
    assert {each["operation"] for each in first["changes"]} == {"create"}
    assert {"configure", "data-volume", "postgresql", "database"} <= {each["step"] for each in first["boot"]}
    assert first["seconds_to_first_answer"] > 0
    experiment = call(first, "experiments/create", {"name": "kept"})["experiment_id"]

    again = up(ami)
    assert again["changes"] == []
    assert again["instance_id"] == first["instance_id"]

    # After a change of a setting in user-data, `up` replaces the machine, but no resource that holds data.
    planned = json.loads(rehearse("preview", "--json", "--ami", ami, "--set", "backupRetentionDays=7").stdout)
    replaced = up(ami, "--set", "backupRetentionDays=7")
    assert described(replaced["changes"]) == described(planned["changes"])
    assert {each["name"] for each in replaced["changes"] if each["type"].endswith(":Instance")} == {"server"}
    assert replaced["instance_id"] != first["instance_id"]
    for kept in ("url", "data_volume_id", "buckets", "password"):
        assert replaced[kept] == first[kept]
    assert call(replaced, f"experiments/get?experiment_id={experiment}")["experiment"]["name"] == "kept"

    # Ctrl-C interrupts the replacement of the machine. The next `up` completes the replacement.
    running = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "rehearse.py"), "up", "--ami", ami, "--set", "backupRetentionDays=8"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr is not None
    for line in running.stderr:
        if "delete" in line and "EipAssociation" in line:
            running.send_signal(signal.SIGINT)
            break
    said = running.stderr.read()
    assert running.wait(timeout=120) == 130, said
    assert "Traceback" not in said
    deadline = time.monotonic() + 300
    back = up(ami)
    assert time.monotonic() < deadline
    assert back["settings"] == {"backupRetentionDays": "8"}
    assert call(back, f"experiments/get?experiment_id={experiment}")["experiment"]["name"] == "kept"


def test_ssh_and_logs_reach_the_machine(stack_of_our_own: str) -> None:
    status = json.loads(rehearse("status", "--json").stdout)
    assert status["state"] == "ready"
    assert rehearse("ssh", "cat", "/etc/mlflow-host/launch.toml").stdout.startswith("format = 1")
    assert "mlflow-host" in rehearse("logs").stdout
    assert rehearse("ssh", "--", "systemctl", "is-active", "nginx").stdout == "active\n"
