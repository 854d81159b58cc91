"""The record of an image: its image.json, stored in Systems Manager.

Tags hold the facts that a launch needs. The rest (packages, migrations, tables) is packed into a few standard
parameters of 4 KiB, which cost nothing: /mlflow-ami/facts/<image version>/<part>-of-<parts>. So two images can be
compared from any machine.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mypy_boto3_ssm import SSMClient

BUILDS = Path(__file__).resolve().parents[2] / "build" / "bake"
ROOT = "/mlflow-ami/facts"
PART = 4000
"""Characters in a parameter; a standard one holds 4096."""
AT_ONCE = 10
"""Maximum number of parameters that DeleteParameters accepts."""


def folder(version: str) -> str:
    """The path of a record's parameters."""
    return f"{ROOT}/{version}"


def write(ssm: SSMClient, facts: dict[str, Any]) -> None:
    """Store the facts of an image. Idempotent."""
    packed = zlib.compress(json.dumps(facts, separators=(",", ":")).encode(), 9)
    text = base64.b64encode(packed).decode()
    parts = [text[start : start + PART] for start in range(0, len(text), PART)]
    for number, part in enumerate(parts, start=1):
        ssm.put_parameter(
            Name=f"{folder(facts['image_version'])}/{number}-of-{len(parts)}",
            Description="mlflow-ami: packed facts of an image; scripts/images.py show reads them",
            Type="String",
            Value=part,
            Overwrite=True,
        )


def reserve(ssm: SSMClient, version: str, bake_id: str) -> None:
    """Store a parameter that marks the image as being baked; `release` deletes it.

    A bake calls this before Packer starts: without ssm:PutParameter it would fail at its end. Raises ClientError, with
    the code ParameterAlreadyExists if another bake has the version.
    """
    ssm.put_parameter(
        Name=f"{folder(version)}/baking",
        Description="mlflow-ami: this image is being baked; the parameter can be deleted when no bake runs",
        Type="String",
        Value=bake_id,
    )


def release(ssm: SSMClient, version: str) -> None:
    """Delete the parameter of `reserve`. Idempotent."""
    ssm.delete_parameters(Names=[f"{folder(version)}/baking"])


def reserved(ssm: SSMClient) -> dict[str, str]:
    """The image versions that `reserve` stored and `release` did not delete, each with the ID of its bake."""
    pages = ssm.get_paginator("get_parameters_by_path").paginate(Path=ROOT, Recursive=True)
    found = {each["Name"]: each["Value"] for page in pages for each in page["Parameters"]}
    return {name.split("/")[-2]: value for name, value in found.items() if name.endswith("/baking")}


def parts_of(ssm: SSMClient, version: str) -> dict[str, str]:
    """The parameters of a record: name → value."""
    pages = ssm.get_paginator("get_parameters_by_path").paginate(Path=folder(version))
    return {each["Name"]: each["Value"] for page in pages for each in page["Parameters"]}


def read(ssm: SSMClient, version: str) -> dict[str, Any] | None:
    """The facts of an image: of its record, else of its bake on this machine; None if neither exists completely."""
    numbered = {}
    for name, value in parts_of(ssm, version).items():
        if found := re.fullmatch(r".*/(\d+)-of-(\d+)", name):
            numbered[int(found[1]), int(found[2])] = value
    count = max((of for _, of in numbered), default=0)
    if count and all((number, count) in numbered for number in range(1, count + 1)):
        try:
            text = "".join(numbered[number, count] for number in range(1, count + 1))
            return dict(json.loads(zlib.decompress(base64.b64decode(text, validate=True))))
        except (ValueError, binascii.Error, zlib.error):
            return None
    baked = build(version)
    return dict(json.loads((baked / "facts.json").read_text(encoding="utf-8"))) if baked else None


def delete(ssm: SSMClient, version: str) -> list[str]:
    """Delete a record; returns the names of its parameters. Idempotent."""
    names = sorted(parts_of(ssm, version))
    for start in range(0, len(names), AT_ONCE):
        ssm.delete_parameters(Names=names[start : start + AT_ONCE])
    return names


def build(version: str) -> Path | None:
    """The folder of the image's bake on this machine, with its log; None if it was baked elsewhere or the folder was
    deleted."""
    for path in BUILDS.glob("*/facts.json"):
        try:
            if json.loads(path.read_text(encoding="utf-8")).get("image_version") == version:
                return path.parent
        except (OSError, ValueError):
            continue
    return None
