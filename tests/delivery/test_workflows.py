"""Tests of the workflows: permissions, pinned actions, and the commands and arguments of each `run:` line."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from scripts import connect, delivery, prepare_tools
from scripts.baking import source_images
from scripts.rehearsal import tools
from tests.delivery.workflows import FILES, ROOT, WORKFLOWS, jobs, steps, words

ACTIONLINT = shutil.which("actionlint") or shutil.which("actionlint", path=str(tools.BIN))
WRITES: dict[str, set[str]] = {
    "check": set(),
    "bake": {"id-token"},
    "preview": {"id-token", "pull-requests"},
    "deploy": {"id-token"},
    "drift": {"id-token", "issues"},
    "renew": {"id-token", "contents", "pull-requests"},
}
SAMPLES = {"IMAGE": "ami-0123456789abcdef0", "STACK": "prod", "CHANNEL": "staging", "VERSION": "3.19.0"}


@pytest.mark.tools
@pytest.mark.skipif(ACTIONLINT is None, reason="there is no actionlint: run `make prepare-tools`")
def test_actionlint_finds_nothing_and_would_find_a_mistake(tmp_path: Path) -> None:
    done = subprocess.run([str(ACTIONLINT), "-no-color", *map(str, FILES)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    broken = tmp_path / "broken.yml"
    broken.write_text(FILES[0].read_text().replace("outputs.image", "outputs.immage").replace("runs-on", "run-on"))
    assert subprocess.run([str(ACTIONLINT), str(broken)], capture_output=True).returncode == 1


def test_bake_begins_with_an_image_on_canonicals_ubuntu() -> None:
    """The repository's variables for the source image are empty at first, so bake.py uses Canonical's image."""
    [(name, job)] = WORKFLOWS["bake"]["jobs"].items()
    assert (name, "needs" in job) == ("bake", False)
    lines = [step["run"] for step in job["steps"] if step.get("run", "").startswith("scripts/")]
    assert lines[0] == 'scripts/delivery.py bake --source-ami "$SOURCE_AMI" --source-owner "$SOURCE_OWNER"'
    assert job["env"]["SOURCE_AMI"] == "${{ vars.SOURCE_AMI }}"
    assert "ubuntu-noble-24.04-amd64-server" in source_images.SOURCE_NAMES["x86_64"]
    assert source_images.SOURCE_OWNERS == ("099720109477",)


def test_there_is_one_workflow_for_each_purpose() -> None:
    assert set(WORKFLOWS) == set(WRITES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit_with_their_version(path: Path) -> None:
    uses = re.findall(r"uses: (.*)", path.read_text())
    assert uses
    assert [each for each in uses if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", each)] == []


def test_an_action_has_one_version_in_all_workflows() -> None:
    pins = {pin for path in FILES for pin in re.findall(r"uses: (.*)", path.read_text())}
    assert len(pins) == len({pin.split("@")[0] for pin in pins})


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_token_has_only_the_write_permissions_that_the_workflow_uses(workflow: str) -> None:
    document = WORKFLOWS[workflow]
    assert {name for name, right in document["permissions"].items() if right == "write"} == WRITES[workflow]
    assert document["permissions"].keys() <= WRITES[workflow] | {"contents"}
    assert not any("permissions" in job for name, _, job in jobs() if name == workflow)
    assert document["concurrency"]["group"].startswith(workflow)


def test_no_static_key_is_used() -> None:
    """The passphrase of Pulumi's state is the only secret. Only jobs with a GitHub environment use the passphrase."""
    for path in FILES:
        secrets = re.findall(r"secrets\.(\w+)", path.read_text())
        assert set(secrets) <= {"PULUMI_CONFIG_PASSPHRASE"}
        assert not re.search(r"AKIA|aws-access-key-id|aws-secret|AWS_ACCESS_KEY|AWS_SECRET", path.read_text())
    for _, name, job in jobs():
        assert ("secrets." not in str(job)) or job["environment"] in ("preview", "plan", "production"), name
    assert all("secrets." not in str(document.get("env")) for document in WORKFLOWS.values())


def test_each_role_is_taken_where_it_is_trusted() -> None:
    """tests/delivery/test_roles.py checks which jobs the roles trust."""
    roles = {
        (workflow, name, step["with"]["role-to-assume"], job.get("environment"))
        for workflow, name, job in jobs()
        for step in job["steps"]
        if "configure-aws-credentials" in step.get("uses", "")
    }
    assert roles == {
        ("bake", "bake", "${{ vars.BAKE_ROLE }}", None),
        ("preview", "preview", "${{ vars.PREVIEW_ROLE }}", "preview"),
        ("deploy", "plan", "${{ vars.PREVIEW_ROLE }}", "plan"),
        ("deploy", "deploy", "${{ vars.DEPLOY_ROLE }}", "production"),
        ("drift", "drift", "${{ vars.PREVIEW_ROLE }}", "plan"),
        ("renew", "renew", "${{ vars.PREVIEW_ROLE }}", "plan"),
    }
    assert [name for name, document in WORKFLOWS.items() if "pull_request" in str(document["on"])] == [
        "check",
        "preview",
    ]
    assert "pull_request_target" not in "".join(path.read_text() for path in FILES)


def test_each_run_is_a_target_or_a_script_that_takes_its_arguments() -> None:
    lines = [(step["run"], variables) for _, step, variables in steps() if "run" in step]
    assert len(lines) > 15
    for line, variables in lines:
        assert "${{" not in line, "the value of an expression in a line would run as code"
        assert not set(line) & set(";|&><`\n("), line
        given = {name: SAMPLES.get(name, "") for name in variables}
        called = words(line.removeprefix("sudo -E "), given | {"PREVIOUS": SAMPLES["IMAGE"]})
        if called[0] == "make":
            assert re.search(rf"^{called[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
            continue
        assert called[0] == "scripts/delivery.py" and os.access(ROOT / called[0], os.X_OK)
        delivery.parse(called[1:])


def test_variables_in_lines_are_set() -> None:
    for workflow, step, variables in steps():
        assert set(re.findall(r"\$(\w+)", step.get("run", ""))) <= variables.keys(), workflow


def test_outputs_that_are_read_are_written_by_an_earlier_step() -> None:
    for workflow, name, job in jobs():
        earlier: dict[str, set[str]] = {}
        for step in job["steps"]:
            for id, output in re.findall(r"steps\.(\w+)\.outputs\.(\w+)", str(step)):
                assert output in earlier[id], f"{workflow}, {name}: {step}"
            if "id" in step:
                earlier[step["id"]] = outputs(step["run"].split("delivery.py ")[1].split()[0])


def outputs(step: str) -> set[str]:
    """Return the names of the outputs that the function of this delivery.py step sets."""
    for path in (ROOT / "scripts/delivering").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == step:
                calls: Any = [each for each in ast.walk(node) if isinstance(each, ast.Call)]
                return {
                    word.arg for call in calls if ast.unparse(call.func) == "github.output" for word in call.keywords
                }
    raise AssertionError(f"delivery.py has no step {step}")


def test_pulumi_is_the_rehearsed_one() -> None:
    versions = {step["with"]["pulumi-version"] for _, step, _ in steps() if "pulumi/actions" in step.get("uses", "")}
    assert versions == {prepare_tools.version(prepare_tools.PULUMI)}


def test_help_names_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        delivery.parse(["--help"])
    said = capsys.readouterr().out
    taken = {
        step["run"].split("delivery.py ")[1].split()[0] for _, step, _ in steps() if "delivery" in str(step.get("run"))
    }
    assert len(taken) == 11 and all(f"  delivery.py {each} " in said for each in taken)


def test_smoke_takes_the_choice_of_connect() -> None:
    taken = delivery.parse(["smoke", "--stack", "prod"])
    assert (
        (taken.stack, taken.rehearsal) == ("prod", False) == (connect.read_arguments(["--stack", "prod"]).stack, False)
    )
