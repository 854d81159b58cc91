"""Find the source image of a bake."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from scripts import aws_session
from scripts.baking.request import BakeRefused

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client

SOURCE_NAMES = {
    "x86_64": "ubuntu/images/hvm-ssd-gp3/ubuntu-noble-24.04-amd64-server-*",
    "arm64": "ubuntu/images/hvm-ssd-gp3/ubuntu-noble-24.04-arm64-server-*",
}
"""The name pattern of Canonical's image for each architecture of EC2. packer/variables.pkr.hcl repeats the patterns."""
SOURCE_OWNERS = ("099720109477",)


@dataclass(frozen=True)
class SourceImage:
    """The source image of a bake, from EC2's description of the image."""

    id: str
    name: str
    owner: str


def find_source_image(ec2: EC2Client, wanted: str | None, owners: tuple[str, ...], architecture: str) -> SourceImage:
    """The newest image of this architecture that has the ID `wanted`, or whose name matches the pattern `wanted`.
    Raises BakeRefused if there is no such image."""
    asked: dict[str, Any]
    if wanted and wanted.startswith("ami-"):
        asked = {"ImageIds": [wanted]}
    else:
        asked = {
            "Owners": list(owners),
            "Filters": [
                {"Name": "name", "Values": [wanted or SOURCE_NAMES[architecture]]},
                {"Name": "architecture", "Values": [architecture]},
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
            f"region {region} has no source image {wanted or SOURCE_NAMES[architecture]!r} of owner "
            f"{', '.join(owners)} for {architecture}: name another with --source-ami, another region with --region, or "
            "another --architecture"
        )
    newest = max(found, key=lambda image: str(image.get("CreationDate", "")))
    if newest["Architecture"] != architecture:
        raise BakeRefused(
            f"{newest['ImageId']} is for {newest['Architecture']}, but the image is built for {architecture}: add "
            f"--architecture {newest['Architecture']}, or name another --source-ami"
        )
    return SourceImage(newest["ImageId"], newest["Name"], newest["OwnerId"])
