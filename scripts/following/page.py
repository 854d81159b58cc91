"""The report page of follow.py."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.following import proposal

LAST_LINES = 25


@dataclass(frozen=True)
class Step:
    """One command of the test. `status` is the command's exit status, or None if the command was skipped. If the
    command was skipped, `why` is the reason."""

    name: str
    command: str
    status: int | None
    seconds: float
    log: Path | None
    why: str = ""

    @property
    def result(self) -> str:
        return (
            f"left out: {self.why}" if self.status is None else "passed" if not self.status else f"exit {self.status}"
        )


def page(
    before: Mapping[str, Any], after: Mapping[str, Any], steps: Sequence[Step], patch: str, notes: list[str]
) -> str:
    """The report page in Markdown: fallbacks, new features, the steps, and the proposed patch with the evidence for
    each part."""
    new_posts = {path: text for path, text in after["posts"].items() if path not in before["posts"]}
    gone_posts = sorted(before["posts"].keys() - after["posts"].keys())
    migrations = {key: line for key, line in after["migrations"].items() if key not in before["migrations"]}
    unsorted = {each["path"] for each in after["unsorted"]}
    lines = [f"# MLflow {before['version']} → {after['version']}", ""]
    lines += [*notes, *([""] if notes else [])]
    lines += ["## Fallbacks before the proposal", ""]
    lines += [f"- {each['what']}: {each['why']}" for each in after["fallbacks"]] or ["Nothing."]
    if after["refused"]:
        lines.append(f"- **The server process does not start**: {after['refused']}")
    lines += ["", "## What is new", ""]
    lines += [f"- migration `{key}`: {line}" for key, line in migrations.items()]
    lines += [f"- POST `{path}`" + (" (unsorted)" if path in unsorted else "") for path in sorted(new_posts)]
    lines += [f"- gone: POST `{path}`" for path in gone_posts]
    lines += ["", "## What was run", "", "| step | result | seconds | log |", "|---|---|---|---|"]
    lines += [
        f"| {each.name} | {each.result} | {each.seconds:.0f} | {each.log.name if each.log else ''} |" for each in steps
    ]
    for step in steps:
        if step.log and (step.status or step.name in SHOWN_ALWAYS):
            last = step.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
            lines += ["", f"`{step.command}`:", "", *fenced(last, "text")]
    lines += ["", "## The proposal", ""]
    lines += fenced(patch.splitlines(), "diff") if patch else ["No change of the lists is proposed."]
    if unsorted:
        lines += ["", "## Evidence: the handlers of the unsorted routes"]
        for path in sorted(unsorted):
            kind = "reading" if proposal.reads(path) else "writing"
            text = after["posts"].get(path, "not a POST route")
            lines += ["", f"POST `{path}`, proposed as {kind}:", "", *fenced(text.splitlines(), "python")]
    if after["different"]:
        lines += [
            "",
            f"## Evidence: sources that differ from all tested releases, as a diff from {before['version']}",
        ]
        for name in after["different"]:
            old, new = (each["sources"][name]["text"].splitlines() for each in (before, after))
            changed = list(difflib.unified_diff(old, new, before["version"], after["version"], lineterm=""))
            lines += ["", f"`{name}`:", "", *fenced(changed or ["the same text as before"], "diff")]
    return "\n".join(lines) + "\n"


SHOWN_ALWAYS = ("drill", "bench", "comparison")
"""For these steps, the page always contains the last lines of the log, even if the step passed."""


def fenced(lines: list[str], language: str) -> list[str]:
    return [f"````{language}", *lines, "````"]


def read_facts(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(path.read_text())
    return facts
