"""Bake: the fallbacks, features that the installed MLflow release does not support, with the reasons.

The steps of the bake record their fallbacks here; `record_facts.py` copies the list into image.json. MLflow's own code
is used instead of each of them, so a fallback does not make the bake fail, open a route or lose data.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = Path("/usr/share/mlflow-host/fallbacks.json")


@dataclass(frozen=True, order=True)
class Fallback:
    what: str
    """The feature, and what happens instead: a short text without a full stop."""
    why: str
    """The difference in MLflow, by name."""


def record(step: str, found: Iterable[Fallback], file: Path = FILE) -> None:
    """Replace what `step` recorded before, and print each entry."""
    known = json.loads(file.read_text()) if file.exists() else {}
    known[step] = [asdict(entry) for entry in found]
    file.write_text(json.dumps(known, indent=1) + "\n")
    for entry in known[step]:
        print(f"fallback: {entry['what']}: {entry['why']}", file=sys.stderr)


def recorded(file: Path = FILE) -> list[dict[str, str]]:
    """All entries, in the order of the steps: `what` and `why` of each."""
    return [entry for entries in json.loads(file.read_text()).values() for entry in entries] if file.exists() else []
