#!/usr/bin/env python3
"""Print the environment variables with which an MLflow client connects to the server.

Set the variables with `eval "$(scripts/connect.py)"`. The option --stack selects the server of a Pulumi stack. The
option --rehearsal selects the server of the rehearsal on this machine. Without --stack and --rehearsal, the script uses
the rehearsal if it exists, else the Pulumi stack that is selected in infra/. The script reads the password from the
stack's parameters with your AWS credentials. No stack output contains the password.
"""

from __future__ import annotations

if __name__ == "__main__":
    import enter_venv  # noqa: F401 - this import restarts the script with the packages of .venv

# isort: split
import argparse
import importlib.util
import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts import invoker
from scripts.rehearsal.errors import RehearsalError
from scripts.rehearsal.status_document import administrator, authority, client_environment, keep_certificate, parameters


class NotConnected(Exception):
    """There is no server or no usable password. The message contains the remedy."""


@dataclass(frozen=True)
class ConnectedStack:
    """A launched stack: its name, a Systems Manager client that can read its parameters, and its outputs."""

    name: str
    ssm: Any
    facts: dict[str, Any]
    """The keys are url, credentials_parameter, password_parameter and authority_parameter, as in the output of
    `rehearse.py status --json`."""
    certificate: Path
    """The path of the file with the certificate of the stack's private authority, for clients."""


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


def choose(arguments: argparse.Namespace) -> ConnectedStack:
    """The stack that the arguments --stack and --rehearsal select. Raises NotConnected."""
    if arguments.stack is None and (arguments.rehearsal or rehearsal_exists()):
        return from_rehearsal()
    return from_pulumi(arguments.stack)


def export_lines(environment: dict[str, str]) -> str:
    """The variables as `export` lines for a POSIX shell, with quoted values."""
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment.items())


# The rehearsal


def rehearsal_exists() -> bool:
    if importlib.util.find_spec("moto") is None:
        return False
    from scripts.rehearsal import stack

    try:
        return stack.state_path().exists()
    except PermissionError:
        raise NotConnected(invoker.not_readable(stack.state_path())) from None
    except RehearsalError as error:
        raise NotConnected(str(error)) from None


def from_rehearsal() -> ConnectedStack:
    from scripts.local_cloud import LocalCloud, LocalCloudError
    from scripts.rehearsal import stack, state, status_document

    try:
        current = state.load(stack.state_path())
        cloud = LocalCloud()
        if not current.outputs or not cloud.is_up():
            raise NotConnected("no rehearsal is running here: launch one with `scripts/rehearse.py up`")
        facts = status_document.outline(current) | {"s3_trust": stack.keep_trust(cloud)}
        return ConnectedStack(stack.name(), cloud.client("ssm"), facts, stack.certificate_path())
    except (LocalCloudError, RehearsalError) as error:
        raise NotConnected(str(error)) from None


# A Pulumi stack


def from_pulumi(name: str | None) -> ConnectedStack:
    """A Pulumi stack. The stack's parameters are read with the configuration of the stack's AWS provider, such as
    aws:profile and aws:assumeRoles."""
    from scripts import aws_session, pulumi_stack

    try:
        outputs = pulumi_stack.run("stack", "output", "--json", stack=name)
        if not {"url", "credentialsParameter"} <= outputs.keys():
            raise NotConnected(f"the stack {name or 'selected in infra/'} has no outputs yet: run `pulumi up` first")
        client = pulumi_stack.client("ssm", pulumi_stack.provider_settings(name))
    except (pulumi_stack.PulumiError, OSError) as error:
        raise NotConnected(str(error)) from None
    except aws_session.ERRORS as error:
        raise NotConnected(aws_session.explain(error)) from None
    found = {"url": outputs["url"], **parameters(outputs)}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # A stack's name may contain an organization and a project, as in org/project/stack.
    file = f"mlflow-ami-{(name or 'selected').replace('/', '.')}.pem"
    return ConnectedStack(name or "selected", client, found, cache / file)


def way_in(stack: ConnectedStack) -> dict[str, Any]:
    """The stack's outputs, the user and the password. If the stack has a private authority, the result also has the
    path of the certificate file.

    Raises NotConnected if the parameters cannot be read or do not contain the password.
    """
    from scripts import aws_session

    client, found = stack.ssm, stack.facts
    parameter = found["credentials_parameter"]
    try:
        username, password = administrator(client, found)
        certificate = authority(client, found["authority_parameter"])
    except aws_session.ERRORS as error:
        reason = aws_session.explain(error, client.meta.region_name)
        raise NotConnected(f"the stack's parameters ({parameter}) cannot be read: {reason}") from None
    except ValueError as error:
        raise NotConnected(f"the stack's parameters ({parameter}) cannot be read: {error}") from None
    if password is None:
        raise NotConnected(
            f"{parameter} holds {username}'s password as a hash, and no other parameter has the password: set "
            "MLFLOW_TRACKING_USERNAME and _PASSWORD yourself, or run `scripts/users.py rotate "
            f"{username}`, which makes a new password"
        )
    if found["authority_parameter"] and certificate is None:
        raise NotConnected("the machine has not published its certificate yet: try again when it has booted")
    try:
        file = keep_certificate(stack.certificate, certificate) if certificate else None
    except OSError as error:
        raise NotConnected(f"the certificate cannot be written to {stack.certificate}: {error.strerror}") from None
    return found | {"username": username, "password": password, "server_certificate": file}


if __name__ == "__main__":
    sys.exit(main())
