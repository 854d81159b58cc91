"""Bake: list the fallbacks. A fallback is a feature of this project that the installed MLflow release cannot support.

Each step of the bake writes its fallbacks to a JSON file, and `record_facts.py` copies the file's entries into
image.json. The server uses MLflow's own code instead of a missing feature. Therefore the bake does not fail, no route
becomes open to more users, and no data is lost.
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
    """The missing feature and the behaviour without the feature, as a short text without a full stop."""
    why: str
    """The name of the changed part of MLflow that causes the fallback."""


def record(step: str, found: Iterable[Fallback], file: Path = FILE) -> None:
    """In the JSON file, replace the earlier entries of the bake step `step` with `found`, and print each new entry."""
    known = json.loads(file.read_text()) if file.exists() else {}
    known[step] = [asdict(entry) for entry in found]
    file.write_text(json.dumps(known, indent=1) + "\n")
    for entry in known[step]:
        print(f"fallback: {entry['what']}: {entry['why']}", file=sys.stderr)


def recorded(file: Path = FILE) -> list[dict[str, str]]:
    """The fields `what` and `why` of every fallback, in the order of the bake steps."""
    return [entry for entries in json.loads(file.read_text()).values() for entry in entries] if file.exists() else []
