"""Tests of the steps `preview`, `deploy`, `rollback` and `drift` with the real Pulumi on moto. test_stack_steps.py uses
a stand-in for Pulumi."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts import pulumi_stack
from scripts.delivering import commands, stack_steps
from scripts.rehearsal import pulumi_cli, stack, state
from tests.delivery.workflows import Runner, runner
from tests.support.marks import NEEDS_PULUMI
from tests.support.moto_cloud import MotoCloud, moto_cloud, register_image

pytestmark = [
    pytest.mark.tools,
    NEEDS_PULUMI,
]
STACK = "delivery"
SETTINGS = {"allowedCidrs": '["203.0.113.0/24"]'}


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MotoCloud]:
    """Start an empty AWS account in moto, with an empty folder for the local cloud."""
    monkeypatch.setenv("MLFLOW_AMI_LOCAL_CLOUD", str(tmp_path / "cloud"))
    monkeypatch.setenv(stack.NAMED_BY, STACK)
    (tmp_path / "cloud").mkdir()
    with moto_cloud() as made:
        yield made


@pytest.fixture
def hosted(cloud: MotoCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Create a runner whose folder infra/ is a Pulumi project with this repository's program. The stack exists, but was
    never launched."""
    made = runner(tmp_path, monkeypatch)
    first = register_image(cloud, "20261101T000000Z")
    current = state.load(stack.state_path())
    known = pulumi_cli._prepared(cloud, first, SETTINGS, current)  # type: ignore[arg-type]
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    project = pulumi_cli._project_folder()
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout/infra").symlink_to(project)
    monkeypatch.setattr(commands, "REPOSITORY", tmp_path / "checkout")
    monkeypatch.setattr(pulumi_stack, "PROGRAM", project)
    made.stand_in("gh", ("issue list", 0, ""))
    return made


def set_image(cloud: MotoCloud, image: str) -> None:
    stack_steps.must(STACK, "config", "set", "amiId", image)


def running(cloud: MotoCloud) -> str:
    machines: Any = [each for r in cloud.client("ec2").describe_instances()["Reservations"] for each in r["Instances"]]
    [machine] = [each for each in machines if each["State"]["Name"] == "running"]
    return str(machine["ImageId"])


def test_from_the_first_preview_to_a_rollback(
    cloud: MotoCloud, hosted: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    hosted.take("deploy", "preview", STACK=STACK)
    assert re.search(r"\+ \d\d to create", hosted.summary)
    plan = hosted.folder / "checkout/build/delivery/plan.json"
    assert json.loads(plan.read_text())
    assert hosted.take("deploy", "deploy", STACK=STACK) == {"previous": ""}
    first = running(cloud)
    assert stack_steps.running_image(STACK) == first

    hosted.take("drift", "drift", STACK=STACK)
    assert hosted.calls("gh") == []

    second = register_image(cloud, "20261129T000000Z", mlflow_version="3.19.0")
    set_image(cloud, second)
    hosted.take("drift", "drift", status=1, STACK=STACK)
    assert hosted.calls("gh")[-1].startswith(f"issue create --title Drift of {STACK}")
    hosted.take("deploy", "preview", STACK=STACK)
    assert hosted.take("deploy", "deploy", STACK=STACK) == {"previous": first}
    assert running(cloud) == second

    hosted.take("deploy", "rollback", STACK=STACK, PREVIOUS=first)
    assert running(cloud) == first == stack_steps.running_image(STACK)
    capsys.readouterr()

    stack_steps.must(STACK, "config", "set", "--path", "allowedCidrs[0]", "everybody")
    hosted.take("deploy", "preview", status=2, STACK=STACK)
    assert "::error file=infra/Pulumi.delivery.yaml,line=" in capsys.readouterr().out


def test_changes_outside_the_plan_are_refused(
    cloud: MotoCloud, hosted: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    hosted.take("deploy", "preview", STACK=STACK)
    hosted.take("deploy", "deploy", STACK=STACK)
    first = running(cloud)
    hosted.take("deploy", "preview", STACK=STACK)  # a plan without a change
    set_image(cloud, register_image(cloud, "20261129T000000Z"))
    hosted.take("deploy", "deploy", status=1, STACK=STACK)
    assert "violates plan" in capsys.readouterr().out
    assert running(cloud) == first


def test_secrets_are_encrypted_in_the_plan(cloud: MotoCloud, hosted: Runner) -> None:
    stack_steps.must(STACK, "config", "set", "--secret", "adminPassword", "correct-horse-battery")
    hosted.take("deploy", "preview", STACK=STACK)
    text = (hosted.folder / "checkout/build/delivery/plan.json").read_text()
    assert "correct-horse" not in text and "ciphertext" in text
    assert "correct-horse" not in hosted.summary
