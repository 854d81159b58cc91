"""Commands `deprecate`, `retire` and `sweep` of scripts/images.py: disable or delete images that are not needed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from scripts.imaging import claims, record
from scripts.imaging.claims import Claims
from scripts.imaging.ec2_images import OURS, Image, ImageRefused, Place, accepted, created, find

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client
    from mypy_boto3_ssm import SSMClient

STALE = timedelta(hours=6)
"""Builder instances and unfinished images that are older than 6 hours are leftovers, because no bake runs longer."""
KEY_PAIR = "mlflow-ami-bake-"
"""Name prefix of a bake's key pair. The bake's ID follows the prefix."""


def require_free(image: Image, others: list[Image], known: Claims, verb: str) -> None:
    """If there are reasons to keep the image, raise ImageRefused with all reasons."""
    if reasons := claims.objections(image, others, known):
        raise ImageRefused(f"{image.id} ({image.name}) cannot be {verb}: {'; '.join(reasons)}")


def deprecate(place: Place, image: Image, *, undo: bool, dry_run: bool) -> list[str]:
    """Deprecate the image. With `undo`, end the deprecation. Returns the changes. Idempotent. Raises ImageRefused."""
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
    """Deprecate and disable the image. With `undo`, reverse both changes. With `for_good`, delete a disabled image,
    its snapshots and its record. Returns the changes as sentences. Idempotent. Raises ImageRefused."""
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
            f"{image.id} is disabled: no stack can launch it, and it is not shared with other accounts any more; "
            "retire --undo enables it again, retire --delete deletes it"
        )
    return done


def planned(image: Image) -> list[str]:
    return [f"image {image.id}", *(f"snapshot {snapshot}" for snapshot in image.snapshots)]


def delete(ec2: EC2Client, ssm: SSMClient, image: Image) -> list[str]:
    """Deregister an image, then delete its snapshots and its record. Returns the deleted resources. Idempotent."""
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
    """Return the images to delete, oldest first: finished images older than `older_than`, and unfinished images of
    ended bakes. The newest `keep` finished images of each architecture stay. An image also stays if `claims.objections`
    returns a reason to keep the image; `claims.objections` gets only the images that are not chosen for deletion."""
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
    """Return the IDs of this project's snapshots whose images are deleted."""
    kept = {snapshot for image in found for snapshot in image.snapshots}
    pages = ec2.get_paginator("describe_snapshots").paginate(
        OwnerIds=["self"], Filters=[{"Name": "tag-key", "Values": [OURS]}]
    )
    snapshots = [snapshot for page in pages for snapshot in page["Snapshots"]]
    return sorted(each["SnapshotId"] for each in snapshots if each["SnapshotId"] not in kept)


def stale_builders(ec2: EC2Client, now: datetime) -> list[str]:
    """Return the IDs of builder instances whose bakes have ended without cleanup. A bake ends without cleanup if, for
    example, the computer that runs Packer is switched off."""
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
    """Return whether the bake with this ID has ended. The ID begins with the start time of the bake, and no bake runs
    longer than `STALE`."""
    try:
        return datetime.strptime(bake_id.partition("-")[0], "%Y%m%dt%H%M%Sz").replace(tzinfo=UTC) < now - STALE
    except ValueError:
        return False


def abandoned(place: Place, now: datetime) -> tuple[list[str], list[str]]:
    """Return the leftovers of killed bakes: the names of their key pairs, and their reserved image versions."""
    pairs = [each["KeyName"] for each in place.ec2.describe_key_pairs()["KeyPairs"]]
    keys = [name for name in pairs if name.startswith(KEY_PAIR) and ended(name.removeprefix(KEY_PAIR), now)]
    return keys, sorted(version for version, bake in record.reserved(place.ssm).items() if ended(bake, now))


def sweep(place: Place, keep: int, older_than: timedelta, dry_run: bool) -> list[str]:
    """Delete superfluous images and leftovers of bakes, and return the names of the deleted resources. If `dry_run` is
    true, delete nothing. Idempotent."""
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
                # During CreateImage and CopyImage, the snapshot exists before EC2 describes the image.
                if error.response["Error"]["Code"] != "InvalidSnapshot.InUse":
                    raise
    return swept
