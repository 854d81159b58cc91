"""Channels. A channel is a parameter in Systems Manager with the data type aws:ec2:image and the ID of one image.

If a stack has the setting `channel`, `pulumi preview` reads the channel's parameter. Systems Manager keeps the last
hundred values of a parameter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scripts.imaging.ec2_images import ImageRefused

if TYPE_CHECKING:
    from mypy_boto3_ssm import SSMClient

ROOT = "/mlflow-ami/images"
DATA_TYPE = "aws:ec2:image"
NAME = r"[a-z][a-z0-9-]{0,39}"


@dataclass(frozen=True)
class Promotion:
    """One value in the history of a channel."""

    image: str
    at: str
    by: str


def parameter(channel: str) -> str:
    """The full name of a channel's parameter. Raises ImageRefused if the channel's name is not valid."""
    if not re.fullmatch(NAME, channel) or channel.startswith("ami-"):
        raise ImageRefused(
            f"{channel!r} is not the name of a channel: use up to 40 lower-case letters, digits and hyphens, as in "
            "staging, and do not begin with ami-"
        )
    return f"{ROOT}/{channel}"


def read(ssm: SSMClient) -> dict[str, str]:
    """The channels of a region, as a dict from the channel's name to its image ID."""
    pages = ssm.get_paginator("get_parameters_by_path").paginate(Path=ROOT)
    return {each["Name"].removeprefix(f"{ROOT}/"): each["Value"] for page in pages for each in page["Parameters"]}


def write(ssm: SSMClient, channel: str, image_id: str) -> None:
    """Set the channel to an image. The previous value stays in the parameter's history."""
    ssm.put_parameter(
        Name=parameter(channel),
        Description="mlflow-ami: the image of a channel, set by scripts/images.py promote",
        Type="String",
        DataType=DATA_TYPE,
        Value=image_id,
        Overwrite=True,
    )


def history(ssm: SSMClient, channel: str) -> list[Promotion]:
    """The history of a channel's values. The newest value is first."""
    pages = ssm.get_paginator("get_parameter_history").paginate(Name=parameter(channel))
    found = [each for page in pages for each in page["Parameters"]]
    found.sort(key=lambda each: each["Version"], reverse=True)
    return [
        Promotion(each["Value"], each["LastModifiedDate"].isoformat(), each.get("LastModifiedUser", ""))
        for each in found
    ]
