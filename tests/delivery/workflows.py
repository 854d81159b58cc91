"""Load the workflows as data, and simulate a GitHub runner's environment for their steps."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import delivery

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))


class Loader(yaml.SafeLoader):
    """Parse YAML 1.2 like GitHub: `on` is a word, not a boolean."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load(path: Path) -> dict[str, Any]:
    return dict(yaml.load(path.read_text(encoding="utf-8"), Loader))


WORKFLOWS = {path.stem: load(path) for path in FILES}


def jobs() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (workflow, name of the job, job) for each job."""
    for workflow, document in WORKFLOWS.items():
        for name, job in document["jobs"].items():
            yield workflow, name, job


def steps() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield (workflow, step, environment variables of the step) for each step."""
    for workflow, _, job in jobs():
        for step in job["steps"]:
            yield workflow, step, WORKFLOWS[workflow].get("env", {}) | job.get("env", {}) | step.get("env", {})


def words(line: str, variables: Mapping[str, str]) -> list[str]:
    """Split a `run:` line into words like the shell. A variable is replaced only if the variable is a whole word."""
    return [variables[word[1:]] if re.fullmatch(r"\$\w+", word) else word for word in shlex.split(line)]


def line_of(workflow: str, step: str) -> str:
    """Return the first `run:` of a workflow that calls this step of delivery.py."""
    lines = [each["run"] for name, each, _ in steps() if name == workflow and "run" in each]
    return str(next(line for line in lines if f"delivery.py {step} " in line))


@dataclass
class Runner:
    """Run steps like GitHub, with the workflow's command lines and variables, and with GitHub's files."""

    folder: Path

    def take(self, workflow: str, step: str, status: int = 0, **variables: str) -> dict[str, str]:
        """The step's outputs."""
        (self.folder / "output").write_text("")
        line = line_of(workflow, step)
        assert delivery.main(words(line, variables)[line.split().index("scripts/delivery.py") + 1 :]) == status
        return dict(each.split("=", 1) for each in (self.folder / "output").read_text().splitlines())

    @property
    def summary(self) -> str:
        return (self.folder / "summary").read_text()

    def calls(self, tool: str) -> list[str]:
        """Return the calls of a stand-in, oldest first."""
        path = self.folder / f"{tool}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def stand_in(self, tool: str, *answers: tuple[str, int, str]) -> None:
        """Put a program on PATH that records its arguments (newlines as |). `answers` contains tuples (start, exit
        status, text). The response is the first tuple with whose start the arguments begin."""
        cases = "".join(
            f"{shlex.quote(start)}*) cat {shlex.quote(str(self._text(tool, number, text)))}; exit {status};;\n"
            for number, (start, status, text) in enumerate(answers)
        )
        program = self.folder / "bin" / tool
        program.parent.mkdir(exist_ok=True)
        log = shlex.quote(str(self.folder / f"{tool}.calls"))
        program.write_text(
            f'#!/bin/sh\nprintf %s "$*" | tr "\\n" "|" >>{log}; echo >>{log}\ncase "$*" in\n{cases}esac\n'
        )
        program.chmod(0o755)

    def _text(self, tool: str, number: int, text: str) -> Path:
        path = self.folder / f"{tool}.{number}"
        path.write_text(text)
        return path


def runner(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Create a runner with files in `folder`. Stand-ins come first on PATH."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_OUTPUT", str(folder / "output"))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary"))
    monkeypatch.delenv("GITHUB_EVENT_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    (folder / "summary").write_text("")
    return Runner(folder)
