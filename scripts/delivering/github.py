"""Write outputs, the job's summary and annotations for GitHub Actions, and read its event.

Outside GitHub, where GITHUB_OUTPUT and the other variables are not set, all of it goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

SUMMARY_LIMIT = 1_000_000
"""Characters. GitHub accepts a summary of up to 1 MiB per step, and drops a larger one."""


def output(**values: object) -> None:
    """Set outputs of the step; None and False become empty, which is false in an `if:`."""
    for name, value in values.items():
        text = "" if value is None or value is False else str(value)
        if "\n" in text:
            raise ValueError(f"the output {name} has more than one line")
        append("GITHUB_OUTPUT", f"{name}={text}\n")


def summary(markdown: str) -> None:
    """Add text to the job's summary page on GitHub."""
    append("GITHUB_STEP_SUMMARY", shorten(markdown, SUMMARY_LIMIT) + "\n")


def annotate(level: str, text: str, file: str = "", line: int = 0) -> None:
    """Print an error, warning or notice, at a line of a file if the line is known."""
    if os.environ.get("GITHUB_ACTIONS") != "true":
        print(f"delivery: {text}" if level == "error" else f"delivery: {level}: {text}", file=sys.stderr, flush=True)
        return
    place = ",".join([f"file={escape(file, ',:')}"] * bool(file) + [f"line={line}"] * bool(line))
    print(f"::{level} {place}::{escape(text)}" if place else f"::{level}::{escape(text)}", flush=True)


def escape(text: str, more: str = "") -> str:
    """Text of a workflow command: one line, and without commas and colons in a property."""
    for character in "%\r\n" + more:
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def fenced(text: str, language: str = "text") -> str:
    """A block of Markdown in which nothing is interpreted."""
    return f"````{language}\n{text.strip()}\n````"


def shorten(text: str, limit: int) -> str:
    """The text without its middle where it is too long, so that its end, with the totals, is kept."""
    cut = "\n[…]\n"
    half = (limit - len(cut)) // 2
    return text if len(text) <= limit else text[:half] + cut + text[-half:]


def pull_request() -> int | None:
    """The number of the pull request that the workflow runs for; None for other events and outside GitHub."""
    event = os.environ.get("GITHUB_EVENT_PATH")
    found = json.loads(Path(event).read_text(encoding="utf-8")).get("pull_request") if event else None
    return int(found["number"]) if found else None


def run_address() -> str:
    """The address of this run's page; empty outside GitHub."""
    names = ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_RUN_ID")
    server, repository, run = (os.environ.get(name, "") for name in names)
    return f"{server}/{repository}/actions/runs/{run}" if server and repository and run else ""


def append(variable: str, text: str) -> None:
    if path := os.environ.get(variable):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)
    else:
        print(text, end="", file=sys.stderr, flush=True)
