"""Remove the remaining resources of a bake from the account, and remove old files from build/bake."""

from __future__ import annotations

import re
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from scripts import aws_session
from scripts.baking.request import BUILDS, Bake
from scripts.imaging import ec2_images, record, retiring

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client
    from mypy_boto3_ec2.type_defs import InstanceTypeDef
    from mypy_boto3_ssm import SSMClient

KEPT_BUILDS = 10


def builders(ec2: EC2Client, bake_id: str) -> list[InstanceTypeDef]:
    """The builder instances of one bake, including terminated instances."""
    found = ec2.describe_instances(Filters=[{"Name": "tag:mlflow-ami:bake", "Values": [bake_id]}])
    return [instance for reservation in found["Reservations"] for instance in reservation["Instances"]]


def sweep(ec2: EC2Client, ssm: SSMClient, bake: Bake, finished_image: str | None) -> None:
    """Remove the remaining resources of one bake, and print each removal. Idempotent.

    An unfinished image is deleted with its snapshots, because stacks refuse an image that lacks the tags with facts. If
    a resource cannot be removed, the function prints the remedy and then removes the remaining resources.
    """

    def remove_builders() -> list[str]:
        left = [each["InstanceId"] for each in builders(ec2, bake.id) if each["State"]["Name"] != "terminated"]
        if left:
            ec2.terminate_instances(InstanceIds=left)
            ec2.get_waiter("instance_terminated").wait(InstanceIds=left, WaiterConfig={"Delay": 3, "MaxAttempts": 100})
        return [f"builder {instance_id}" for instance_id in left]

    def remove_security_groups() -> list[str]:
        made = temporary_groups(bake.log)
        groups = ec2.describe_security_groups()["SecurityGroups"] if made else []
        left = [group for group in groups if group["GroupName"] in made]
        for group in left:
            ec2.delete_security_group(GroupId=group["GroupId"])
        return [f"security group {group['GroupName']}" for group in left]

    def remove_key_pair() -> list[str]:
        name = f"{retiring.KEY_PAIR}{bake.id}"
        if not any(pair["KeyName"] == name for pair in ec2.describe_key_pairs()["KeyPairs"]):
            return []
        ec2.delete_key_pair(KeyName=name)
        return [f"key pair {name}"]

    def remove_unfinished_image() -> list[str]:
        unfinished = [
            image for image in ec2_images.find(ec2, {"mlflow-ami:bake": bake.id}) if image.id != finished_image
        ]
        return [gone for image in unfinished for gone in retiring.delete(ec2, ssm, image)]

    def remove_reservation() -> list[str]:
        record.release(ssm, bake.image_version)
        return []

    for removal in (
        remove_builders,
        remove_security_groups,
        remove_key_pair,
        remove_unfinished_image,
        remove_reservation,
    ):
        try:
            for removed in removal():
                print(f"bake: removed {removed}", file=sys.stderr)
        except aws_session.ERRORS as error:
            what = removal.__name__.removeprefix("remove_").replace("_", " ")
            print(f"bake: could not remove {what} of bake {bake.id}: {aws_session.brief(error)}", file=sys.stderr)
            print(
                "bake: remove the resources tagged mlflow-ami:bake by hand, or later with scripts/images.py sweep",
                file=sys.stderr,
            )


def temporary_groups(log: Path) -> list[str]:
    """The names of the temporary security groups in Packer's log."""
    if not log.exists():
        return []
    return re.findall(r"\bpacker_[0-9a-f-]{36}\b", log.read_text(encoding="utf-8", errors="replace"))


def prune_builds() -> None:
    """Delete the files of old bakes. The files of the newest KEPT_BUILDS bakes stay. Files from the last 24 hours also
    stay, because their bake may still be running."""
    for old in sorted(path for path in BUILDS.iterdir() if path.is_dir())[:-KEPT_BUILDS]:
        if time.time() - old.stat().st_mtime > 86_400:
            shutil.rmtree(old, ignore_errors=True)
