"""Commands `share` and `unshare` of scripts/images.py: allow or forbid other accounts to launch an image."""

from __future__ import annotations

import json
import re
from typing import Any

from scripts.imaging.copying import customer_key
from scripts.imaging.ec2_images import Image, ImageRefused, Place
from scripts.imaging.promoting import require_usable

KEY_ACTIONS = ["kms:CreateGrant", "kms:Decrypt", "kms:DescribeKey", "kms:ReEncrypt*"]
"""To launch a shared image, an account needs these permissions on the KMS key ("Share an AMI", EC2 User Guide)."""


def share(place: Place, image: Image, accounts: list[str], *, undo: bool, dry_run: bool) -> dict[str, Any]:
    """Give the accounts permissions on the image and its snapshots; with `undo`, remove these permissions. Returns the
    accounts whose permissions changed, and the statements that must be added to the policies of customer-managed keys.
    Idempotent. Raises ImageRefused."""
    for account in accounts:
        if not re.fullmatch(r"\d{12}", account):
            raise ImageRefused(f"{account!r} is not the ID of an AWS account: give its twelve digits")
    if not undo:
        require_usable(image)
    keys = keys_of(place, image)
    if not undo and None in keys:
        raise ImageRefused(
            f"{image.id} is encrypted with AWS's own key for EBS, which other accounts cannot use: bake with "
            "--kms-key, or copy it to another region with --kms-key, and share the new image"
        )
    shared = shared_with(place, image)
    changing = [account for account in accounts if (account in shared) is undo]
    if changing and not dry_run:
        verb: Any = {"Remove" if undo else "Add": [{"UserId": account} for account in changing]}
        place.ec2.modify_image_attribute(ImageId=image.id, LaunchPermission=verb)
        for snapshot in image.snapshots:
            place.ec2.modify_snapshot_attribute(
                SnapshotId=snapshot,
                Attribute="createVolumePermission",
                OperationType="remove" if undo else "add",
                UserIds=changing,
            )
    return {
        "region": place.region,
        "image": image.id,
        "changed": changing,
        "shared_with": sorted(set(shared) - set(changing) if undo else {*shared, *changing}),
        "key_statements": [] if undo else [statement(key, accounts) for key in keys if key],
    }


def shared_with(place: Place, image: Image) -> list[str]:
    """The accounts that may launch the image."""
    said: Any = place.ec2.describe_image_attribute(ImageId=image.id, Attribute="launchPermission")
    return sorted(each["UserId"] for each in said.get("LaunchPermissions", []) if each.get("UserId"))


def keys_of(place: Place, image: Image) -> list[str | None]:
    """Return the key of each encrypted snapshot: the ARN of a customer-managed key, or None for AWS's own key."""
    found: list[Any] = place.ec2.describe_snapshots(SnapshotIds=list(image.snapshots))["Snapshots"]
    return [customer_key(place, each.get("KmsKeyId")) for each in found if each.get("Encrypted")]


def statement(key: str, accounts: list[str]) -> dict[str, Any]:
    """Return the statement that must be added to the key's policy."""
    partition = key.split(":")[1]
    return {
        "Sid": "LaunchSharedImages",
        "Effect": "Allow",
        "Principal": {"AWS": [f"arn:{partition}:iam::{account}:root" for account in accounts]},
        "Action": KEY_ACTIONS,
        "Resource": "*",
    }


def describe(done: dict[str, Any], undo: bool) -> str:
    """The result as text."""
    word = "no longer shared with" if undo else "shared with"
    lines = [f"{done['image']} ({done['region']}): {word} {', '.join(done['changed']) or 'nobody else, as before'}"]
    for each in done["key_statements"]:
        lines += ["Add this statement to the policy of the image's key:", json.dumps(each, indent=2)]
    if not undo:
        lines.append(
            "Tags are not shared, and stacks need them: the other account must copy the image with `aws ec2 "
            "copy-image`, and add the tags that scripts/images.py show --json prints."
        )
    return "\n".join(lines)
