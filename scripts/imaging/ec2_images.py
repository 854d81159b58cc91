"""This project's images in one account and region: read EC2's descriptions and tags, and find an image by a name."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client
    from mypy_boto3_ec2.type_defs import FilterTypeDef, ImageTypeDef
    from mypy_boto3_ssm import SSMClient

OURS = "mlflow-ami:image-version"
FINISHED = "mlflow-ami:format"
"""The key of the tag that is written after all other tags, so every image with this tag is complete."""
DRILL = "mlflow-ami:drill:"
"""A tag that records a passed drill has a key with this prefix. The rest of the key is the version of the drill's other
image."""
STACK = "mlflow-ami:stack:"
"""The tag that `pulumi up` writes has a key with this prefix. The rest of the key is the stack's name, and the value of
the tag is the ID of the stack's data volume."""
FALLBACK_SEPARATOR = " / "
TAG_LENGTH = 256
SOON = timedelta(minutes=5)
"""An image counts as deprecated if its deprecation time is at most 5 minutes in the future. `deprecate` sets a time
in the near future, because EC2 refuses times in the past and rounds to minutes."""
NAMED = (
    "image_version", "git_commit", "git_dirty", "source_ami", "os", "architecture", "mlflow_version", "migration_head",
    "migration_count", "postgresql_major", "python_version", "launch_revision", "disk_used_mib",
)  # fmt: skip
"""The facts that are also stored as tags, so that scripts can read these facts without starting the image."""


class ImageRefused(Exception):
    """A command of images.py was refused. The exception's text is one sentence with the reason and the remedy."""


@dataclass(frozen=True)
class Place:
    """A region of an account. `client` returns a client for an AWS service in this region."""

    region: str
    client: Callable[[str], Any]

    @functools.cached_property
    def ec2(self) -> EC2Client:
        return self.client("ec2")  # type: ignore[no-any-return]

    @functools.cached_property
    def ssm(self) -> SSMClient:
        return self.client("ssm")  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Image:
    """One image of this project, from EC2's description."""

    id: str
    name: str
    created: str
    state: str
    tags: dict[str, str]
    snapshots: tuple[str, ...]
    architecture: str = "x86_64"
    deprecated: str = ""
    """The deprecation time of the image, or "" if the image is not deprecated."""
    gib: int = 0
    """The size of the image's volumes in GiB."""

    @property
    def finished(self) -> bool:
        """Whether the image is complete. A complete image has the tag mlflow-ami:format, which is written last."""
        return FINISHED in self.tags

    @property
    def usable(self) -> bool:
        """Whether a stack can launch this image."""
        return self.finished and self.state == "available"

    @property
    def kept(self) -> bool:
        """Whether a user has set the tag mlflow-ami:keep on the image."""
        return "mlflow-ami:keep" in self.tags

    @property
    def version(self) -> str:
        """The image version, which is the start time of the bake. Copies of an image keep the version of the image."""
        return self.tags.get(OURS, "")

    @property
    def fallbacks(self) -> list[str]:
        """The features that the image's MLflow release does not support (mlflow_host.bake.fallbacks)."""
        tag = self.tags.get("mlflow-ami:fallbacks", "")
        return tag.split(FALLBACK_SEPARATOR) if tag else []

    @property
    def drills(self) -> dict[str, str]:
        """The passed drills of this image. Each key is the version of the drill's other image. Each value is a text
        with the drill's time, operating system and architecture."""
        return {key.removeprefix(DRILL): value for key, value in self.tags.items() if key.startswith(DRILL)}

    def fact(self, name: str) -> str:
        """The value of a fact from the image's tags, or "?" if no tag has this fact."""
        return self.tags.get(f"mlflow-ami:{name}", "?")


def fact_tags(facts: Mapping[str, Any]) -> dict[str, str]:
    """The tags with the facts that scripts read without starting the image. The tag mlflow-ami:format is not one of
    these tags."""
    without = {"mlflow-ami:fallbacks": fallbacks_tag(facts["fallbacks"])} if facts.get("fallbacks") else {}
    known = {f"mlflow-ami:{name.replace('_', '-')}": tag_value(facts[name]) for name in NAMED if name in facts}
    return known | without


def fallbacks_tag(fallbacks: list[dict[str, str]]) -> str:
    """The fallbacks as a tag's value, with the characters and the length that AWS allows. Only image.json contains the
    reasons."""
    text = FALLBACK_SEPARATOR.join(re.sub(r"[^\w +=.:/@-]", "", entry["what"]) for entry in fallbacks)
    return text if len(text) <= TAG_LENGTH else f"{text[: TAG_LENGTH - 4]} ..."


def tag_value(fact: Any) -> str:
    return str(fact).lower() if isinstance(fact, bool) else str(fact)


def tags_of(resource: Mapping[str, Any]) -> dict[str, str]:
    """The tags of an AWS resource as a dict."""
    return {tag["Key"]: tag["Value"] for tag in resource.get("Tags", [])}


def as_tags(tags: Mapping[str, str]) -> list[Any]:
    """Tags in EC2's form."""
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def find(ec2: EC2Client, tags: Mapping[str, str] | None = None) -> list[Image]:
    """This account's images that bake.py made and that have `tags`, newest first. The list includes unfinished,
    deprecated and disabled images."""
    filters: list[FilterTypeDef] = [{"Name": f"tag:{key}", "Values": [value]} for key, value in (tags or {}).items()]
    filters.append({"Name": "tag-key", "Values": [OURS]})
    found = ec2.describe_images(Owners=["self"], Filters=filters, IncludeDeprecated=True, IncludeDisabled=True)
    return sorted(map(read, found["Images"]), key=lambda image: (image.created, image.id), reverse=True)


def read(image: ImageTypeDef) -> Image:
    """An Image from EC2's description."""
    blocks: list[Any] = [mapping.get("Ebs", {}) for mapping in image.get("BlockDeviceMappings", [])]
    until = image.get("DeprecationTime", "")
    return Image(
        id=image["ImageId"],
        name=image.get("Name", ""),
        created=image.get("CreationDate", ""),
        state=image.get("State", ""),
        tags=tags_of(image),
        snapshots=tuple(block["SnapshotId"] for block in blocks if block.get("SnapshotId")),
        architecture=image.get("Architecture", "x86_64"),
        deprecated=until if until and created(until) <= datetime.now(UTC) + SOON else "",
        gib=sum(block.get("VolumeSize", 0) for block in blocks),
    )


def created(text: str) -> datetime:
    """Convert a time from EC2 to a datetime. An empty text gives the earliest possible time."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else datetime.min.replace(tzinfo=UTC)


def accepted(call: Any, gone: str, **arguments: Any) -> bool:
    """Call EC2. Returns False if AWS's error code starts with `gone`, because the resource does not exist."""
    try:
        call(**arguments)
    except ClientError as error:
        if error.response["Error"]["Code"].startswith(gone):
            return False
        raise
    return True


def named(found: list[Image], wanted: str) -> Image | None:
    """The image with the ID, name or version `wanted`. If several copies match, returns the newest finished copy."""
    same = [image for image in found if wanted and wanted in (image.id, image.name, image.version)]
    return next((image for image in same if image.finished), next(iter(same), None))
