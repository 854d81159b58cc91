#!/usr/bin/env python3
"""Delete a stack with its data. `pulumi destroy` alone fails, because Pulumi protects the resources with data.

The script lists the resources to delete and to keep, and asks for the stack's name. Then the script terminates the
machine, so that no program changes the data. With --keep, the script downloads the newest dump of the database and all
artifacts. Then the script deletes every object version in the buckets and removes Pulumi's protection. At the end,
`pulumi destroy` deletes the remaining resources. Each step is idempotent: after an interrupt, run the script again.

  retire_stack.py --stack dev --dry-run         show what would be deleted; delete nothing
  retire_stack.py --stack dev --keep ./leaving  download the data first
  retire_stack.py --stack dev                   delete the stack and its data

Images (scripts/images.py), snapshots and CloudWatch's metrics are kept. Exit status 2 means an error that you can
correct.
"""

from __future__ import annotations

if __name__ == "__main__":
    import enter_venv  # noqa: F401 - this import restarts the script with the packages of .venv

# isort: split
import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from mlflow_host.contract.restore_request import DUMPS, is_dump
from scripts import aws_session

PROGRAM = Path(__file__).resolve().parents[1] / "infra"
INSTANCE = "aws:ec2/instance:Instance"
BATCH = 1000
"""Maximum number of objects that S3 deletes in one request."""


class DeletionRefused(Exception):
    """The stack cannot be deleted. The error's message contains the reason and the remedy."""


@dataclass(frozen=True)
class DoomedStack:
    name: str
    region: str | None
    resources: list[dict[str, Any]]
    outputs: dict[str, Any]

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [each for each in self.resources if each["type"] == kind]

    @property
    def buckets(self) -> dict[str, str]:
        """Purpose of a bucket (artifacts, models or backups) → name of the bucket."""
        return {_name(each).removeprefix("mlflow-"): each["id"] for each in self.of_type("aws:s3/bucket:Bucket")}


@dataclass(frozen=True)
class Contents:
    """The contents of a bucket: number of objects, number of older versions, and bytes of all versions."""

    objects: int
    bytes: int
    versions: int


def main() -> int:
    arguments = read_arguments()
    try:
        retire(arguments)
    except aws_session.ERRORS as error:
        say(aws_session.explain(error))
        return 2
    except DeletionRefused as error:
        say(" ".join(str(error).split()))
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", required=True, metavar="NAME", help="the Pulumi stack of infra/ to delete")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="download the newest dump and all artifacts first")
    parser.add_argument("--dry-run", action="store_true", help="show what would be deleted; delete nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask for the stack's name")
    return parser.parse_args()


def retire(arguments: argparse.Namespace) -> None:
    pulumi = in_folder(PROGRAM, os.environ)
    stack = read_stack(pulumi, arguments.stack)
    s3 = aws_session.choose(stack.region).client("s3")
    for line in plan(s3, stack, arguments.keep):
        print(line)
    if arguments.dry_run:
        return
    if not arguments.yes and not confirmed(stack.name):
        raise DeletionRefused("nothing was deleted: the name was not typed")
    remove_machine(pulumi, stack)
    if arguments.keep:
        download(s3, stack.buckets, arguments.keep)
    for bucket in stack.buckets.values():
        say(f"emptying {bucket}")
        empty(s3, bucket)
    unprotect(pulumi, stack.name)
    pulumi("destroy", "--yes", "--skip-preview", "--stack", stack.name)
    say(f"the stack {stack.name} is deleted; `pulumi stack rm {stack.name}` removes its name and settings")


# Reading the stack


Pulumi = Callable[..., str]


def in_folder(folder: Path, environment: Mapping[str, str]) -> Pulumi:
    """Return a function that runs `pulumi` in this folder and returns its standard output. The returned function raises
    DeletionRefused if `pulumi` is missing or fails."""

    def pulumi(*arguments: str) -> str:
        program = shutil.which("pulumi", path=environment.get("PATH"))
        if program is None:
            raise DeletionRefused("`pulumi` is not on PATH: install it, as https://www.pulumi.com/docs/install/ says")
        quiet = arguments[0] == "stack"
        done = subprocess.run(
            [program, *arguments, "--non-interactive"],
            cwd=folder,
            env=dict(environment),
            text=True,
            stdout=subprocess.PIPE if quiet else sys.stderr,
            stderr=subprocess.PIPE if quiet else None,
        )
        if done.returncode != 0:
            reason = (done.stderr or "").strip() or "its error is above"
            raise DeletionRefused(f"pulumi {' '.join(arguments[:2])} failed: {reason}")
        return done.stdout or ""

    return pulumi


def read_stack(pulumi: Pulumi, name: str) -> DoomedStack:
    """Return the stack's resources and outputs with encrypted secrets. Raises DeletionRefused for an empty stack."""
    resources = json.loads(pulumi("stack", "export", "--stack", name))["deployment"].get("resources") or []
    roots = [each for each in resources if each["type"] == "pulumi:pulumi:Stack"]
    if not roots:
        raise DeletionRefused(f"the stack {name} has no resources: there is nothing to delete")
    providers = [each for each in resources if each["type"] == "pulumi:providers:aws"]
    region = providers[0].get("inputs", {}).get("region") if providers else None
    return DoomedStack(name, region, resources, roots[0].get("outputs") or {})


def plan(s3: Any, stack: DoomedStack, keep: Path | None) -> Iterator[str]:
    """Yield the lines that list the resources to delete and to keep."""
    count = len([each for each in stack.resources if each.get("custom")])
    yield f"Deletes the stack {stack.name}: {count} resources, of which these hold data:"
    for purpose, bucket in stack.buckets.items():
        held = contents(s3, bucket)
        yield (
            f"  bucket {bucket} ({purpose}): {held.objects} objects, {held.bytes / 2**20:.1f} MiB, and "
            f"{held.versions} older versions"
        )
    for each in stack.of_type("aws:ebs/volume:Volume"):
        yield f"  data volume {each['id']} with the database: {each['outputs'].get('size')} GiB"
    for each in stack.of_type("aws:ssm/parameter:Parameter"):
        yield f"  parameter {each['id']}"
    for each in stack.of_type("aws:ec2/eip:Eip"):
        yield f"  address {each['outputs'].get('publicIp')}, which AWS may then give to another account"
    newest = newest_dump(s3, stack.buckets["backups"]) if "backups" in stack.buckets else None
    if keep is None:
        yield "Downloads nothing: --keep FOLDER downloads the newest dump and all artifacts first."
    elif newest is None:
        yield f"Keeps all artifacts in {keep}, but there is no dump: run `mlflow-host-dump` on the machine first."
    else:
        yield (
            f"Downloads to {keep}: all artifacts, and the dump {newest['Key']} of "
            f"{newest['LastModified']:%Y-%m-%d %H:%M} UTC (`mlflow-host-dump` on the machine takes a newer dump)."
        )
    yield "Keeps images, snapshots and metrics."


def contents(s3: Any, bucket: str) -> Contents:
    objects = size = versions = 0
    for page in pages(s3, bucket):
        for each in page.get("Versions", []):
            size += each.get("Size", 0)
            objects += bool(each["IsLatest"])
            versions += not each["IsLatest"]
    return Contents(objects, size, versions)


def pages(s3: Any, bucket: str) -> Iterator[dict[str, Any]]:
    """Yield the pages that list every object version in the bucket. If the bucket does not exist, yield nothing."""
    try:
        yield from s3.get_paginator("list_object_versions").paginate(Bucket=bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] != "NoSuchBucket":
            raise


def newest_dump(s3: Any, bucket: str) -> dict[str, Any] | None:
    """Return the object of the newest dump, or None if there is no dump."""
    found = [
        each
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=DUMPS)
        for each in page.get("Contents", [])
        if is_dump(each["Key"])
    ]
    return max(found, key=lambda each: (each["LastModified"], each["Key"]), default=None)


def confirmed(name: str) -> bool:
    print(f"Type the stack's name, {name}, to delete it: ", end="", file=sys.stderr, flush=True)
    return bool(sys.stdin) and sys.stdin.readline().strip() == name


# Deleting


def remove_machine(pulumi: Pulumi, stack: DoomedStack) -> None:
    """Delete the instance and its dependent resources, so that no program writes to the volume and the buckets."""
    for each in stack.of_type(INSTANCE):
        say("terminating the machine")
        pulumi(
            *("destroy", "--yes", "--skip-preview", "--stack", stack.name),
            *("--target", each["urn"], "--target-dependents"),
        )


def download(s3: Any, buckets: Mapping[str, str], folder: Path) -> None:
    """Download the newest dump and every current object of the artifacts and models buckets. A complete file is not
    downloaded again."""
    wanted = []
    if "backups" in buckets and (newest := newest_dump(s3, buckets["backups"])):
        wanted.append(("backups", newest))
    for purpose, bucket in buckets.items():
        if purpose == "backups":
            continue
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            wanted += [(purpose, each) for each in page.get("Contents", [])]
    for purpose, each in wanted:
        path = folder / purpose / each["Key"]
        if each["Key"].endswith("/") or (path.exists() and path.stat().st_size == each["Size"]):
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise DeletionRefused(f"the object {each['Key']!r} of {buckets[purpose]} names a file outside {folder}")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        s3.download_file(buckets[purpose], each["Key"], str(part))
        part.replace(path)
    say(f"{len(wanted)} objects are in {folder}")


def empty(s3: Any, bucket: str) -> None:
    """Delete every version of every object, and abort unfinished uploads."""
    for page in pages(s3, bucket):
        found = [*page.get("Versions", []), *page.get("DeleteMarkers", [])]
        entries = [{"Key": each["Key"], "VersionId": each["VersionId"]} for each in found]
        for start in range(0, len(entries), BATCH):
            batch = entries[start : start + BATCH]
            failed = s3.delete_objects(Bucket=bucket, Delete={"Objects": batch, "Quiet": True}).get("Errors", [])
            if failed:
                first = failed[0]
                raise DeletionRefused(f"{bucket}: {first['Key']} is not deleted: {first['Code']} {first['Message']}")
    try:
        uploads = s3.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    except ClientError as error:
        if error.response["Error"]["Code"] != "NoSuchBucket":
            raise
        return
    for each in uploads:
        s3.abort_multipart_upload(Bucket=bucket, Key=each["Key"], UploadId=each["UploadId"])


def unprotect(pulumi: Pulumi, name: str) -> None:
    """Remove Pulumi's protection from all resources of the stack. The next `pulumi up` would restore the protection."""
    pulumi("state", "unprotect", "--all", "--yes", "--stack", name)


def _name(resource: dict[str, Any]) -> str:
    return str(resource["urn"].rsplit("::", 1)[-1])


def say(text: str) -> None:
    print(f"retire_stack: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
