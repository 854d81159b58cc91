"""This project's images in one account and region: EC2's descriptions, tags, and look-up by the name that a user
gives."""

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
"""Written last: an image with this tag is complete."""
DRILL = "mlflow-ami:drill:"
"""Start of a tag that records a passed drill; the rest is the image version of the other image of the drill."""
STACK = "mlflow-ami:stack:"
"""Start of the key of a tag that infra/ writes at `pulumi up`. The rest of the key is the stack's name; the value is
the ID of the stack's data volume."""
FALLBACK_SEPARATOR = " / "
TAG_LENGTH = 256
SOON = timedelta(minutes=5)
"""EC2 refuses a time in the past and rounds to minutes, so the time of deprecation is slightly in the future."""
NAMED = (
    "image_version", "git_commit", "git_dirty", "source_ami", "os", "architecture", "mlflow_version", "migration_head",
    "migration_count", "postgresql_major", "python_version", "launch_revision", "disk_used_mib",
)  # fmt: skip
"""The facts that are also tags, so that they can be read without starting the image."""


class ImageRefused(Exception):
    """A verb was refused; the text is one sentence with the reason and the remedy."""


@dataclass(frozen=True)
class Place:
    """A region of an account, with a function that returns the client of a service there."""

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
    """The time from which it is deprecated; "" if it is not."""
    gib: int = 0
    """Size of its volume."""

    @property
    def finished(self) -> bool:
        """Whether it is complete: the tag mlflow-ami:format is written last."""
        return FINISHED in self.tags

    @property
    def usable(self) -> bool:
        """Whether a stack can launch it."""
        return self.finished and self.state == "available"

    @property
    def kept(self) -> bool:
        """Whether it has the tag mlflow-ami:keep, set by a user."""
        return "mlflow-ami:keep" in self.tags

    @property
    def version(self) -> str:
        """Image version: the time of its bake. A copy in another region has the same version."""
        return self.tags.get(OURS, "")

    @property
    def fallbacks(self) -> list[str]:
        """Features that its MLflow release does not support (mlflow_host.bake.fallbacks)."""
        tag = self.tags.get("mlflow-ami:fallbacks", "")
        return tag.split(FALLBACK_SEPARATOR) if tag else []

    @property
    def drills(self) -> dict[str, str]:
        """The drills that it passed: the other image's version → when and where."""
        return {key.removeprefix(DRILL): value for key, value in self.tags.items() if key.startswith(DRILL)}

    def fact(self, name: str) -> str:
        """A fact from its tags; "?" if it has no fact of that name."""
        return self.tags.get(f"mlflow-ami:{name}", "?")


def fact_tags(facts: Mapping[str, Any]) -> dict[str, str]:
    """Tags with the part of image.json that must be readable without starting the image, except the format's tag."""
    without = {"mlflow-ami:fallbacks": fallbacks_tag(facts["fallbacks"])} if facts.get("fallbacks") else {}
    known = {f"mlflow-ami:{name.replace('_', '-')}": tag_value(facts[name]) for name in NAMED if name in facts}
    return known | without


def fallbacks_tag(fallbacks: list[dict[str, str]]) -> str:
    """The fallbacks, in the characters and the length that AWS allows in a tag's value. The reasons are in image.json
    only."""
    text = FALLBACK_SEPARATOR.join(re.sub(r"[^\w +=.:/@-]", "", entry["what"]) for entry in fallbacks)
    return text if len(text) <= TAG_LENGTH else f"{text[: TAG_LENGTH - 4]} ..."


def tag_value(fact: Any) -> str:
    return str(fact).lower() if isinstance(fact, bool) else str(fact)


def tags_of(resource: Mapping[str, Any]) -> dict[str, str]:
    """A resource's tags as a dict."""
    return {tag["Key"]: tag["Value"] for tag in resource.get("Tags", [])}


def as_tags(tags: Mapping[str, str]) -> list[Any]:
    """Tags in EC2's form."""
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def find(ec2: EC2Client, tags: Mapping[str, str] | None = None) -> list[Image]:
    """This account's images made by bake.py that carry `tags`, newest first; unfinished, deprecated and disabled ones
    too."""
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
    """EC2's time of creation; the earliest time if there is none."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else datetime.min.replace(tzinfo=UTC)


def accepted(call: Any, gone: str, **arguments: Any) -> bool:
    """Call EC2; False if AWS returns that the resource does not exist (an error code that starts with `gone`)."""
    try:
        call(**arguments)
    except ClientError as error:
        if error.response["Error"]["Code"].startswith(gone):
            return False
        raise
    return True


def named(found: list[Image], wanted: str) -> Image | None:
    """The image with this ID, name or image version; of several copies the newest finished one."""
    same = [image for image in found if wanted and wanted in (image.id, image.name, image.version)]
    return next((image for image in same if image.finished), next(iter(same), None))
