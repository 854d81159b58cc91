"""scripts/prepare.sh installs the packages that a group of commands needs. The commands for AWS need no packages of the
local cloud."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from scripts.local_cloud.cloud import TOOLS
from tests.support.readme_commands import REPOSITORY

GROUPS = ("aws", "check", "demo", "lint", "bench", "test")


def plan(group: str, folder: Path) -> tuple[set[str], str]:
    """Return the Debian packages and the extras that a group would install on an empty machine. Installs nothing."""
    (folder / "scripts").mkdir(exist_ok=True)
    text = (REPOSITORY / "scripts" / "prepare.sh").read_text()
    head = text[: text.index("\nsay()")]
    shown = head + '\n[ ${#wanted[@]} = 0 ] || printf "%s\\n" "${wanted[@]}"; echo "extras $extras"\n'
    (folder / "scripts" / "plan.sh").write_text(shown)
    done = subprocess.run(["bash", folder / "scripts" / "plan.sh", group], capture_output=True, text=True, check=True)
    *packages, extras = done.stdout.splitlines()
    return set(packages), extras.removeprefix("extras ")


def test_the_local_clouds_tools_are_in_the_demos_packages(tmp_path: Path) -> None:
    packages, extras = plan("demo", tmp_path)
    assert set(TOOLS.values()) - {"mount"} <= packages  # Debian always contains `mount`
    assert "local-cloud" in extras.split(",")


def test_the_bench_gets_the_programs_it_starts(tmp_path: Path) -> None:
    packages, _ = plan("bench", tmp_path)
    assert {"apache2-utils", "postgresql", "nginx-light", "chromium"} <= packages


def test_tests_get_all_packages(tmp_path: Path) -> None:
    everything, _ = plan("test", tmp_path)
    for group in GROUPS:
        assert plan(group, tmp_path)[0] <= everything, group


def test_aws_gets_nothing_of_the_local_cloud(tmp_path: Path) -> None:
    assert plan("aws", tmp_path) == ({"packer", "git"}, "examples")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[\[<>=]", each)[0] for each in project["dependencies"]}
    extras = {re.split(r"[\[<>=]", each)[0] for each in project["optional-dependencies"]["local-cloud"]}
    assert not names & (extras | {"mlflow"})


@pytest.mark.parametrize("group", GROUPS)
def test_extras_exist(group: str, tmp_path: Path) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert set(plan(group, tmp_path)[1].split(",")) <= project["optional-dependencies"].keys()


def test_each_make_target_that_runs_python_is_prepared_or_prints_an_error() -> None:
    """A make target that needs no `prepare-…` target only stops programs, so its script's error sentence is
    sufficient."""
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):(.*?)(?: ##.*)?\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    unprepared = {
        name
        for name, needs, recipe in targets
        if re.search(r"\$\((PYTHON|PYTEST)\)|\.venv/bin", recipe) and "prepare" not in needs
    }
    assert unprepared <= {
        "test-on-machines",
        "test-without-machines",
        "test-security-on-machines",
        "test-security-without-machines",
        "test-tools-quick",
    }


def test_python_versions_agree_everywhere() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    assert "OLDEST = (3, 11)" in (REPOSITORY / "scripts" / "enter_venv.py").read_text()
    assert "(3, 11)" in (REPOSITORY / "scripts" / "prepare.sh").read_text()
