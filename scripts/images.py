#!/usr/bin/env python3
"""Lists our images, and deletes the ones nobody needs any more together with their snapshots."""

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

OURS = "mlflow-ami:image-version"
STALE = timedelta(hours=6)
"""A builder or an unfinished image older than this belongs to no bake that still runs."""


class CloudDown(Exception):
    """The embedded cloud does not start; the text says why."""


@dataclass(frozen=True)
class Image:
    """One of our images, as EC2 describes it."""

    id: str
    name: str
    created: str
    state: str
    tags: dict[str, str]
    snapshots: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether it has its facts: the tag mlflow-ami:format is given last."""
        return "mlflow-ami:format" in self.tags

    @property
    def kept(self) -> bool:
        """Whether somebody asked for it to stay, with a tag mlflow-ami:keep."""
        return "mlflow-ami:keep" in self.tags


def fact_tags(facts: dict[str, Any]) -> dict[str, str]:
    """The part of image.json that is known without starting the image, as tags. The format's own tag is given last."""
    named = (
        "image_version", "git_commit", "git_dirty", "source_ami", "os", "mlflow_version",
        "migration_head", "migration_count", "postgresql_major", "python_version", "launch_revision",
    )  # fmt: skip
    return {f"mlflow-ami:{name.replace('_', '-')}": tag_value(facts[name]) for name in named}


def tag_value(fact: Any) -> str:
    return str(fact).lower() if isinstance(fact, bool) else str(fact)


def tags_of(resource: dict[str, Any]) -> dict[str, str]:
    """A resource's tags as a dict."""
    return {tag["Key"]: tag["Value"] for tag in resource.get("Tags", [])}


def find(ec2: Any, tags: dict[str, str] | None = None) -> list[Image]:
    """This account's images made by bake.py that carry `tags`, newest first; unfinished and deprecated ones too."""
    filters = [{"Name": f"tag:{key}", "Values": [value]} for key, value in (tags or {}).items()]
    filters.append({"Name": "tag-key", "Values": [OURS]})
    found = ec2.describe_images(Owners=["self"], Filters=filters, IncludeDeprecated=True)["Images"]
    return sorted((read(image) for image in found), key=lambda image: (image.created, image.id), reverse=True)


def read(image: dict[str, Any]) -> Image:
    """An Image from what DescribeImages returns."""
    mappings = image.get("BlockDeviceMappings", [])
    return Image(
        id=image["ImageId"],
        name=image.get("Name", ""),
        created=image.get("CreationDate", ""),
        state=image.get("State", ""),
        tags=tags_of(image),
        snapshots=tuple(m["Ebs"]["SnapshotId"] for m in mappings if m.get("Ebs", {}).get("SnapshotId")),
    )


def delete(ec2: Any, image: Image) -> list[str]:
    """Deregisters an image, then deletes its snapshots; returns what went. Idempotent: what is gone is no error."""
    deleted = []
    if accepted(ec2.deregister_image, "InvalidAMIID", ImageId=image.id):
        deleted.append(f"image {image.id}")
    for snapshot in image.snapshots:
        if accepted(ec2.delete_snapshot, "InvalidSnapshot", SnapshotId=snapshot):
            deleted.append(f"snapshot {snapshot}")
    return deleted


def accepted(call: Any, gone: str, **arguments: Any) -> bool:
    """Calls EC2; False when it answers that the thing does not exist (an error code that starts with `gone`)."""
    try:
        call(**arguments)
    except ClientError as error:
        if error.response["Error"]["Code"].startswith(gone):
            return False
        raise
    return True


def in_use(ec2: Any) -> set[str]:
    """Ids of the images of every instance that is not terminated."""
    pages = ec2.get_paginator("describe_instances").paginate()
    instances = (
        instance for page in pages for reservation in page["Reservations"] for instance in reservation["Instances"]
    )
    return {instance["ImageId"] for instance in instances if instance["State"]["Name"] != "terminated"}


def superfluous(found: list[Image], used: set[str], keep: int, now: datetime) -> list[Image]:
    """What may go: all but the newest `keep` finished images, and unfinished ones nobody works on any more.

    An image that an instance runs on, or that is tagged mlflow-ami:keep, always stays.
    """
    newest = {image.id for image in [image for image in found if image.finished][:keep]}
    old = now - STALE
    return [
        image
        for image in found
        if image.id not in used | newest and not image.kept and (image.finished or created(image.created) < old)
    ]


def created(text: str) -> datetime:
    """EC2's time of creation; the beginning of time where there is none."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else datetime.min.replace(tzinfo=UTC)


def orphans(ec2: Any, found: list[Image]) -> list[str]:
    """Ids of snapshots that were made for images of ours which are gone."""
    kept = {snapshot for image in found for snapshot in image.snapshots}
    pages = ec2.get_paginator("describe_snapshots").paginate(
        OwnerIds=["self"], Filters=[{"Name": "tag-key", "Values": [OURS]}]
    )
    snapshots = [snapshot for page in pages for snapshot in page["Snapshots"]]
    return sorted(each["SnapshotId"] for each in snapshots if each["SnapshotId"] not in kept)


def stale_builders(ec2: Any, now: datetime) -> list[str]:
    """Ids of builders whose bake cannot be running any more, because its machine was switched off for instance."""
    pages = ec2.get_paginator("describe_instances").paginate(
        Filters=[{"Name": "tag-key", "Values": ["mlflow-ami:bake"]}]
    )
    instances = (
        instance for page in pages for reservation in page["Reservations"] for instance in reservation["Instances"]
    )
    return [
        instance["InstanceId"]
        for instance in instances
        if instance["State"]["Name"] not in ("terminated", "shutting-down") and instance["LaunchTime"] < now - STALE
    ]


def sweep(ec2: Any, keep: int, dry_run: bool) -> list[str]:
    """Deletes what is superfluous and returns what that was, or would be with `dry_run`. Idempotent."""
    now = datetime.now(UTC)
    found = find(ec2)
    going = superfluous(found, in_use(ec2), keep, now)
    stale, lost = stale_builders(ec2, now), orphans(ec2, found)
    planned = [f"builder {instance}" for instance in stale]
    for image in going:
        planned += [f"image {image.id}", *(f"snapshot {snapshot}" for snapshot in image.snapshots)]
    planned += [f"snapshot {snapshot}" for snapshot in lost]
    if not dry_run:
        if stale:
            ec2.terminate_instances(InstanceIds=stale)
        for image in going:
            delete(ec2, image)
        for snapshot in lost:
            accepted(ec2.delete_snapshot, "InvalidSnapshot", SnapshotId=snapshot)
    return planned


def line(image: Image, used: set[str]) -> str:
    """An image on one line: id, time, what is in it, why it stays."""
    tags = image.tags
    marks = [
        "in use" if image.id in used else "",
        "kept" if image.kept else "",
        "" if image.finished else "unfinished",
        "uncommitted changes" if tags.get("mlflow-ami:git-dirty") == "true" else "",
    ]
    return "  ".join(
        [
            f"{image.id:<21}  {image.created[:16]:<16}",
            f"MLflow {tags.get('mlflow-ami:mlflow-version', '?'):<8}",
            f"PostgreSQL {tags.get('mlflow-ami:postgresql-major', '?'):<2}",
            f"{tags.get('mlflow-ami:git-commit', '?')[:12]:<12}",
            ", ".join(mark for mark in marks if mark),
        ]
    ).rstrip()


def client(region: str | None, local: bool) -> Any:
    """An EC2 client, of the local cloud with `local`."""
    if local:
        from local_cloud import LocalCloud, LocalCloudError

        try:
            cloud = LocalCloud()
            cloud.up()
            return cloud.client("ec2")
        except LocalCloudError as error:
            raise CloudDown(str(error)) from None
    return boto3.client("ec2", region_name=region)


def main() -> int:
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument(
        "--region", default=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"), help="AWS region"
    )
    where.add_argument("--local", action="store_true", help="the embedded cloud's images")
    where.add_argument("--json", action="store_true", help="JSON on stdout")
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", parents=[where], help="our images, newest first, and why each one stays")
    sweeping = verbs.add_parser(
        "sweep",
        parents=[where],
        help="delete old images and their snapshots",
        description="Deletes all but the newest images with their snapshots, unfinished images, snapshots whose image "
        "is gone, and forgotten builders. An image that an instance runs on, or tagged mlflow-ami:keep stays.",
    )
    sweeping.add_argument("--keep", type=int, default=5, metavar="N", help="finished images to keep (default 5)")
    sweeping.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    arguments = parser.parse_args()
    if arguments.verb == "sweep" and arguments.keep < 1:
        parser.error(f"--keep {arguments.keep}: at least one image has to stay, or a stack has none to launch")
    try:
        ec2 = client(arguments.region, arguments.local)
        if arguments.verb == "list":
            found, used = find(ec2), in_use(ec2)
            if arguments.json:
                print(
                    json.dumps(
                        [asdict(image) | {"in_use": image.id in used, "finished": image.finished} for image in found]
                    )
                )
            else:
                print("\n".join(line(image, used) for image in found) or "no image yet: scripts/bake.py makes one")
        else:
            swept = sweep(ec2, arguments.keep, arguments.dry_run)
            if arguments.json:
                print(json.dumps({"deleted": [] if arguments.dry_run else swept, "planned": swept}))
            else:
                verb = "would delete" if arguments.dry_run else "deleted"
                print("\n".join(f"{verb} {each}" for each in swept) or "nothing to delete")
    except (BotoCoreError, ClientError, CloudDown) as error:
        print(f"images: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
