"""Write outputs, annotations and the job's summary for GitHub Actions, and read the event of the workflow.

Outside GitHub Actions, where GITHUB_OUTPUT and similar variables are not set, all output goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

SUMMARY_LIMIT = 1_000_000
"""Maximum number of characters. GitHub accepts a summary of up to 1 MiB per step, and drops a larger summary."""


def output(**values: object) -> None:
    """Set outputs of the step. None and False become an empty text, which counts as false in a condition `if:`."""
    for name, value in values.items():
        text = "" if value is None or value is False else str(value)
        if "\n" in text:
            raise ValueError(f"the output {name} has more than one line")
        append("GITHUB_OUTPUT", f"{name}={text}\n")


def summary(markdown: str) -> None:
    """Add text to the job's summary page on GitHub."""
    append("GITHUB_STEP_SUMMARY", shorten(markdown, SUMMARY_LIMIT) + "\n")


def annotate(level: str, text: str, file: str = "", line: int = 0) -> None:
    """Print an error, warning or notice. If `file` and `line` are known, GitHub shows the message at this line."""
    if os.environ.get("GITHUB_ACTIONS") != "true":
        print(f"delivery: {text}" if level == "error" else f"delivery: {level}: {text}", file=sys.stderr, flush=True)
        return
    place = ",".join([f"file={escape(file, ',:')}"] * bool(file) + [f"line={line}"] * bool(line))
    print(f"::{level} {place}::{escape(text)}" if place else f"::{level}::{escape(text)}", flush=True)


def escape(text: str, more: str = "") -> str:
    """Text for a workflow command. Percent signs, line ends and the characters in `more` are escaped."""
    for character in "%\r\n" + more:
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def fenced(text: str, language: str = "text") -> str:
    """A fenced code block in Markdown, so that GitHub shows the text unchanged."""
    return f"````{language}\n{text.strip()}\n````"


def shorten(text: str, limit: int) -> str:
    """If the text is too long, remove the middle. The end of the text stays, because the totals are at the end."""
    cut = "\n[…]\n"
    half = (limit - len(cut)) // 2
    return text if len(text) <= limit else text[:half] + cut + text[-half:]


def pull_request() -> int | None:
    """The number of the pull request for which the workflow runs, or None if there is no pull request."""
    event = os.environ.get("GITHUB_EVENT_PATH")
    found = json.loads(Path(event).read_text(encoding="utf-8")).get("pull_request") if event else None
    return int(found["number"]) if found else None


def run_address() -> str:
    """The URL of this workflow run's page, or an empty text outside GitHub Actions."""
    names = ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_RUN_ID")
    server, repository, run = (os.environ.get(name, "") for name in names)
    return f"{server}/{repository}/actions/runs/{run}" if server and repository and run else ""


def append(variable: str, text: str) -> None:
    if path := os.environ.get(variable):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)
    else:
        print(text, end="", file=sys.stderr, flush=True)
