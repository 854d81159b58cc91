"""Why an image must stay: instances that run it, channels that name it, stacks that can roll back to it.

`pulumi up` tags the image that it launches with the stack's name and data volume. The tag stays when the stack changes
to another image, so the tagged images are those that the stack can roll back to. A stack whose data volume is deleted
does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from scripts.imaging import channels
from scripts.imaging.catalog import STACK, Image, Place, find, tags_of


@dataclass(frozen=True)
class Claims:
    """The users of the images of one region, by which an image must stay."""

    running: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Image ID → the instances that run it, with the names of their stacks."""
    channels: Mapping[str, str] = field(default_factory=dict)
    """Channel → image ID."""
    current: Mapping[str, str] = field(default_factory=dict)
    """Stack → the image of its last `pulumi up`."""
    volumes: Mapping[str, str] = field(default_factory=dict)
    """Stack → its data volume."""
    architectures: Mapping[str, str] = field(default_factory=dict)
    """Image ID → its architecture, for the existing images."""

    def channels_of(self, image: Image) -> list[str]:
        return sorted(name for name, held in self.channels.items() if held == image.id)

    def stacks_of(self, image: Image) -> list[str]:
        """The stacks that ran this image and still exist."""
        tagged = {key.removeprefix(STACK): value for key, value in image.tags.items() if key.startswith(STACK)}
        return sorted(stack for stack, volume in tagged.items() if self.volumes.get(stack) == volume)

    def rollbacks_of(self, image: Image) -> list[str]:
        """The stacks that could roll back to this image."""
        return [stack for stack in self.stacks_of(image) if self.current.get(stack) != image.id]

    def architecture_of(self, stack: str) -> str:
        """The architecture of the image of the stack's last `pulumi up`; "" if that image is deleted."""
        return self.architectures.get(self.current.get(stack, ""), "")


def read(place: Place) -> Claims:
    """Look up the users of the images of a region."""
    running: dict[str, list[str]] = {}
    for page in place.ec2.get_paginator("describe_instances").paginate():
        for instance in (each for reservation in page["Reservations"] for each in reservation["Instances"]):
            if instance["State"]["Name"] != "terminated":
                stack = tags_of(instance).get("mlflow-ami:stack")
                shown = f"{instance['InstanceId']} of the stack {stack}" if stack else instance["InstanceId"]
                running.setdefault(instance["ImageId"], []).append(shown)
    current, volumes = {}, {}
    pages = place.ec2.get_paginator("describe_volumes").paginate(
        Filters=[{"Name": "tag:mlflow-ami:role", "Values": ["data"]}]
    )
    for volume in (each for page in pages for each in page["Volumes"]):
        tags = tags_of(volume)
        if stack := tags.get("mlflow-ami:stack"):
            volumes[stack], current[stack] = volume["VolumeId"], tags.get("mlflow-ami:last-image", "")
    found = {image: tuple(sorted(instances)) for image, instances in running.items()}
    architectures = {image.id: image.architecture for image in find(place.ec2)}
    return Claims(found, channels.read(place.ssm), current, volumes, architectures)


def objections(image: Image, others: list[Image], claims: Claims) -> list[str]:
    """Why this image must stay while `others` exist, one sentence per reason. None for an unfinished image without
    instances."""
    reasons = []
    if by := claims.running.get(image.id):
        reasons.append(f"it runs on {', '.join(by)}: launch another image there first")
    if names := claims.channels_of(image):
        reasons.append(f"the channel {' and '.join(names)} names it: promote another image to it first")
    if image.kept:
        reasons.append("it has the tag mlflow-ami:keep: remove the tag first")
    if not image.finished:
        return reasons
    left = [each for each in others if each.usable and each.id != image.id]
    for stack in claims.rollbacks_of(image):
        # An image of another architecture also needs another instance type, so it does not take the place of this one.
        fit = {image.architecture, claims.architecture_of(stack)}
        if not any(stack in claims.rollbacks_of(each) and each.architecture in fit for each in left):
            reasons.append(
                f"it is the last image that the stack {stack} can roll back to on {image.architecture}: launch another "
                f"image there, and keep it for some time"
            )
    major = image.fact("postgresql-major")
    same = [each for each in left if (each.fact("postgresql-major"), each.architecture) == (major, image.architecture)]
    if major != "?" and not same:
        reasons.append(
            f"it is the only image with PostgreSQL {major} for {image.architecture}, and no other can read such a data "
            "volume: bake another one first"
        )
    return reasons
