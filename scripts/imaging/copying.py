"""Command `copy` of scripts/images.py: copy an image to another region, with its tags, record and encryption."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from botocore.exceptions import ClientError

from scripts.imaging import record
from scripts.imaging.ec2_images import FINISHED, OURS, STACK, Image, ImageRefused, Place, as_tags, find, named
from scripts.imaging.promoting import require_usable

SECONDS = 10
LIMIT = 3600


def copy(
    source: Place,
    image: Image,
    to: Place,
    *,
    kms_key: str | None,
    dry_run: bool,
    say: Callable[[str], None],
    pause: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Copy the image to another region, wait until the copy is available, and return a summary. Raises ImageRefused.

    A repeated call continues an interrupted copy. The tag mlflow-ami:format marks a finished copy and is written last.
    """
    require_usable(image)
    if to.region == source.region:
        raise ImageRefused(f"{image.id} is in {to.region} already: name another region with --to")
    key = key_for(source, image, to, kms_key)
    there = named(find(to.ec2), image.version)
    result = {"region": to.region, "image": there.id if there else None, "from": image.id, "changed": False}
    if there and there.finished:
        return result
    if dry_run:
        return result | {"changed": True}
    tags = {name: value for name, value in image.tags.items() if not name.startswith((STACK, "aws:"))}
    tags.pop(FINISHED)
    made = there.id if there else start(source, image, to, tags, key)
    say(f"{image.id} is being copied from {source.region} to {to.region} as {made}")
    snapshots = wait(to, made, say, pause)
    facts = record.read(source.ssm, image.version)
    if facts:
        record.write(to.ssm, facts)
    to.ec2.modify_image_attribute(ImageId=made, ImdsSupport={"Value": "v2.0"})
    to.ec2.create_tags(Resources=[made, *snapshots], Tags=as_tags(tags))
    to.ec2.create_tags(Resources=[made, *snapshots], Tags=as_tags({FINISHED: image.tags[FINISHED]}))
    return result | {"image": made, "changed": True}


def start(source: Place, image: Image, to: Place, tags: dict[str, str], key: dict[str, Any]) -> str:
    """Start the copy and return the copy's image ID. The tag with the image version is set at the start, so that a
    repeated call finds the unfinished copy."""
    copied = to.ec2.copy_image(
        SourceImageId=image.id,
        SourceRegion=source.region,
        Name=image.name,
        ClientToken=f"mlflow-ami-{image.version}-{to.region}",
        TagSpecifications=[{"ResourceType": "image", "Tags": as_tags(tags)}],
        **key,
    )
    to.ec2.create_tags(Resources=[copied["ImageId"]], Tags=as_tags({OURS: image.version}))
    return str(copied["ImageId"])


def wait(to: Place, made: str, say: Callable[[str], None], pause: Callable[[float], None]) -> list[str]:
    """Wait until the copy is available, and return the IDs of its snapshots. Raises ImageRefused if the copy fails, or
    if the copy takes longer than 1 h."""
    said = ""
    for _ in range(LIMIT // SECONDS):
        description: Any = to.ec2.describe_images(ImageIds=[made])["Images"][0]
        mappings = description.get("BlockDeviceMappings", [])
        snapshots = [each["Ebs"]["SnapshotId"] for each in mappings if each.get("Ebs", {}).get("SnapshotId")]
        if description["State"] == "available":
            return snapshots
        if description["State"] not in ("pending", "transient"):
            reason = description.get("StateReason", {}).get("Message", "EC2 gives no reason")
            raise ImageRefused(f"the copy {made} in {to.region} failed: {reason}: delete it with sweep, and try again")
        progress = to.ec2.describe_snapshots(SnapshotIds=snapshots)["Snapshots"] if snapshots else []
        now = ", ".join(each.get("Progress", "") for each in progress) or "waiting"
        if now != said:
            say(f"{made} in {to.region}: {now}")
            said = now
        pause(SECONDS)
    raise ImageRefused(f"the copy {made} in {to.region} is not complete after an hour: run the same command again")


def key_for(source: Place, image: Image, to: Place, kms_key: str | None) -> dict[str, Any]:
    """Return CopyImage's arguments for the encryption of the copy. Raises ImageRefused if the image's key exists only
    in the region of the image."""
    found: list[Any] = source.ec2.describe_snapshots(SnapshotIds=list(image.snapshots))["Snapshots"]
    encrypted = [each for each in found if each.get("Encrypted")]
    if not encrypted:
        return {"Encrypted": True, "KmsKeyId": kms_key} if kms_key else {}
    if kms_key:
        return {"Encrypted": True, "KmsKeyId": kms_key}
    own = customer_key(source, encrypted[0].get("KmsKeyId"))
    if own and "/mrk-" in own:
        return {"Encrypted": True, "KmsKeyId": own.replace(f":{source.region}:", f":{to.region}:")}
    if own:
        raise ImageRefused(
            f"{image.id} is encrypted with {own}, and a key belongs to one region: name a key of {to.region} with "
            f"--kms-key"
        )
    return {"Encrypted": True}


def customer_key(place: Place, key: str | None) -> str | None:
    """Return the ARN of a customer-managed key, or None for the key that AWS manages for EBS."""
    if not key:
        return None
    try:
        described = place.client("kms").describe_key(KeyId=key)["KeyMetadata"]
    except ClientError as error:
        if error.response["Error"]["Code"] == "NotFoundException":
            return None
        raise
    return str(described["Arn"]) if described["KeyManager"] == "CUSTOMER" else None
