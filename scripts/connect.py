#!/usr/bin/env python3
"""Print what an MLflow client must export to reach the server: `eval "$(scripts/connect.py)"`.

Where the server is comes from a Pulumi stack's outputs (--stack), or from the rehearsal on this machine (--rehearsal).
With neither it is the rehearsal if there is one, else the Pulumi stack selected in infra/. The password is read from
the stack's credentials parameter with your AWS credentials; it is in no stack output.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rehearsal.errors import RehearsalError
from rehearsal.status import authority, client_environment, first_user, keep_certificate

PROGRAM = Path(__file__).resolve().parent.parent / "infra"


class NotConnected(Exception):
    """There is no server to tell of, or no way in; the message says what to do."""


@dataclass(frozen=True)
class Stack:
    """A launched stack: its name, a client of the Systems Manager that holds its parameters, and facts of it."""

    name: str
    ssm: Any
    facts: dict[str, Any]
    """url, credentials_parameter, authority_parameter, named as in `rehearse.py status --json`."""
    certificate: Path
    """Where the certificate of its private authority is kept for clients."""


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    try:
        environment = client_environment(way_in(choose(arguments)))
    except NotConnected as error:
        print(f"connect: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps(environment, indent=2) if arguments.json else export_lines(environment))
    return 0


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="connect.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_choice(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of export lines")
    return parser.parse_args(argv)


def add_choice(parser: argparse.ArgumentParser) -> None:
    """The arguments that `choose` reads."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--stack", metavar="NAME", help="a Pulumi stack of infra/")
    where.add_argument("--rehearsal", action="store_true", help="the server that rehearse.py launched here")


def choose(arguments: argparse.Namespace) -> Stack:
    """The stack the arguments mean. Raises NotConnected."""
    if arguments.stack is None and (arguments.rehearsal or rehearsal_exists()):
        return from_rehearsal()
    return from_pulumi(arguments.stack)


def export_lines(environment: dict[str, str]) -> str:
    """`export` lines that any POSIX shell takes, whatever is in the values."""
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment.items())


# The rehearsal


def rehearsal_exists() -> bool:
    from rehearsal import stack

    return stack.state_path().exists()


def from_rehearsal() -> Stack:
    from local_cloud import LocalCloud, LocalCloudError
    from rehearsal import stack, state, status

    try:
        current = state.load(stack.state_path())
        cloud = LocalCloud()
        if not current.outputs or not cloud.is_up():
            raise NotConnected("no rehearsal is running here: launch one with `scripts/rehearse.py up`")
        return Stack(stack.name(), cloud.client("ssm"), status.outline(current), stack.certificate_path())
    except (LocalCloudError, RehearsalError) as error:
        raise NotConnected(str(error)) from None


# A Pulumi stack


def from_pulumi(name: str | None) -> Stack:
    outputs = pulumi("stack", "output", "--json", *selected(name))
    missing = [each for each in ("url", "credentialsParameter") if each not in outputs]
    if missing:
        raise NotConnected(f"the stack {name or 'selected in infra/'} has no outputs yet: run `pulumi up` first")
    import boto3

    region = region_of(name)
    client = boto3.client("ssm", region_name=region)
    found = {
        "url": outputs["url"],
        "credentials_parameter": outputs["credentialsParameter"],
        "authority_parameter": outputs.get("authorityParameter"),
    }
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Stack(name or "selected", client, found, cache / f"mlflow-ami-{name or 'selected'}.pem")


def region_of(name: str | None) -> str | None:
    """The stack's aws:region, None when the environment decides."""
    try:
        config = pulumi("config", "--json", *selected(name))
    except NotConnected:
        return None
    return dict(config.get("aws:region", {})).get("value")


def selected(name: str | None) -> list[str]:
    return ["--stack", name] if name else []


def pulumi(*arguments: str) -> dict[str, Any]:
    """What a Pulumi command prints as JSON. Raises NotConnected with Pulumi's own words when it fails."""
    if shutil.which("pulumi") is None:
        raise NotConnected(
            "there is no rehearsal here and no pulumi on PATH: launch a server with `scripts/rehearse.py up`, or "
            "install Pulumi (https://www.pulumi.com/docs/install/) to read a stack's outputs"
        )
    done = subprocess.run(["pulumi", *arguments], cwd=PROGRAM, capture_output=True, text=True)
    if done.returncode:
        raise NotConnected(f"pulumi {' '.join(arguments)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return dict(json.loads(done.stdout or "{}"))


def way_in(stack: Stack) -> dict[str, Any]:
    """The stack's facts with user, password and, for a private authority, the file of its certificate.

    Raises NotConnected when they cannot be read or the password is kept as a hash.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    client, found = stack.ssm, stack.facts
    parameter = found["credentials_parameter"]
    try:
        value = client.get_parameter(Name=parameter, WithDecryption=True)["Parameter"]["Value"]
        username, password = first_user(value)
        certificate = authority(client, found["authority_parameter"])
    except (BotoCoreError, ClientError, ValueError) as error:
        raise NotConnected(f"the stack's parameters ({parameter}) cannot be read: {error}") from None
    if password is None:
        raise NotConnected(
            f"{parameter} holds {username}'s password as a hash: set MLFLOW_TRACKING_USERNAME and _PASSWORD yourself"
        )
    if found["authority_parameter"] and certificate is None:
        raise NotConnected("the machine has not published its certificate yet: try again when it has booted")
    file = keep_certificate(stack.certificate, certificate) if certificate else None
    return found | {"username": username, "password": password, "server_certificate": file}


if __name__ == "__main__":
    sys.exit(main())
