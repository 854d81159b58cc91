"""What the README says can be checked without a machine: settings, policy, commands, links."""

import json
import re
import subprocess
import sys

import pytest
import yaml
from servers import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def test_configuration_table_is_the_schema() -> None:
    schema = yaml.safe_load((REPOSITORY / "infra" / "Pulumi.yaml").read_text())["config"]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", README, re.MULTILINE)
    expected = []
    for name, entry in schema.items():
        description = " ".join(entry["description"].split())
        default = entry["default"]
        if description.startswith("Required. "):
            shown = "**required**"
        elif default in ("", []):
            shown = ""
        else:
            shown = f"`{json.dumps(default) if isinstance(default, bool) else default}`"
        expected.append((name, shown, description.removeprefix("Required. ")))
    assert rows == expected


def test_policy_is_a_policy() -> None:
    [policy] = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    for statement in json.loads(policy)["Statement"]:
        assert statement["Effect"] == "Allow"
        actions = statement["Action"]
        assert actions == sorted(set(actions)), "keep the actions sorted, each once"
        assert all(re.fullmatch(r"[a-z0-9]+:[A-Za-z]+\*?", action) for action in actions)


def test_costs_add_up() -> None:
    costs = [float(each) for each in re.findall(r"^\| [^|*]+ \| [\d.]+ / [^|]+ \| ([\d.]+) \|$", README, re.MULTILINE)]
    [total] = re.findall(r"^\| \*\*fixed\*\* \| \| \*\*([\d.]+)\*\* \|$", README, re.MULTILINE)
    assert len(costs) >= 4 and sum(costs) == pytest.approx(float(total))


def test_files_and_make_targets_it_names_exist() -> None:
    named = set(re.findall(r"scripts/[\w/]+\.py", README)) | set(re.findall(r"\]\(([\w/]+)\)", README))
    assert named and [each for each in sorted(named) if not (REPOSITORY / each).exists()] == []
    targets = set(re.findall(r"\bmake ([a-z][a-z-]+)", README))
    known = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert targets and targets <= known


@pytest.mark.parametrize("program", ["bake.py", "rehearse.py", "connect.py", "demo.py", "drill.py"])
def test_options_it_names_exist(program: str) -> None:
    help_text = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / program), "--help"], capture_output=True, text=True, check=True
    ).stdout
    for arguments in re.findall(rf"scripts/{program} ([^\n`]*)", README):
        for option in re.findall(r"--[a-z-]+", arguments):
            assert option in help_text or f"{program} up" in f"{program} {arguments}"
