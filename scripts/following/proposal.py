"""Make the patch that follow.py proposes. The patch adds new routes to one list, and hashes of tested MLflow sources to
another list."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

HOST = Path("provisioning/rootfs/usr/lib/mlflow-host/mlflow_host")
ROUTES = HOST / "bake/reader_routes.py"
COMPARED = HOST / "server/fast_path/compatibility.py"

READING_NAMES = re.compile(r"(search|list|get|query|calculate)\b.*|batchGet\w*|.*[-/]search|.*-infos?", re.IGNORECASE)
"""A pattern for the last part of a POST route's path. If the pattern matches, the route probably only reads data. A
person checks each route with the handler's source code on the report page."""


class ProposalError(Exception):
    """A list does not have the expected form, so no patch can be made. The text names the list."""


def reads(path: str) -> bool:
    """Whether the path of a POST route shows that the route probably only reads data. A path with a variable part
    counts as writing, because nginx's map of reading routes has no patterns for variable parts."""
    return "<" not in path and bool(READING_NAMES.fullmatch(path.rsplit("/", 1)[-1]))


def pattern(path: str) -> str:
    """The line for a route's path in the lists of reader_routes.py, which are verbose regular expressions."""
    literal = re.sub(r"<[^>]+>", "<>", path)
    escaped = re.escape(literal).replace(re.escape("<>"), "<[^>]+>")
    return re.sub(r"^/(ajax\\-)?api/", "/(ajax-)?api/", escaped).replace("\\-", "-")


def sort_routes(text: str, posts: Iterable[str], version: str) -> str:
    """The source text of reader_routes.py, with the paths `posts` added to the reading or writing list. Raises
    ProposalError."""
    posts = list(posts)
    for name, wanted in (("READING_POSTS", True), ("WRITING_POSTS", False)):
        patterns = sorted({pattern(path) for path in posts if reads(path) is wanted})
        if not patterns:
            continue
        found = re.search(
            rf"^{name} = re\.compile\(\n    r\"\"\"\(\n.*?(?=^    \)\"\"\",$)", text, re.DOTALL | re.MULTILINE
        )
        if not found:
            raise ProposalError(f"{ROUTES} has no list {name}, so routes cannot be added")
        lines = [f"    | {patterns[0]}  # since {version}", *(f"    | {each}" for each in patterns[1:])]
        text = text[: found.end()] + "\n".join(lines) + "\n" + text[found.end() :]
    return text


def accept_sources(text: str, hashes: Mapping[str, str]) -> str:
    """The source text of compatibility.py, with `hashes` added to the tested sources. Raises ProposalError."""
    for name, found in hashes.items():
        text, count = re.subn(
            rf'^(    "{re.escape(name)}": \()([^)]*)(\),)$',
            lambda line, found=found: f'{line[1]}{line[2].rstrip(",")}, "{found}"{line[3]}',  # type: ignore[misc]
            text,
            count=1,
            flags=re.MULTILINE,
        )
        if not count:
            raise ProposalError(f"{COMPARED} has no line for {name}, so a hash cannot be added")
    return text
