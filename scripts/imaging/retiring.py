"""Verbs `deprecate`, `retire` and `sweep`: take images out of use, and delete them with their snapshots."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from scripts.imaging import claims, record
from scripts.imaging.catalog import OURS, Image, ImageRefused, Place, accepted, created, find
from scripts.imaging.claims import Claims

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client
    from mypy_boto3_ssm import SSMClient

STALE = timedelta(hours=6)
"""No bake runs longer than this: older builders and unfinished images are leftovers."""
KEY_PAIR = "mlflow-ami-bake-"
"""Start of the name of a bake's key pair; the bake's ID follows."""


def require_free(image: Image, others: list[Image], known: Claims, verb: str) -> None:
    """Raises ImageRefused with every reason why the image must stay."""
    if reasons := claims.objections(image, others, known):
        raise ImageRefused(f"{image.id} ({image.name}) cannot be {verb}: {'; '.join(reasons)}")


def deprecate(place: Place, image: Image, *, undo: bool, dry_run: bool) -> list[str]:
    """Mark the image as deprecated, or reverse that; returns what was done. Idempotent. Raises ImageRefused."""
    if bool(image.deprecated) is not undo:
        return []
    if undo:
        if not dry_run:
            place.ec2.disable_image_deprecation(ImageId=image.id)
        return [f"{image.id} is not deprecated any more"]
    require_free(image, find(place.ec2), claims.read(place), "deprecated")
    if not dry_run:
        place.ec2.enable_image_deprecation(ImageId=image.id, DeprecateAt=datetime.now(UTC) + timedelta(minutes=1))
    return [f"{image.id} is deprecated"]


def retire(place: Place, image: Image, *, undo: bool, for_good: bool, dry_run: bool) -> list[str]:
    """Deprecate and disable the image; with `undo` reverse both; with `for_good` delete a disabled one with its
    snapshots and its record. Returns what was done. Idempotent. Raises ImageRefused."""
    if undo:
        done = []
        if image.state == "disabled":
            if not dry_run:
                place.ec2.enable_image(ImageId=image.id)
            done.append(f"{image.id} is enabled again")
        return done + deprecate(place, image, undo=True, dry_run=dry_run)
    require_free(image, find(place.ec2), claims.read(place), "retired")
    if for_good:
        if image.state != "disabled":
            raise ImageRefused(
                f"{image.id} is {image.state}, not disabled, and deleting it cannot be reversed: retire it without "
                f"--delete first, and delete it later if it is not needed"
            )
        return planned(image) if dry_run else delete(place.ec2, place.ssm, image)
    done = deprecate(place, image, undo=False, dry_run=dry_run)
    if image.state != "disabled":
        if not dry_run:
            place.ec2.disable_image(ImageId=image.id)
        done.append(
            f"{image.id} is disabled: no stack can launch it, and accounts that it was shared with lose it; "
            "retire --undo enables it again, retire --delete deletes it"
        )
    return done


def planned(image: Image) -> list[str]:
    return [f"image {image.id}", *(f"snapshot {snapshot}" for snapshot in image.snapshots)]


def delete(ec2: EC2Client, ssm: SSMClient, image: Image) -> list[str]:
    """Deregister an image, then delete its snapshots and its record; returns what was deleted. Idempotent."""
    deleted = []
    if accepted(ec2.deregister_image, "InvalidAMIID", ImageId=image.id):
        deleted.append(f"image {image.id}")
    for snapshot in image.snapshots:
        if accepted(ec2.delete_snapshot, "InvalidSnapshot", SnapshotId=snapshot):
            deleted.append(f"snapshot {snapshot}")
    if image.version and not find(ec2, {OURS: image.version}):
        record.delete(ssm, image.version)
    return deleted


def superfluous(found: list[Image], known: Claims, keep: int, older_than: timedelta, now: datetime) -> list[Image]:
    """Images to delete, oldest first: finished ones older than `older_than` that are not among the newest `keep` of
    their architecture, and unfinished ones of ended bakes; never one for which `claims.objections` gives a reason to
    stay without the others."""
    newest = {
        image.id
        for architecture in {image.architecture for image in found}
        for image in [each for each in found if each.finished and each.architecture == architecture][:keep]
    }
    left, going = list(found), []
    for image in sorted(found, key=lambda image: (image.created, image.id)):
        limit = older_than if image.finished else STALE
        if image.id in newest or created(image.created) > now - limit or claims.objections(image, left, known):
            continue
        going.append(image)
        left.remove(image)
    return going


def orphans(ec2: EC2Client, found: list[Image]) -> list[str]:
    """IDs of snapshots of this project's deleted images."""
    kept = {snapshot for image in found for snapshot in image.snapshots}
    pages = ec2.get_paginator("describe_snapshots").paginate(
        OwnerIds=["self"], Filters=[{"Name": "tag-key", "Values": [OURS]}]
    )
    snapshots = [snapshot for page in pages for snapshot in page["Snapshots"]]
    return sorted(each["SnapshotId"] for each in snapshots if each["SnapshotId"] not in kept)


def stale_builders(ec2: EC2Client, now: datetime) -> list[str]:
    """IDs of builder instances whose bake has ended, for example because the computer that ran it was switched off."""
    pages = ec2.get_paginator("describe_instances").paginate(
        Filters=[{"Name": "tag-key", "Values": ["mlflow-ami:bake"]}]
    )
    instances: list[Any] = [
        instance for page in pages for reservation in page["Reservations"] for instance in reservation["Instances"]
    ]
    return [
        instance["InstanceId"]
        for instance in instances
        if instance["State"]["Name"] not in ("terminated", "shutting-down") and instance["LaunchTime"] < now - STALE
    ]


def ended(bake_id: str, now: datetime) -> bool:
    """Whether the bake of this ID can no longer run: an ID begins with the time of its bake."""
    try:
        return datetime.strptime(bake_id.partition("-")[0], "%Y%m%dt%H%M%Sz").replace(tzinfo=UTC) < now - STALE
    except ValueError:
        return False


def abandoned(place: Place, now: datetime) -> tuple[list[str], list[str]]:
    """Leftovers of killed bakes: names of their key pairs, and image versions that they reserved."""
    pairs = [each["KeyName"] for each in place.ec2.describe_key_pairs()["KeyPairs"]]
    keys = [name for name in pairs if name.startswith(KEY_PAIR) and ended(name.removeprefix(KEY_PAIR), now)]
    return keys, sorted(version for version, bake in record.reserved(place.ssm).items() if ended(bake, now))


def sweep(place: Place, keep: int, older_than: timedelta, dry_run: bool) -> list[str]:
    """Delete the superfluous resources and return them; with `dry_run` only return them. Idempotent."""
    now, ec2 = datetime.now(UTC), place.ec2
    found = find(ec2)
    going = superfluous(found, claims.read(place), keep, older_than, now)
    stale, lost = stale_builders(ec2, now), orphans(ec2, found)
    keys, reserved = abandoned(place, now)
    swept = [f"builder {instance}" for instance in stale]
    swept += [f"key pair {name}" for name in keys]
    swept += [f"reserved image version {version}" for version in reserved]
    swept += [each for image in going for each in planned(image)]
    swept += [f"snapshot {snapshot}" for snapshot in lost]
    if not dry_run:
        if stale:
            ec2.terminate_instances(InstanceIds=stale)
        for name in keys:
            ec2.delete_key_pair(KeyName=name)
        for version in reserved:
            record.release(place.ssm, version)
        for image in going:
            delete(ec2, place.ssm, image)
        for snapshot in lost:
            try:
                accepted(ec2.delete_snapshot, "InvalidSnapshot.NotFound", SnapshotId=snapshot)
            except ClientError as error:
                # An image that is being made or copied has its snapshot before EC2 describes it.
                if error.response["Error"]["Code"] != "InvalidSnapshot.InUse":
                    raise
    return swept
