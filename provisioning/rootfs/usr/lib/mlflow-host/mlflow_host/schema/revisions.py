"""The migrations that a release of MLflow knows, in order, read from its files.

Importing MLflow takes seconds; these files are a few hundred kilobytes. `mlflow_host.schema.release` asks MLflow
itself for its head before anything is changed and refuses to go on when the two disagree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

VERSIONS = "lib/python*/site-packages/mlflow/store/db_migrations/versions"

_REVISION = re.compile(r'^revision\s*(?::[^=]+)?=\s*["\'](\w+)["\']', re.MULTILINE)
_DOWN = re.compile(r'^down_revision\s*(?::[^=]+)?=\s*(?:["\'](\w+)["\']|None)', re.MULTILINE)


def known_revisions(python: Path) -> tuple[str, ...]:
    """From the first migration to the head, of the MLflow in the environment whose interpreter is `python`.

    Raises ValueError where there is none, or where its chain is not a single line."""
    folders = list(python.parent.parent.glob(VERSIONS))
    if not folders:
        raise ValueError(f"no MLflow beside {python}: looked for {VERSIONS}")
    return chain(path.read_text() for path in folders[0].glob("*.py") if path.name != "__init__.py")


def chain(sources: Iterable[str]) -> tuple[str, ...]:
    follows: dict[str | None, str] = {}
    for source in sources:
        revision, down = _REVISION.search(source), _DOWN.search(source)
        if not revision or not down:
            continue
        if down[1] in follows:
            raise ValueError(f"the migrations {follows[down[1]]} and {revision[1]} both follow {down[1]}")
        follows[down[1]] = revision[1]
    ordered: list[str] = []
    step: str | None = None
    while step in follows:
        step = follows.pop(step)
        ordered.append(step)
    if follows or not ordered:
        raise ValueError(f"the migrations do not form one line: {len(follows)} are not reached from the first")
    return tuple(ordered)
