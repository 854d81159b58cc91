"""List the migrations of an installed MLflow in order, from the migration files and without importing MLflow.

Importing MLflow takes seconds; reading the files takes milliseconds. Before the flip, the database step compares the
migration head in image.json with the head that MLflow returns (`schema.change.check_head`). If the heads differ, the
step fails.
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
    """Return the migrations, from the first to the head, of the MLflow that is installed for the interpreter `python`.

    Raises ValueError if MLflow is not installed, or if the migrations have more than one head."""
    folders = list(python.parent.parent.glob(VERSIONS))
    if not folders:
        raise ValueError(f"MLflow is not installed for the interpreter {python}: {VERSIONS} does not exist")
    return chain(path.read_text() for path in folders[0].glob("*.py") if path.name != "__init__.py")


def chain(sources: Iterable[str]) -> tuple[str, ...]:
    """Sort the migrations, so that each one follows its predecessors. Parallel branches are sorted by their names.
    Raises ValueError if there is not exactly one first migration and one head."""
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
            f"the migrations must have exactly one first and one head: first {sorted(first) or 'none'}, "
            f"heads {sorted(heads) or 'none'}, missing predecessors {sorted(unknown) or 'none'}"
        )
    sorter = TopologicalSorter({revision: sorted(follows[revision]) for revision in sorted(follows)})
    return tuple(sorter.static_order())
