"""The reasons why an image must stay: instances run the image, channels name it, or stacks can roll back to it.

`pulumi up` tags the launched image with the stack's name and data volume. The tag stays on the image when the stack
changes to another image. Therefore a stack can roll back to every image that has the stack's tag. A stack whose data
volume is deleted needs no image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from scripts.imaging import channels
from scripts.imaging.ec2_images import STACK, Image, Place, find, tags_of


@dataclass(frozen=True)
class Claims:
    """The instances, channels and stacks in one region that need images."""

    running: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """A dict from an image ID to the instances that run the image, with the names of their stacks."""
    channels: Mapping[str, str] = field(default_factory=dict)
    """A dict from a channel to its image ID."""
    current: Mapping[str, str] = field(default_factory=dict)
    """A dict from a stack to the image of its last `pulumi up`."""
    volumes: Mapping[str, str] = field(default_factory=dict)
    """A dict from a stack to its data volume."""
    architectures: Mapping[str, str] = field(default_factory=dict)
    """A dict from the ID of each existing image to its architecture."""

    def channels_of(self, image: Image) -> list[str]:
        return sorted(name for name, held in self.channels.items() if held == image.id)

    def stacks_of(self, image: Image) -> list[str]:
        """The existing stacks that run or ran this image."""
        tagged = {key.removeprefix(STACK): value for key, value in image.tags.items() if key.startswith(STACK)}
        return sorted(stack for stack, volume in tagged.items() if self.volumes.get(stack) == volume)

    def rollbacks_of(self, image: Image) -> list[str]:
        """The stacks that could roll back to this image."""
        return [stack for stack in self.stacks_of(image) if self.current.get(stack) != image.id]

    def architecture_of(self, stack: str) -> str:
        """The architecture of the stack's current image, or "" if this image is deleted. The current image is the image
        of the last `pulumi up`."""
        return self.architectures.get(self.current.get(stack, ""), "")


def read(place: Place) -> Claims:
    """Find the instances, channels and stacks of a region that need images."""
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
    """The reasons why this image must stay, one sentence per reason. The images `others` could replace this image. The
    list is empty if the image can be deleted."""
    reasons = []
    if by := claims.running.get(image.id):
        reasons.append(f"it runs on {', '.join(by)}: launch another image there first")
    if names := claims.channels_of(image):
        reasons.append(f"the channel {' and '.join(names)} names it: promote another image to the channel first")
    if image.kept:
        reasons.append("it has the tag mlflow-ami:keep: remove the tag first")
    if not image.finished:
        return reasons
    left = [each for each in others if each.usable and each.id != image.id]
    for stack in claims.rollbacks_of(image):
        # An image of another architecture needs another instance type, so such an image cannot replace this image.
        fit = {image.architecture, claims.architecture_of(stack)}
        if not any(stack in claims.rollbacks_of(each) and each.architecture in fit for each in left):
            reasons.append(
                f"it is the last {image.architecture} image to which the stack {stack} can roll back: launch another "
                f"image there, and keep it for some time"
            )
    major = image.fact("postgresql-major")
    same = [each for each in left if (each.fact("postgresql-major"), each.architecture) == (major, image.architecture)]
    if major != "?" and not same:
        reasons.append(
            f"it is the only image with PostgreSQL {major} for {image.architecture}, and no other image can read data "
            "volumes of this version: bake another image first"
        )
    return reasons
