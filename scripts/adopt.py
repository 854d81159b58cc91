#!/usr/bin/env python3
"""Move from an MLflow server to a stack: copy the server's database and artifacts, and check that nothing was lost.

Examples:
  adopt.py ~/mlflow/mlflow.db                      a SQLite file
  adopt.py postgresql://mlflow@10.0.0.5/mlflow     a PostgreSQL database (RDS, a container, an EC2 instance)
  adopt.py mysql://mlflow@10.0.0.5/mlflow          a MySQL or MariaDB database
  adopt.py mlflow.dump                             a file of pg_dump, custom or plain
  adopt.py ~/experiments/mlruns                    a folder mlruns/
  adopt.py https://mlflow.example.com              a tracking server, if its database cannot be read.

Run adopt.py on a machine that can read the source and has AWS credentials for the stack's buckets. The options --stack
and --rehearsal select the stack, as in connect.py. The script never writes to the source. The script reads the source
in one snapshot, but a tracking server provides no snapshot. Do not pass passwords as arguments, because other users of
this machine can see the arguments of a process. Use PGPASSWORD or ~/.pgpass for PostgreSQL, and MYSQL_PWD or ~/.my.cnf
for MySQL. For a tracking server, set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.
IDs and dates stay the same, and artifact locations are rewritten. All tables of a database are copied. A tracking
server's API does not return all data; scripts/README.md lists the missing kinds. The stack's server stays up.

Steps of a move:
  1. rehearsal:       adopt.py SOURCE --dry-run     on the local cloud with --rehearsal, then on AWS
  2. first run:       adopt.py SOURCE               read the table that the script prints
  3. day of the move: stop writes to the old server, run adopt.py SOURCE again, configure clients for the new server.

A second run copies the changes since the first run. Changes that were made on the new server stay. After an interrupt
at any point, the new server has either no new data or all data. Run the script again to finish the adoption.

Artifacts are copied from the locations in the database: s3://… and local folders. If the old server serves artifacts
itself (mlflow-artifacts:/…) and SOURCE is not the server's URL, name the server's artifact store with --artifacts. For
a bucket of another AWS account, use --source-profile.

Users are not copied, because the old server hashes passwords in another way. The script prints the users.py commands
that add the old server's users to the stack. Gateway secrets and webhooks are encrypted with the old server's keys. The
script counts gateway secrets and webhooks, but does not copy them. With --with-secrets, the script copies them and
encrypts the secrets with the stack's passphrase. The script reads the old server's keys from environment variables with
the same names as on the old server, or asks you for the keys.

Exit status 0: all data was copied and is unchanged; 1: some data is missing, is changed or cannot be stored, and the
output lists this data; 2: an error, printed as one sentence; 130: interrupted.
"""

from __future__ import annotations

if __name__ == "__main__":
    import enter_venv  # noqa: F401 - this import restarts the script with the packages of .venv

# isort: split
import argparse
import dataclasses
import getpass
import json
import os
import sqlite3
import sys
import tempfile
import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3

from mlflow_host.contract import adoption
from mlflow_host.contract.adoption import AdoptionError, Manifest, Request
from scripts import aws_session, connect
from scripts.adopting import artifacts, encryption, row_files, sources, target, verdict
from scripts.adopting.artifacts import Outcome, Reader
from scripts.adopting.target import Api, Target
from scripts.adopting.verdict import Kind
from scripts.interrupts import end_like_ctrl_c

AUTH = "basic_auth.db"
"""The SQLite file with MLflow's users. Without --users, adopt.py looks for this file in the folder of SOURCE."""


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    end_like_ctrl_c()
    try:
        name = arguments.name or sources.default_name(arguments.source)
        adoption.key(name, "")
        return adopt(arguments, name, target.choose(arguments))
    except (AdoptionError, connect.NotConnected) as error:
        say(str(error))
        return 2
    except aws_session.ERRORS as error:
        say(aws_session.explain(error))
        return 2
    except KeyboardInterrupt:
        say("interrupted; the server is unchanged or complete: run adopt.py again to finish")
        return 130


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="adopt.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a file, a folder mlruns/, postgresql://…, mysql://… or https://…")
    connect.add_choice(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would be copied and what does not fit")
    parser.add_argument("--name", help="name of the source, the same at each run (default: from its file or database)")
    parser.add_argument("--prefix", default="", help="put this before the names of experiments and registered models")
    parser.add_argument(
        "--on-clash",
        choices=adoption.ON_CLASH,
        default="refuse",
        help="experiments and models whose names are in use: leave them out, or rename them (default: refuse all)",
    )
    parser.add_argument("--lossy", action="store_true", help="copy the rest when values or rows do not fit")
    secrets = parser.add_mutually_exclusive_group()
    secrets.add_argument(
        "--with-secrets",
        action="store_true",
        help="ask for the old server's passphrase, and encrypt its gateway secrets and webhooks with the stack's",
    )
    secrets.add_argument(
        "--without-secrets", action="store_true", help="do not count left-out gateway secrets and webhooks as a loss"
    )
    where = parser.add_argument_group("artifacts")
    where.add_argument("--artifacts", metavar="PLACE", default="", help="the old server's store: s3://…, folder or URL")
    where.add_argument("--leave-artifacts", action="store_true", help="copy no artifacts and keep their locations")
    where.add_argument("--source-profile", help="AWS profile that reads the source's buckets")
    where.add_argument("--source-endpoint", help="address of the source's S3-compatible store")
    parser.add_argument("--users", metavar="FILE", help=f"the old server's {AUTH}, if it had users")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser.parse_args(argv)


# The adoption


def adopt(arguments: argparse.Namespace, name: str, stack: Target) -> int:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mlflow-ami-adopt-") as scratch:
        folder = Path(scratch)
        manifest, reader = read_source(arguments, folder, stack)
        if arguments.with_secrets:
            manifest = encryption.encrypt_again(manifest, folder, old_secret, stack.passphrase())
        say(f"sending {sum(table.rows for table in manifest.tables.values()):,} rows to the backups bucket")
        row_files.upload(stack.s3, stack.buckets["backups"], name, manifest, folder)
        prepared = prepare(arguments, name, stack)
        if arguments.leave_artifacts:
            copied = Outcome()
        else:
            dry = arguments.dry_run or bool(prepared["refused"])
            copied = artifacts.copy(prepared["places"], reader, stack, say, dry_run=dry)
        if arguments.dry_run or prepared["refused"]:
            return report_dry_run(arguments, manifest, prepared, copied)
        stack.run(name, Request("", "load"), say)
        loaded = stack.read(name, "loaded.json")
        source = verdict.Source(folder, manifest, prepared)
        kinds = [*verdict.by_api(source, stack.api, say), verdict.by_rows(prepared, loaded)]
    if not arguments.leave_artifacts:
        kinds.append(kind_of_artifacts(copied))
    report = {
        "source": without_password(arguments.source),
        "name": name,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "kinds": [dataclasses.asdict(kind) for kind in kinds],
        "left": prepared["left"],
        "encrypted": prepared["encrypted"],
        "skipped": prepared["skipped"],
        "clashes": prepared["clashes"],
        "left_places": prepared["left_places"],
        "empty_places": copied.empty,
        "experiments": prepared["experiments"],
        "gone": loaded.get("gone", {}),
        "dump": loaded["dump"],
        "loaded": loaded,
        "seconds": {"prepare": prepared["seconds"], "load": loaded["seconds"], "artifacts": round(copied.seconds, 1)},
        "users": users_lines(arguments),
    }
    stack.write(name, f"report-{loaded['file']}", json.dumps(report, indent=2).encode())
    stack.run(name, Request("", "report"), say)
    forget_rows(stack, name, manifest)
    return print_verdict(arguments, report, kinds, time.monotonic() - begun)


def read_source(arguments: argparse.Namespace, folder: Path, stack: Target) -> tuple[Manifest, Reader]:
    say(f"reading {without_password(arguments.source)}")
    base = arguments.artifacts or (arguments.source if sources.server_url(arguments.source) else "")
    old = next((url for url in (arguments.source, base) if sources.server_url(url)), None)
    server = old_server(old) if old else None
    if base and not urlsplit(base).scheme:
        base = str(Path(base).resolve())
    with sources.read(arguments.source, server, say) as snapshot:
        manifest = row_files.write(snapshot, folder)
        say(f"{snapshot.kind} at migration {snapshot.head}, {len(manifest.tables)} tables")
        session = boto3.Session(profile_name=arguments.source_profile, region_name=stack.s3.meta.region_name)
        s3 = session.client("s3", endpoint_url=arguments.source_endpoint) if session.get_credentials() else stack.s3
        same = s3.meta.endpoint_url == stack.s3.meta.endpoint_url or all(
            ".amazonaws.com" in each.meta.endpoint_url for each in (s3, stack.s3)
        )
        remote = sources.server_url(arguments.source)
        return manifest, Reader(snapshot.folder, base, s3, same, server, remote, snapshot.traces)


def old_server(url: str) -> Api:
    """An API client for the old server. The environment variables of MLflow's clients contain login and certificate."""
    if urlsplit(url).password:
        raise AdoptionError(
            "the URL contains a password, which other users of this machine see: set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD instead"
        )
    return Api(url.rstrip("/"), old_login(), os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"))


def old_login() -> dict[str, str]:
    token, user = os.environ.get("MLFLOW_TRACKING_TOKEN"), os.environ.get("MLFLOW_TRACKING_USERNAME")
    if token:
        return {"Authorization": f"Bearer {token}"}
    return target.basic(user, os.environ.get("MLFLOW_TRACKING_PASSWORD", "")) if user else {}


def old_secret(variable: str) -> str:
    """The value that an environment variable has on the old server. The function reads the value from the same variable
    on this machine, or asks the user for the value."""
    return os.environ.get(variable) or getpass.getpass(f"{variable} of the old server (Enter if it had none): ")


def prepare(arguments: argparse.Namespace, name: str, stack: Target) -> dict[str, Any]:
    request = Request(
        id="",
        action="prepare",
        dry_run=arguments.dry_run,
        prefix=arguments.prefix,
        on_clash=arguments.on_clash,
        leave_artifacts=arguments.leave_artifacts,
        lossy=arguments.lossy,
        with_secrets=arguments.with_secrets,
    )
    stack.run(name, request, say)
    return dict(stack.read(name, "prepared.json.gz"))


def forget_rows(stack: Target, name: str, manifest: Manifest) -> None:
    """Delete the row files in the backups bucket. The reports stay."""
    for table in manifest.tables:
        stack.s3.delete_object(Bucket=stack.buckets["backups"], Key=adoption.key(name, f"rows/{table}.gz"))


def users_lines(arguments: argparse.Namespace) -> list[str]:
    """The users.py commands that add the old server's users to the stack."""
    file = Path(arguments.users) if arguments.users else Path(arguments.source).parent / AUTH
    if not file.is_file():
        return []
    with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as opened:
        try:
            found = opened.execute("SELECT username, is_admin FROM users ORDER BY username").fetchall()
        except sqlite3.DatabaseError as error:
            raise AdoptionError(f"{file} is not MLflow's database of users: {error}") from None
    return [f"scripts/users.py add {user} --role {'admin' if admin else 'writer'}" for user, admin in found]


# Output


def kind_of_artifacts(copied: Outcome) -> Kind:
    """The verdict about the artifacts. A location whose files cannot be listed counts as one missing artifact."""
    carried = copied.copied + copied.there
    return Kind("artifacts", carried + len(copied.failed), carried, len(copied.failed), 0, copied.failed)


def report_dry_run(arguments: argparse.Namespace, manifest: Manifest, prepared: dict[str, Any], copied: Outcome) -> int:
    """Print the result of a dry run. The exit status is 0 if nothing prevents the adoption."""
    tell_about(prepared, copied)
    counts = {table: entry.rows for table, entry in manifest.tables.items() if entry.rows}
    if arguments.json:
        print(json.dumps({**prepared, "rows": counts, "artifacts": dataclasses.asdict(copied)}, indent=2))
    else:
        for table, count in counts.items():
            print(f"{count:>12,}  {table}")
        print(f"{copied.files:>12,}  artifacts, {artifacts.size(copied.bytes)} to copy")
        print(f"The machine prepared the rows in {prepared['seconds']:.0f} s. Loading the rows takes about as long.")
    for sentence in prepared["refused"]:
        say(sentence)
    say("nothing was changed on the server")
    return 1 if prepared["refused"] or copied.failed or prepared["left"] else 0


def tell_about(report: dict[str, Any], copied: Outcome | None = None) -> None:
    for clash in report["clashes"]:
        say(f"{clash['kind']} {clash['name']!r} is in use on the server ({clash['settled']})")
    for entry in [*report["left"], *report.get("encrypted", ())]:
        where = f"{entry['table']}.{entry['column']}" if entry["column"] else entry["table"]
        say(f"{where}: {entry['count']:,} {entry['remedy']} ({entry['reason']})")
    for table, count in report.get("gone", {}).items():
        say(f"{table}: {count:,} rows are no longer at the source; they stay on the server")
    for place in report["left_places"]:
        say(f"artifacts stay at {place}: clients need s3:ListBucket and s3:GetObject for it")
    for line in copied.failed[: verdict.SHOWN] if copied else ():
        say(line)


def print_verdict(arguments: argparse.Namespace, report: dict[str, Any], kinds: list[Kind], seconds: float) -> int:
    tell_about(report)
    for kind in kinds:
        for line in kind.lines[: verdict.SHOWN]:
            say(line)
    for line in report["empty_places"]:
        say(line)
    left = [*report["left"], *(() if arguments.without_secrets else report["encrypted"])]
    lost = sum(kind.missing + kind.changed for kind in kinds) + sum(entry["count"] for entry in left)
    print(table(kinds), file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps({**report, "lost": lost}, indent=2))
    for line in report["users"]:
        print(line, file=sys.stderr if arguments.json else sys.stdout)
    say(f"{lost:,} are missing or changed" if lost else f"everything is there, unchanged ({seconds:.0f} s)")
    say(f"the dump from before the adoption: {report['dump']}")
    return 1 if lost else 0


def table(kinds: list[Kind]) -> str:
    lines = [("kind", "there", "carried", "missing", "changed")]
    lines += [(k.kind, f"{k.there:,}", f"{k.carried:,}", f"{k.missing:,}", f"{k.changed:,}") for k in kinds]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        line[0].ljust(widths[0])
        + "".join(f"  {cell.rjust(width)}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


def without_password(source: str) -> str:
    where = urlsplit(source)
    return source.replace(f":{where.password}@", ":…@") if "://" in source and where.password else source


def say(text: str) -> None:
    for line in text.splitlines() or [""]:
        print(f"adopt: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
