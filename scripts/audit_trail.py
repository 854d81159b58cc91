#!/usr/bin/env python3
"""Print the server's audit trail: which user changed which objects, and which changes were refused.

Examples:
  audit_trail.py                                  the last 24 hours
  audit_trail.py --since 7d --user ada            one user's changes
  audit_trail.py --since 2026-11-29T12:00 --until 2026-11-29T13:00 --refused
  audit_trail.py --bucket mlflow-backups-1a2b3c4 --region eu-central-1 --profile ops
  audit_trail.py --since 30d --id 0f3b6c1e4f… --json      all changes of a run, as JSON lines.

The machine adds an object to the backups bucket every ten minutes and when the machine stops. For lines that are not in
the bucket yet, run `journalctl --namespace=mlflow-audit` on the machine. The options --stack and --rehearsal select the
stack, as in connect.py. With --bucket, the script needs neither Pulumi nor a stack. The script uses your AWS
credentials, which need the rights s3:ListBucket and s3:GetObject.

A line has the time of the request's end (UTC), the user and role, the address, the method, MLflow's route, the IDs and
names in the request and in its response, and the status. A line contains no request body and no password. If `login` is
"refused", the password was wrong or was not checked, and the user name is only the name that the client sent.

Exit status 0: success, even without a matching line; 2: an error that you can correct.
"""

from __future__ import annotations

if __name__ == "__main__":
    import enter_venv  # noqa: F401 - this import restarts the script with the packages of .venv

# isort: split
import argparse
import gzip
import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from mlflow_host.contract import audit_trail
from scripts import aws_session, connect

AT_ONCE = 8
LONGEST = timedelta(days=1)
"""The script does not read an object whose first line is older than `since` by more than this time. An object has the
lines of about ten minutes."""
UNITS = {"m": "minutes", "h": "hours", "d": "days"}
STRANGE = re.compile(r"[^ -~\u00a1-\U0010ffff]")


class NotRead(Exception):
    """The audit trail cannot be read. The message contains the remedy."""


@dataclass(frozen=True)
class Wanted:
    since: datetime
    until: datetime
    user: str | None = None
    item: str | None = None
    route: str | None = None
    refused: bool = False

    def has(self, line: dict[str, Any]) -> bool:
        """Whether the line matches all filters."""
        return (
            self.since <= datetime.fromisoformat(line["time"]) <= self.until
            and self.user in (None, line.get("user"))
            and (self.item is None or any(names(value, self.item) for value in line.get("ids", {}).values()))
            and (self.route is None or self.route in (line.get("route") or line.get("path") or ""))
            and (not self.refused or line["login"] == "refused" or line["status"] >= 400)
        )


def names(value: str, item: str) -> bool:
    """Whether a value in a line names the item. A value is an ID, several IDs with commas, or the path of a file."""
    return item == value or item in re.split("[,/]", value)


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    wanted = Wanted(arguments.since, arguments.until, arguments.user, arguments.id, arguments.route, arguments.refused)
    try:
        s3, bucket = choose(arguments)
        objects, found = read(s3, bucket, wanted)
    except aws_session.ERRORS as error:
        say(aws_session.explain(error, arguments.region))
        return 2
    except (connect.NotConnected, NotRead) as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    for line in found:
        print(json.dumps(line) if arguments.json else shown(line))
    say(f"{len(found)} lines in {objects} objects of {bucket}")
    return 0


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="audit_trail.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    connect.add_choice(parser)
    parser.add_argument("--bucket", help="the stack's backups bucket, instead of a stack")
    parser.add_argument("--region", help=f"of --bucket; default: {aws_session.WHERE}")
    parser.add_argument("--profile", help="of --bucket; default: AWS_PROFILE")
    when = "a time (UTC without an offset) such as 2026-11-29T12:00, or its age: 30m, 24h, 7d"
    parser.add_argument("--since", type=moment, default=moment("24h"), metavar="TIME", help=f"{when}; default: 24h")
    parser.add_argument("--until", type=moment, default=moment("0m"), metavar="TIME", help="as --since; default: now")
    parser.add_argument("--user", help="only this user's")
    parser.add_argument(
        "--id",
        help="only those that name this ID or name: a run (its files included), an experiment, a model, a file's path",
    )
    parser.add_argument("--route", help="only routes that contain this text, such as registered-models")
    parser.add_argument("--refused", action="store_true", help="only refused logins, and statuses of 400 or above")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    arguments = parser.parse_args(argv)
    if arguments.bucket and (arguments.stack or arguments.rehearsal):
        parser.error("--bucket is instead of --stack and --rehearsal")
    if not arguments.bucket and (arguments.region or arguments.profile):
        parser.error("--region and --profile are for --bucket; a stack has its own (aws:region, aws:profile)")
    return arguments


def moment(text: str) -> datetime:
    """Convert the text of a time or of an age to a datetime. A time without an offset is in UTC. An age is subtracted
    from the current time. Raises argparse.ArgumentTypeError."""
    if age := re.fullmatch(r"(\d{1,6})([mhd])", text):
        return datetime.now(UTC) - timedelta(**{UNITS[age[2]]: int(age[1])})
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a time such as 2026-11-29T12:00 nor an age such as 7d"
        ) from None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def choose(arguments: argparse.Namespace) -> tuple[Any, str]:
    """An S3 client, and the name of the backups bucket. Raises NotRead, connect.NotConnected or aws_session.ERRORS."""
    if arguments.bucket:
        return aws_session.choose(arguments.region, arguments.profile).client("s3"), arguments.bucket
    if arguments.stack is None and (arguments.rehearsal or connect.rehearsal_exists()):
        from scripts.local_cloud import LocalCloud

        found = connect.from_rehearsal().facts
        return LocalCloud().client("s3"), found["buckets"]["backups"]
    from scripts import pulumi_stack

    try:
        outputs = pulumi_stack.run("stack", "output", "--json", stack=arguments.stack)
        if "buckets" not in outputs:
            raise NotRead(
                f"the stack {arguments.stack or 'selected in infra/'} has no outputs yet: run `pulumi up` first"
            )
        client = pulumi_stack.client("s3", pulumi_stack.provider_settings(arguments.stack))
    except (pulumi_stack.PulumiError, OSError) as error:
        raise NotRead(str(error)) from None
    return client, outputs["buckets"]["backups"]


def read(s3: Any, bucket: str, wanted: Wanted) -> tuple[int, list[dict[str, Any]]]:
    """The number of objects that were read, and the matching lines in the order of their times."""
    keys = [*keys_of(s3, bucket, wanted)]
    with ThreadPoolExecutor(AT_ONCE) as several:
        found = [line for lines in several.map(lambda key: lines_of(s3, bucket, key, wanted), keys) for line in lines]
    return len(keys), sorted(found, key=lambda line: str(line["time"]))


def keys_of(s3: Any, bucket: str, wanted: Wanted) -> Iterator[str]:
    """The keys of the objects that may contain lines between the two times of `wanted`."""
    pages = s3.get_paginator("list_objects_v2").paginate(
        Bucket=bucket, Prefix=audit_trail.PREFIX, StartAfter=audit_trail.folder(wanted.since - LONGEST)
    )
    for page in pages:
        for each in page.get("Contents", []):
            span = audit_trail.span_of(each["Key"])
            if span is None:
                continue
            if span.first > wanted.until:
                return
            if span.last >= wanted.since.replace(microsecond=0):
                yield each["Key"]


def lines_of(s3: Any, bucket: str, key: str, wanted: Wanted) -> list[dict[str, Any]]:
    """The lines of an object that match the filters. Raises NotRead."""
    with s3.get_object(Bucket=bucket, Key=key)["Body"] as body:
        try:
            with gzip.open(body, "rt", encoding="utf-8") as lines:
                return [line for line in map(json.loads, lines) if wanted.has(line)]
        except (OSError, EOFError, ValueError) as error:
            raise NotRead(f"s3://{bucket}/{key} is damaged ({error}): read its older versions") from None


def shown(line: dict[str, Any]) -> str:
    """A line as readable text. Control characters and other characters that could change the terminal are replaced."""
    if "more_refusals" in line:
        return f"{line['time']}  {line['address']}  {line['more_refusals']} more refusals in this minute"
    user = line["user"] or "-"
    who = f"{user} ({line['role']})" if line["login"] == "accepted" else f"{user} (login refused)"
    ids = " ".join(f"{name}={value}" for name, value in line["ids"].items())
    what = f"{line['method']} {line['route'] or line['path']}"
    return STRANGE.sub("?", "  ".join([line["time"], who, line["address"], what, str(line["status"]), ids]).rstrip())


def say(text: str) -> None:
    print(f"audit_trail: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
