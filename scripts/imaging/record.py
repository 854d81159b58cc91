"""The record of an image: its image.json, stored in parameters of AWS Systems Manager.

Tags hold the facts that a launch needs. All facts, with packages, migrations and tables, are compressed into a few
standard parameters of 4 KiB, which are free of charge: /mlflow-ami/facts/<image version>/<part>-of-<parts>. These
records make it possible to compare two images from any machine.
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
"""Maximum number of a record's characters in one parameter. A standard parameter holds at most 4096 characters."""
AT_ONCE = 10
"""Maximum number of parameters that DeleteParameters accepts."""


def folder(version: str) -> str:
    """Return the path of a record's parameters."""
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
    """Store a parameter that marks the image as being baked; `release` deletes the parameter.

    A bake calls this function before Packer starts. If the permission ssm:PutParameter is missing, the bake thus fails
    before Packer starts. Raises ClientError; the code is ParameterAlreadyExists if another bake has the version.
    """
    ssm.put_parameter(
        Name=f"{folder(version)}/baking",
        Description="mlflow-ami: this image is being baked; the parameter can be deleted when no bake runs",
        Type="String",
        Value=bake_id,
    )


def release(ssm: SSMClient, version: str) -> None:
    """Delete the parameter that `reserve` stored. Idempotent."""
    ssm.delete_parameters(Names=[f"{folder(version)}/baking"])


def reserved(ssm: SSMClient) -> dict[str, str]:
    """Return a dict from each reserved image version to the ID of the bake that reserved the version."""
    pages = ssm.get_paginator("get_parameters_by_path").paginate(Path=ROOT, Recursive=True)
    found = {each["Name"]: each["Value"] for page in pages for each in page["Parameters"]}
    return {name.split("/")[-2]: value for name, value in found.items() if name.endswith("/baking")}


def parts_of(ssm: SSMClient, version: str) -> dict[str, str]:
    """Return the parameters of a record, as a dict from name to value."""
    pages = ssm.get_paginator("get_parameters_by_path").paginate(Path=folder(version))
    return {each["Name"]: each["Value"] for page in pages for each in page["Parameters"]}


def read(ssm: SSMClient, version: str) -> dict[str, Any] | None:
    """Return the facts of an image from its record. If the record is missing or incomplete, return the facts from the
    bake's folder on this machine. Returns None if the record is damaged, or if record and folder are missing."""
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
    """Delete a record and return the names of its parameters. Idempotent."""
    names = sorted(parts_of(ssm, version))
    for start in range(0, len(names), AT_ONCE):
        ssm.delete_parameters(Names=names[start : start + AT_ONCE])
    return names


def build(version: str) -> Path | None:
    """Return the folder of the image's bake on this machine, which contains the log. Returns None if the image was
    baked on another machine or the folder was deleted."""
    for path in BUILDS.glob("*/facts.json"):
        try:
            if json.loads(path.read_text(encoding="utf-8")).get("image_version") == version:
                return path.parent
        except (OSError, ValueError):
            continue
    return None
