"""Find the source image of a bake."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from scripts import aws_session
from scripts.baking.request import BakeRefused

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client

SOURCE_NAME = "ubuntu/images/hvm-ssd-gp3/ubuntu-noble-24.04-amd64-server-*"
SOURCE_OWNERS = ("099720109477",)


@dataclass(frozen=True)
class SourceImage:
    """The image to build on, from EC2's description."""

    id: str
    name: str
    owner: str


def find_source_image(ec2: EC2Client, wanted: str | None, owners: tuple[str, ...]) -> SourceImage:
    """The newest image with the ID, name or name pattern `wanted`. Raises BakeRefused if there is none."""
    asked: dict[str, Any]
    if wanted and wanted.startswith("ami-"):
        asked = {"ImageIds": [wanted]}
    else:
        asked = {
            "Owners": list(owners),
            "Filters": [
                {"Name": "name", "Values": [wanted or SOURCE_NAME]},
                {"Name": "architecture", "Values": ["x86_64"]},
            ],
        }
    region = ec2.meta.region_name
    try:
        found = ec2.describe_images(**asked)["Images"]
    except ClientError as error:
        if error.response["Error"]["Code"].startswith("InvalidAMIID"):
            found = []
        else:
            raise BakeRefused(aws_session.explain(error, region)) from None
    if not found:
        raise BakeRefused(
            f"region {region} has no source image {wanted or SOURCE_NAME!r} of owner {', '.join(owners)}: "
            "name another with --source-ami, or another region with --region"
        )
    newest = max(found, key=lambda image: str(image.get("CreationDate", "")))
    if newest["Architecture"] != "x86_64":
        raise BakeRefused(f"{newest['ImageId']} is for {newest['Architecture']}, but the image is built for x86_64")
    return SourceImage(newest["ImageId"], newest["Name"], newest["OwnerId"])
