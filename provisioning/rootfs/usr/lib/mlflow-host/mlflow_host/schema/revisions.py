"""The migrations of an installed MLflow, in order, read from its files without importing it.

Importing MLflow takes seconds; reading the files takes milliseconds. The database step compares the result with the
head that MLflow itself reports (`schema.release`) before it changes anything, and fails when they differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

VERSIONS = "lib/python*/site-packages/mlflow/store/db_migrations/versions"

_REVISION = re.compile(r'^revision\s*(?::[^=]+)?=\s*["\'](\w+)["\']', re.MULTILINE)
_DOWN = re.compile(r'^down_revision\s*(?::[^=]+)?=\s*(["\']\w+["\']|None|\([^)]*\))', re.MULTILINE)


def known_revisions(python: Path) -> tuple[str, ...]:
    """The migrations from first to head of the MLflow in the environment of the interpreter `python`.

    Raises ValueError without MLflow, or when the migrations have several heads."""
    folders = list(python.parent.parent.glob(VERSIONS))
    if not folders:
        raise ValueError(f"no MLflow in the environment of {python}: {VERSIONS} does not exist")
    return chain(path.read_text() for path in folders[0].glob("*.py") if path.name != "__init__.py")


def chain(sources: Iterable[str]) -> tuple[str, ...]:
    """The migrations sorted, each after its predecessors. Branches that a later migration merges are in the order of
    their names. Raises ValueError unless there is one first migration and one head."""
    follows: dict[str, set[str]] = {}
    for source in sources:
        revision, down = _REVISION.search(source), _DOWN.search(source)
        if revision and down:
            follows[revision[1]] = set(re.findall(r"\w+", down[1])) - {"None"}
    first = [revision for revision, before in follows.items() if not before]
    heads = follows.keys() - set().union(*follows.values())
    unknown = set().union(*follows.values()) - follows.keys()
    if len(first) != 1 or len(heads) != 1 or unknown:
        raise ValueError(
            f"the migrations need one first and one head: first {sorted(first) or 'none'}, "
            f"heads {sorted(heads) or 'none'}, unknown predecessors {sorted(unknown) or 'none'}"
        )
    sorter = TopologicalSorter({revision: sorted(follows[revision]) for revision in sorted(follows)})
    return tuple(sorter.static_order())
