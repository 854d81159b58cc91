"""The report of a machine after its `database` step: the data volume, its schema, and the image.

The machine writes it to the stack's parameter `in-service`, and the stack's preview reads it. Older and newer images
and stacks read it too: only ever add keys.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

FORMAT = 1


@dataclass(frozen=True)
class InService:
    volume: str
    """ID of the data volume."""
    image_version: str
    mlflow_version: str
    migration_head: str
    migration_count: int
    postgresql_major: int
    at: str
    """Time at which the step finished, such as 2026-11-29T10:00:00Z."""
    format: int = FORMAT


def dump(report: InService) -> str:
    return json.dumps(dataclasses.asdict(report))


def parse(text: str) -> InService | None:
    """The report in a parameter's text; None if no machine has written it yet. Keys of later formats are ignored."""
    try:
        raw = json.loads(text)
        fields = [field for field in dataclasses.fields(InService) if field.name != "format"]
        kinds = {field.name: {"str": str, "int": int}[str(field.type)] for field in fields}
        return InService(**{name: kind(raw[name]) for name, kind in kinds.items()})
    except (ValueError, TypeError, KeyError):
        return None
