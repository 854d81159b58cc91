"""Check the READMEs without a machine: settings, policy, costs, commands and links."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.servers import REPOSITORY

PAGES = {
    path: path.read_text()
    for pattern in ("*.md", "*/README.md", "*/*/README.md")
    for path in sorted(REPOSITORY.glob(pattern))
    if "build" not in path.parts and ".venv" not in path.parts
}
README = "\n".join(PAGES.values())


def test_policy_is_valid_json_with_statements() -> None:
    [policy] = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    for statement in json.loads(policy)["Statement"]:
        assert statement["Effect"] == "Allow"
        actions = statement["Action"]
        assert actions == sorted(set(actions)), "keep the actions sorted, each once"
        assert all(re.fullmatch(r"[a-z0-9]+:[A-Za-z]+\*?", action) for action in actions)


def test_table_of_costs_has_the_right_total() -> None:
    costs = [float(each) for each in re.findall(r"^\| [^|*]+ \| [\d.]+ / [^|]+ \| ([\d.]+) \|$", README, re.MULTILINE)]
    [total] = re.findall(r"^\| \*\*fixed\*\* \| \| \*\*([\d.]+)\*\* \|$", README, re.MULTILINE)
    assert len(costs) >= 4 and sum(costs) == pytest.approx(float(total))


def test_named_files_and_make_targets_exist() -> None:
    named = set(re.findall(r"scripts/[\w/]+\.py", README))
    assert named and [each for each in sorted(named) if not (REPOSITORY / each).exists()] == []
    targets = set(re.findall(r"\bmake ([a-z][a-z-]+)", README))
    known = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert targets and targets <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if re.match(r"[a-z]+://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}, target


def test_the_first_page_fits_four_screens() -> None:
    assert len(PAGES[REPOSITORY / "README.md"].splitlines()) <= 170


@pytest.mark.long
@pytest.mark.parametrize("program", ["bake.py", "rehearse.py", "connect.py", "demo.py", "drill.py"])
def test_named_options_exist(program: str) -> None:
    help_text = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / program), "--help"], capture_output=True, text=True, check=True
    ).stdout
    for arguments in re.findall(rf"scripts/{program} ([^\n`]*)", README):
        for option in re.findall(r"--[a-z-]+", arguments):
            assert option in help_text or f"{program} up" in f"{program} {arguments}"
