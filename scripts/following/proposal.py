"""The patch that follow.py proposes: routes sorted, and sources accepted as compared, in the bake's two lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

HOST = Path("provisioning/rootfs/usr/lib/mlflow-host/mlflow_host")
ROUTES = HOST / "bake/reader_routes.py"
COMPARED = HOST / "server/fast_path/compatibility.py"

READING_NAMES = re.compile(r"(search|list|get|query|calculate)\b.*|batchGet\w*|.*[-/]search|.*-infos?", re.IGNORECASE)
"""The last part of the path of a POST route that probably reads. A person decides, with the handler's source on the
page."""


class ProposalError(Exception):
    """The lists do not have the expected form, so that no patch can be made; the text names them."""


def reads(path: str) -> bool:
    """Whether a POST route probably only reads, by its path. With a variable part in its path it counts as writing:
    nginx's map of reading routes has no patterns for those."""
    return "<" not in path and bool(READING_NAMES.fullmatch(path.rsplit("/", 1)[-1]))


def pattern(path: str) -> str:
    """A route's path as a line of the lists, which are verbose regular expressions."""
    literal = re.sub(r"<[^>]+>", "<>", path)
    escaped = re.escape(literal).replace(re.escape("<>"), "<[^>]+>")
    return re.sub(r"^/(ajax\\-)?api/", "/(ajax-)?api/", escaped).replace("\\-", "-")


def sort_routes(text: str, posts: Iterable[str], version: str) -> str:
    """The source of reader_routes.py with these paths in one of the lists. Raises ProposalError."""
    posts = list(posts)
    for name, wanted in (("READING_POSTS", True), ("WRITING_POSTS", False)):
        patterns = sorted({pattern(path) for path in posts if reads(path) is wanted})
        if not patterns:
            continue
        found = re.search(
            rf"^{name} = re\.compile\(\n    r\"\"\"\(\n.*?(?=^    \)\"\"\",$)", text, re.DOTALL | re.MULTILINE
        )
        if not found:
            raise ProposalError(f"{ROUTES} has no list {name}, to which routes could be added")
        lines = [f"    | {patterns[0]}  # since {version}", *(f"    | {each}" for each in patterns[1:])]
        text = text[: found.end()] + "\n".join(lines) + "\n" + text[found.end() :]
    return text


def accept_sources(text: str, hashes: Mapping[str, str]) -> str:
    """The source of compatibility.py with these hashes among the compared ones. Raises ProposalError."""
    for name, found in hashes.items():
        text, count = re.subn(
            rf'^(    "{re.escape(name)}": \()([^)]*)(\),)$',
            lambda line, found=found: f'{line[1]}{line[2].rstrip(",")}, "{found}"{line[3]}',  # type: ignore[misc]
            text,
            count=1,
            flags=re.MULTILINE,
        )
        if not count:
            raise ProposalError(f"{COMPARED} has no line for {name}, to which a hash could be added")
    return text
