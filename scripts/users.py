#!/usr/bin/env python3
"""Manage the users who can log in: add, remove and list them, set their role or a new password.

  users.py add ada                       add a writer; print a generated password once
  users.py add bob --role reader --prompt
  users.py role ada admin
  users.py rotate ada                    set a new password; the old password stops working
  users.py remove bob
  users.py list [--json]

Admins and writers have the same rights in MLflow. A reader cannot change anything. A stack keeps at least one admin, so
the script refuses to remove the last admin.

Users are stored in the stack's credentials parameter, which the script reads and writes with your AWS credentials.
Choose the stack with the same options as in connect.py. Changes take effect on the server within a minute, without a
restart. Passwords are generated, prompted for (--prompt) or read from standard input (--stdin), and are never
arguments. The parameter stores hashes of the passwords. The password of the stack's first admin is also in a second
parameter, which connect.py can read but the server cannot read.
"""

from __future__ import annotations

if __name__ == "__main__":
    import enter_venv  # noqa: F401 - this import restarts the script with the packages of .venv

# isort: split
import argparse
import contextlib
import json
import re
import secrets
import string
import sys
from collections.abc import Callable
from typing import Any

from mlflow_host.contract import credentials
from scripts import prompts
from scripts.connect import ConnectedStack, NotConnected, add_choice, choose

LENGTH = 24
"""The number of characters in a generated password: letters and digits (142 bits), which need no quoting in a shell,
URL or header."""
OVERTAKEN = 20
"""The maximum number of attempts while other clients write the parameter at the same time."""

Users = dict[str, dict[str, str]]
"""User name → {"password": clear text or hash, "role": …}, in the format of the credentials parameter."""
Change = Callable[[Users], Users]


class ChangeRefused(Exception):
    """The change is not possible. The message contains the reason and no secret."""


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    try:
        arguments.run(choose(arguments), arguments)
    except (NotConnected, ChangeRefused) as error:
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

    def command(
        name: str, run: Callable[[ConnectedStack, argparse.Namespace], None], help: str
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help)
        made.set_defaults(run=run)
        add_choice(made)
        if name != "list":
            made.add_argument("name", help="1 to 64 letters, digits and . _ @ + -")
        return made

    def takes_password(made: argparse.ArgumentParser) -> None:
        how = made.add_mutually_exclusive_group()
        how.add_argument("--prompt", action="store_true", help="prompt for the password instead of generating one")
        how.add_argument("--stdin", action="store_true", help="read it from standard input, one line")

    add = command("add", run_add, "let somebody in")
    add.add_argument("--role", choices=credentials.ROLES, default="writer", help="default: writer")
    takes_password(add)
    role = command("role", run_role, "set a user's role")
    role.add_argument("role", choices=credentials.ROLES)
    takes_password(command("rotate", run_rotate, "set a new password"))
    command("remove", run_remove, "remove a user")
    command("list", run_list, "list the users").add_argument("--json", action="store_true", help="print it as JSON")
    return parser.parse_args(argv)


# Commands


def run_add(stack: ConnectedStack, arguments: argparse.Namespace) -> None:
    name, password = arguments.name, new_password(arguments)

    def add(users: Users) -> Users:
        if name in users:
            raise ChangeRefused(f"{name} exists already: `rotate` sets a new password, `role` sets another role")
        return {**users, name: {"password": credentials.hashed(password), "role": arguments.role}}

    change(stack, add)
    say(f"{name} can log in as {arguments.role} within a minute")
    show(password, arguments)


def run_rotate(stack: ConnectedStack, arguments: argparse.Namespace) -> None:
    name, password = arguments.name, new_password(arguments)

    def rotate(users: Users) -> Users:
        return {**users, name: {**known(users, name), "password": stored(stack, users, name, password)}}

    change(stack, rotate)
    say(f"the new password of {name} takes effect within a minute")
    show(password, arguments)
    if own_parameter(stack) and name == first_admin(users_of(read(stack)[0])):
        put(stack, own_parameter(stack), password)


def run_role(stack: ConnectedStack, arguments: argparse.Namespace) -> None:
    name = arguments.name
    change(stack, lambda users: {**users, name: {**known(users, name), "role": arguments.role}})
    say(f"the role {arguments.role} of {name} takes effect within a minute")


def run_remove(stack: ConnectedStack, arguments: argparse.Namespace) -> None:
    gone = arguments.name

    def remove(users: Users) -> Users:
        known(users, gone)
        return {name: entry for name, entry in users.items() if name != gone}

    change(stack, remove)
    say(f"{gone} is removed; open sessions end within a minute")


def run_list(stack: ConnectedStack, arguments: argparse.Namespace) -> None:
    roles = {name: entry["role"] for name, entry in users_of(read(stack)[0]).items()}
    if arguments.json:
        print(json.dumps(roles, indent=2))
        return
    width = max(map(len, roles))
    for name, role in roles.items():
        print(f"{name:<{width}}  {role}")


# Passwords


def new_password(arguments: argparse.Namespace) -> str:
    """Return a generated password, or read a password from the prompt or standard input. Raises ChangeRefused."""
    try:
        if arguments.prompt:
            instead = "use --stdin, or have one generated"
            password = prompts.ask_secret(f"Password for {arguments.name}", instead)
            if prompts.ask_secret("The same again", instead) != password:
                raise ChangeRefused("the two passwords differ")
        elif arguments.stdin:
            password = prompts.read_line(f"the password for {arguments.name}")
    except prompts.NoAnswer as error:
        raise ChangeRefused(str(error)) from None
    if not (arguments.prompt or arguments.stdin):
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(LENGTH))
    if not re.fullmatch(r"[!-~]{12,128}", password):
        raise ChangeRefused("a password must be 12 to 128 visible ASCII characters without spaces")
    if credentials.HASHED.fullmatch(password):
        raise ChangeRefused("a password must not have the form of a hash, such as {SSHA}…")
    return password


def show(password: str, arguments: argparse.Namespace) -> None:
    """Print a generated password to standard output, so that it can be piped. A password that the user entered is not
    printed."""
    if not (arguments.prompt or arguments.stdin):
        say("the password (it is not shown again):")
        print(password)


# The parameters


def own_parameter(stack: ConnectedStack) -> str:
    """Return the name of the parameter with the first admin's password; "" if an earlier release launched the stack."""
    return stack.facts.get("password_parameter") or ""


def first_admin(users: Users) -> str:
    return next(name for name, entry in users.items() if entry["role"] == "admin")


def stored(stack: ConnectedStack, users: Users, name: str, password: str) -> str:
    """Return the hash of `password`, or `password` itself if connect.py has no other parameter to read."""
    clear = not own_parameter(stack) and not credentials.HASHED.fullmatch(users[name]["password"])
    return password if clear else credentials.hashed(password)


def change(stack: ConnectedStack, made: Change) -> None:
    """Apply `made` to the users in the credentials parameter, and write the parameter. Raises ChangeRefused.

    Systems Manager has no conditional write, but it numbers a parameter's versions. If another client wrote a version
    between the script's read and write, the script reads this version from the history and merges both versions.
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
        except ChangeRefused:
            write(stack, document, users_of(document))
            raise
        version = written
    raise ChangeRefused("too many concurrent changes of the users: check `users.py list` and try again")


def merged(before: Users, ours: Users, theirs: Users) -> Users:
    """Return `ours` with another client's changes (`before` to `theirs`). If both clients changed the same user, the
    change in `ours` is kept."""
    names = [*ours, *(name for name in theirs if name not in ours)]
    entries = {
        name: theirs.get(name) if ours.get(name) == before.get(name) != theirs.get(name) else ours.get(name)
        for name in names
    }
    return {name: entry for name, entry in entries.items() if entry is not None}


def known(users: Users, name: str) -> dict[str, str]:
    if name not in users:
        raise ChangeRefused(f"there is no user {name}: `users.py list` shows the users")
    return users[name]


def check(document: dict[str, Any], users: Users) -> None:
    """Raise ChangeRefused if the server would reject `users`."""
    if not any(entry["role"] == "admin" for entry in users.values()):
        raise ChangeRefused("this is the last admin: make another user admin first")
    try:
        credentials.parse(json.dumps({**document, "users": users}))
    except credentials.CredentialsError as error:
        raise ChangeRefused(str(error)) from None


def users_of(document: dict[str, Any]) -> Users:
    """Return the users in the credentials document, with a role for each user. Raises ChangeRefused if the server could
    not read the document."""
    try:
        found = credentials.parse(json.dumps(document))
    except credentials.CredentialsError as error:
        raise ChangeRefused(f"the credentials parameter cannot be used: {error}") from None
    return {user.name: {"password": user.password, "role": user.role} for user in found.users}


def read(stack: ConnectedStack, version: int | None = None) -> tuple[dict[str, Any], int]:
    """Return the credentials document and the version number of its parameter. Raises ChangeRefused."""
    name = stack.facts["credentials_parameter"]
    with refusals(f"the parameter {name} cannot be read"):
        wanted = name if version is None else f"{name}:{version}"
        found = stack.ssm.get_parameter(Name=wanted, WithDecryption=True)["Parameter"]
        document = json.loads(found["Value"])
    if not isinstance(document, dict):
        raise ChangeRefused(f"the parameter {name} cannot be read: it is not a JSON object")
    return document, int(found["Version"])


def write(stack: ConnectedStack, document: dict[str, Any], users: Users) -> int:
    """Write the credentials parameter and return its new version number. Raises ChangeRefused."""
    return put(stack, stack.facts["credentials_parameter"], json.dumps({**document, "users": users}))


def put(stack: ConnectedStack, name: str, value: str) -> int:
    """Write the parameter `name` and return its new version number. Raises ChangeRefused."""
    with refusals(f"the parameter {name} cannot be written"):
        made = stack.ssm.put_parameter(
            Name=name,
            Value=value,
            Type="SecureString",
            # A standard parameter holds 4 KiB, which is about 40 users.
            Tier="Intelligent-Tiering",
            Overwrite=True,
        )
        return int(made["Version"])


@contextlib.contextmanager
def refusals(what: str) -> Any:
    from scripts import aws_session

    try:
        yield
    except aws_session.ERRORS as error:
        raise ChangeRefused(f"{what}: {aws_session.explain(error)}") from None
    except ValueError:
        raise ChangeRefused(f"{what}: it is not JSON") from None


def say(text: str) -> None:
    print(f"users: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
