#!/usr/bin/env python3
"""Restore a backups bucket to its state at a given time, for example to the last minute before a break-in.

The machine's role cannot delete versions of objects, so replaced and deleted backups are kept for
`backupRetentionDays`. If an object was replaced or deleted after the given time, the script copies the version of that
time, and the copy becomes the current version. An object that was created after the given time gets a delete marker.
The script deletes no version, so you can run it again, also with a different time. The script prints the changes and
asks for confirmation; --yes skips the question. The audit trail (audit/) is not changed, because the machine's role
cannot change it.

  recover_backups.py --bucket mlflow-backups-1a2b3c4 --before 2026-11-29T12:00:00Z --dry-run
  recover_backups.py --bucket mlflow-backups-1a2b3c4 --before 2026-11-29T12:00:00Z

`pulumi stack output buckets` prints the bucket's name. Terminate the machine first, because a running machine writes to
the bucket. Your AWS credentials need s3:ListBucketVersions, s3:GetObjectVersion, s3:PutObject and s3:DeleteObject. The
script prints JSON on standard output. The exit status is 2 after an error that you can correct.
"""

from __future__ import annotations

if __name__ == "__main__":
    import enter_venv  # noqa: F401 - starts this script again with the project's packages

# isort: split
import argparse
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mlflow_host.contract import audit_trail
from scripts import aws_session, prompts


@dataclass(frozen=True)
class Entry:
    """A version of an object, or a delete marker of the object (`marker` is True)."""

    key: str
    version: str
    at: datetime
    latest: bool
    marker: bool


@dataclass(frozen=True)
class Plan:
    copies: list[Entry]
    """The versions that are copied to become the current versions, oldest first."""
    hidden: list[str]
    """Keys of objects that did not exist at the given time."""


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    until = f"{arguments.before:%Y-%m-%d %H:%M:%S} UTC"
    try:
        s3 = aws_session.choose(arguments.region).client("s3")
        found = plan(entries(s3, arguments.bucket), arguments.before)
        if not arguments.dry_run and (found.copies or found.hidden):
            list_changes(found, until)
            if not arguments.yes and not prompts.confirmed("Change the bucket? Type yes: "):
                say("nothing was changed: type yes at a terminal, or give --yes")
                return 2
            recover(s3, arguments.bucket, found)
    except aws_session.ERRORS as error:
        say(aws_session.explain(error, arguments.region))
        return 2
    except KeyboardInterrupt:
        return 130
    done = "would be" if arguments.dry_run else "are"
    say(f"{len(found.copies)} objects {done} restored to their state at {until}")
    say(f"{len(found.hidden)} newer objects {done} hidden")
    print(json.dumps({"restored": [each.key for each in found.copies], "hidden": found.hidden}, indent=2))
    return 0


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bucket", required=True, help="the stack's backups bucket")
    parser.add_argument("--before", required=True, type=moment, metavar="TIME", help="such as 2026-11-29T12:00:00Z")
    parser.add_argument("--region", help=f"default: {aws_session.WHERE}")
    parser.add_argument("--dry-run", action="store_true", help="show what would change; change nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    return parser.parse_args(argv)


def list_changes(found: Plan, until: str) -> None:
    for each in found.copies:
        say(f"restored to its state at {until}: {each.key}")
    for key in found.hidden:
        say(f"hidden, because it is newer: {key}")


def moment(text: str) -> datetime:
    """Parse a time. A time without a UTC offset is in UTC. Raises ValueError."""
    found = datetime.fromisoformat(text)
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def entries(s3: Any, bucket: str) -> list[Entry]:
    """Return all object versions and delete markers in the bucket, except the objects of the audit trail."""
    return [
        Entry(each["Key"], each["VersionId"], each["LastModified"], each["IsLatest"], kind == "DeleteMarkers")
        for page in s3.get_paginator("list_object_versions").paginate(Bucket=bucket)
        for kind in ("Versions", "DeleteMarkers")
        for each in page.get(kind, [])
        if not each["Key"].startswith(audit_trail.PREFIX)
    ]


def plan(found: list[Entry], before: datetime) -> Plan:
    """Compare the bucket's current state with its state at `before`. S3 records times in whole seconds. A version that
    was created exactly at `before` is part of the old state."""
    by_key: dict[str, list[Entry]] = defaultdict(list)
    for entry in found:
        by_key[entry.key].append(entry)
    copies, hidden = [], []
    for key, versions in by_key.items():
        current = next((each for each in versions if each.latest), None)
        then = max(
            (each for each in versions if each.at <= before), key=lambda each: (each.at, each.latest), default=None
        )
        there_now, there_then = (each is not None and not each.marker for each in (current, then))
        if there_then and then is not None and then != current:
            copies.append(then)
        elif there_now and not there_then:
            hidden.append(key)
    return Plan(sorted(copies, key=lambda each: (each.at, each.key)), sorted(hidden))


def recover(s3: Any, bucket: str, found: Plan) -> None:
    for each in found.copies:
        source = {"Bucket": bucket, "Key": each.key, "VersionId": each.version}
        s3.copy(source, bucket, each.key)
    for key in found.hidden:
        s3.delete_object(Bucket=bucket, Key=key)


def say(text: str) -> None:
    print(f"recover_backups: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
