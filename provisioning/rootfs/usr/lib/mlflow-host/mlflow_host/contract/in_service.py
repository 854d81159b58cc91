"""The in-service report names the data volume, the database schema and the image after the boot step `database`.

The machine writes the report to the stack's SSM parameter `in-service`, and `pulumi preview` reads it. Older and newer
images and stacks also read the report, so its keys must never be removed or renamed.
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
    """Time of the report, such as 2026-11-29T10:00:00Z."""
    format: int = FORMAT


def dump(report: InService) -> str:
    return json.dumps(dataclasses.asdict(report))


def parse(text: str) -> InService | None:
    """The report in the text of a parameter, or None if the text is not a report. Unknown keys are ignored."""
    try:
        raw = json.loads(text)
        fields = [field for field in dataclasses.fields(InService) if field.name != "format"]
        kinds = {field.name: {"str": str, "int": int}[str(field.type)] for field in fields}
        return InService(**{name: kind(raw[name]) for name, kind in kinds.items()})
    except (ValueError, TypeError, KeyError):
        return None
