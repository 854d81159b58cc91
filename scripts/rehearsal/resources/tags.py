"""Convert tags to the formats of the AWS APIs, and update the tags of EC2 resources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scripts.rehearsal.resource_types import Aws


def as_list(tags: Mapping[str, str]) -> list[dict[str, str]]:
    """Convert tags to a list [{"Key": …, "Value": …}] in a stable order."""
    return [{"Key": key, "Value": str(value)} for key, value in sorted(tags.items())]


def as_map(tags: list[dict[str, Any]] | None) -> dict[str, str]:
    """Convert a list of AWS tags to a dictionary."""
    return {each["Key"]: each["Value"] for each in tags or []}


def specification(kind: str, tags: Mapping[str, str] | None) -> list[dict[str, Any]]:
    """Return EC2's TagSpecifications for one resource type. The list is empty if there are no tags."""
    return [{"ResourceType": kind, "Tags": as_list(tags)}] if tags else []


def update_ec2(aws: Aws, id_: str, before: Mapping[str, str] | None, after: Mapping[str, str] | None) -> None:
    """Change the tags of an EC2 resource from `before` to `after`."""
    before, after = before or {}, after or {}
    if gone := before.keys() - after.keys():
        aws.client("ec2").delete_tags(Resources=[id_], Tags=[{"Key": key} for key in sorted(gone)])
    if fresh := {key: value for key, value in after.items() if before.get(key) != value}:
        aws.client("ec2").create_tags(Resources=[id_], Tags=as_list(fresh))
