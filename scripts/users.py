#!/usr/bin/env python3
"""The people who may log in: add, remove and list them, give them a role or a new password.

  users.py add ada                       a writer, with a generated password that is printed once
  users.py add bob --role reader --prompt
  users.py role ada admin
  users.py rotate ada                    a new password; the old one stops working
  users.py remove bob
  users.py list [--json]

An admin and a writer may do the same in MLflow; a reader changes nothing. Of whom there is no admin left, nobody can be
let in any more, so the last one cannot be removed.

People are in the stack's credentials parameter, which is read and written with your AWS credentials; which stack, is
chosen as connect.py does. The server follows within a minute, without a restart. Passwords are generated, asked for
(--prompt) or read from standard input (--stdin), never arguments, and kept as hashes. The password of the admin that
came with the stack stays readable in the parameter, for connect.py.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import re
import secrets
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from connect import NotConnected, Stack, add_choice, choose

with contextlib.suppress(ValueError):
    sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "provisioning/rootfs/usr/lib/mlflow-host"))
from mlflow_host import credentials

LENGTH = 24
"""Characters of a generated password: letters and digits, so 142 bits, and no shell, URL or header minds them."""
OVERTAKEN = 20
"""How often a change may find that somebody else was quicker before it is given up."""

Users = dict[str, dict[str, str]]
"""Name → {"password": clear or hashed, "role": …}, as the parameter has them."""
Change = Callable[[Users], Users]


class Refused(Exception):
    """What was asked for cannot be done; says why in a sentence, without any secret."""


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    try:
        arguments.run(choose(arguments), arguments)
    except (NotConnected, Refused) as error:
        print(f"users: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="users.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="add | role | rotate | remove | list")

    def command(name: str, run: Callable[[Stack, argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help)
        made.set_defaults(run=run)
        add_choice(made)
        if name != "list":
            made.add_argument("name", help="1 to 64 letters, digits and . _ @ + -")
        return made

    def takes_password(made: argparse.ArgumentParser) -> None:
        how = made.add_mutually_exclusive_group()
        how.add_argument("--prompt", action="store_true", help="ask for the password instead of generating one")
        how.add_argument("--stdin", action="store_true", help="read it from standard input, one line")

    add = command("add", run_add, "let somebody in")
    add.add_argument("--role", choices=credentials.ROLES, default="writer", help="default: writer")
    takes_password(add)
    role = command("role", run_role, "say what somebody may do")
    role.add_argument("role", choices=credentials.ROLES)
    takes_password(command("rotate", run_rotate, "give somebody a new password"))
    command("remove", run_remove, "let somebody in no more")
    command("list", run_list, "who may log in").add_argument("--json", action="store_true", help="print it as JSON")
    return parser.parse_args(argv)


# Commands


def run_add(stack: Stack, arguments: argparse.Namespace) -> None:
    name, password = arguments.name, new_password(arguments)

    def add(users: Users) -> Users:
        if name in users:
            raise Refused(f"{name} is there already: `rotate` gives a new password, `role` another role")
        return {**users, name: {"password": credentials.hashed(password), "role": arguments.role}}

    change(stack, add)
    say(f"{name} may log in as {arguments.role} within a minute")
    show(password, arguments)


def run_rotate(stack: Stack, arguments: argparse.Namespace) -> None:
    name, password = arguments.name, new_password(arguments)

    def rotate(users: Users) -> Users:
        here = known(users, name)
        kept = credentials.hashed(password) if credentials.HASHED.fullmatch(here["password"]) else password
        return {**users, name: {**here, "password": kept}}

    change(stack, rotate)
    say(f"{name} has a new password within a minute")
    show(password, arguments)


def run_role(stack: Stack, arguments: argparse.Namespace) -> None:
    name = arguments.name
    change(stack, lambda users: {**users, name: {**known(users, name), "role": arguments.role}})
    say(f"{name} is {arguments.role} within a minute")


def run_remove(stack: Stack, arguments: argparse.Namespace) -> None:
    gone = arguments.name

    def remove(users: Users) -> Users:
        known(users, gone)
        return {name: entry for name, entry in users.items() if name != gone}

    change(stack, remove)
    say(f"{gone} is let in no more within a minute")


def run_list(stack: Stack, arguments: argparse.Namespace) -> None:
    roles = {name: entry["role"] for name, entry in users_of(read(stack)[0]).items()}
    if arguments.json:
        print(json.dumps(roles, indent=2))
        return
    width = max(map(len, roles))
    for name, role in roles.items():
        print(f"{name:<{width}}  {role}")


# Passwords


def new_password(arguments: argparse.Namespace) -> str:
    """Generated, unless it is to be asked for or read. Raises Refused."""
    if arguments.prompt:
        password = getpass.getpass(f"Password for {arguments.name}: ")
        if getpass.getpass("The same again: ") != password:
            raise Refused("the two are not the same")
    elif arguments.stdin:
        password = sys.stdin.readline().rstrip("\n")
    else:
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(LENGTH))
    if not re.fullmatch(r"[!-~]{12,128}", password):
        raise Refused("a password must be 12 to 128 visible ASCII characters without spaces")
    if credentials.HASHED.fullmatch(password):
        raise Refused("a password must not have the form of a hash, such as {SSHA}…")
    return password


def show(password: str, arguments: argparse.Namespace) -> None:
    """On standard output, where it can be piped somewhere safe; whoever has given it knows it."""
    if not (arguments.prompt or arguments.stdin):
        say("the password, which is shown this once:")
        print(password)


# The parameter


def change(stack: Stack, made: Change) -> None:
    """Write the parameter with `made` applied to its users. Raises Refused, with nothing changed.

    Systems Manager writes without asking what it replaces, but numbers every version. One that is not the successor of
    the version read has replaced what others wrote meanwhile; the last of theirs is then taken up from the history.
    """
    document, version = read(stack)
    before = users_of(document)
    wanted = made(before)
    check(document, wanted)
    for _ in range(OVERTAKEN):
        written = write(stack, document, wanted)
        if written == version + 1:
            return
        document, _ = read(stack, written - 1)
        wanted = merged(before, wanted, users_of(document))
        try:
            check(document, wanted)
        except Refused:
            write(stack, document, users_of(document))
            raise
        version = written
    raise Refused("too many others change the users at the same time: look at `users.py list` and try again")


def merged(before: Users, ours: Users, theirs: Users) -> Users:
    """Our users with everything taken over that they changed since `before` and we did not."""
    names = [*ours, *(name for name in theirs if name not in ours)]
    entries = {
        name: theirs.get(name) if ours.get(name) == before.get(name) != theirs.get(name) else ours.get(name)
        for name in names
    }
    return {name: entry for name, entry in entries.items() if entry is not None}


def known(users: Users, name: str) -> dict[str, str]:
    if name not in users:
        raise Refused(f"there is no user {name}: `users.py list` shows who there is")
    return users[name]


def check(document: dict[str, Any], users: Users) -> None:
    """Raises Refused for what the server would not take."""
    if not any(entry["role"] == "admin" for entry in users.values()):
        raise Refused("nobody would be admin then: make somebody else admin first")
    try:
        credentials.parse(json.dumps({**document, "users": users}))
    except credentials.CredentialsError as error:
        raise Refused(str(error)) from None


def users_of(document: dict[str, Any]) -> Users:
    """The users of a document with every role written out. Raises Refused when the server could not read it either."""
    try:
        found = credentials.parse(json.dumps(document))
    except credentials.CredentialsError as error:
        raise Refused(f"the credentials parameter cannot be used: {error}") from None
    return {user.name: {"password": user.password, "role": user.role} for user in found.users}


def read(stack: Stack, version: int | None = None) -> tuple[dict[str, Any], int]:
    """The document and the number of its version. Raises Refused."""
    name = stack.facts["credentials_parameter"]
    with refusals(f"the parameter {name} cannot be read"):
        wanted = name if version is None else f"{name}:{version}"
        found = stack.ssm.get_parameter(Name=wanted, WithDecryption=True)["Parameter"]
        document = json.loads(found["Value"])
    if not isinstance(document, dict):
        raise Refused(f"the parameter {name} cannot be read: it is no JSON object")
    return document, int(found["Version"])


def write(stack: Stack, document: dict[str, Any], users: Users) -> int:
    """The number of the version made. Raises Refused."""
    name = stack.facts["credentials_parameter"]
    with refusals(f"the parameter {name} cannot be written"):
        made = stack.ssm.put_parameter(
            Name=name,
            Value=json.dumps({**document, "users": users}),
            Type="SecureString",
            # A standard parameter holds 4 KiB, some 40 users.
            Tier="Intelligent-Tiering",
            Overwrite=True,
        )
        return int(made["Version"])


@contextlib.contextmanager
def refusals(what: str) -> Any:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise Refused(f"{what}: {error}") from None
    except ValueError:
        raise Refused(f"{what}: it is not JSON") from None


def say(text: str) -> None:
    print(f"users: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
