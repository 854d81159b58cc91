"""The credentials parameter, format 1: who may log in, and the passphrase of this stack's own.

    {"format": 1, "kek_passphrase": "…", "users": {"ada": {"password": "…", "role": "writer"}}}

`"users": {"ada": "password"}` is understood too: the first user is then the admin, the others are writers. A password
is in clear or already hashed for nginx ({SSHA}, $apr1$, $2y$, $6$). Nothing here ever quotes one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlflow_host import aws
from mlflow_host.launch import LaunchDocument
from mlflow_host.status import StepFailed

FORMAT = 1
ROLES = ("admin", "writer", "reader")
HASHED = re.compile(r"\{SSHA\}[A-Za-z0-9+/]+=*|\$(apr1|1|5|6|y|2[aby])\$[!-~]+")
"""What nginx and the C library's crypt() check by themselves."""

PATIENCE_SECONDS = 180
"""The role's policy, the route to SSM and the parameter may all be younger than the machine."""


@dataclass(frozen=True)
class User:
    name: str
    password: str
    role: str


@dataclass(frozen=True)
class Credentials:
    kek_passphrase: str
    users: tuple[User, ...]


class CredentialsError(ValueError):
    """`problems` has a sentence per mistake, without any secret."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("; ".join(problems))


def parse(text: str) -> Credentials:
    """Raises CredentialsError with every problem found."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        raise CredentialsError(["it is not JSON"]) from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise CredentialsError([f"it must be a JSON object with format {FORMAT}"])
    problems = [f'"{_shown(name)}" is not a key of it' for name in raw.keys() - {"format", "kek_passphrase", "users"}]
    passphrase = raw.get("kek_passphrase")
    if not isinstance(passphrase, str) or len(passphrase) < 16 or not passphrase.isprintable():
        problems.append("kek_passphrase must be a string of at least 16 printable characters")
    users = raw.get("users")
    if not isinstance(users, dict) or not users:
        problems.append("users must name at least one user")
        users = {}
    read = [_user(name, value, "writer" if at else "admin", problems) for at, (name, value) in enumerate(users.items())]
    if users and not problems and not any(user.role == "admin" for user in read):
        problems.append('no user has the role "admin"')
    if problems:
        raise CredentialsError(sorted(problems))
    return Credentials(str(passphrase), tuple(read))


def _user(name: str, value: Any, default_role: str, problems: list[str]) -> User:
    shown = _shown(name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}", name):
        problems.append(f'the user name "{shown}" must be 1 to 64 letters, digits and . _ @ + -')
    fields = value if isinstance(value, dict) else {"password": value}
    for extra in fields.keys() - {"password", "role"}:
        problems.append(f'"{_shown(extra)}" is not a key of user {shown}')
    password, role = fields.get("password"), fields.get("role", default_role)
    if not isinstance(password, str) or not password or not password.isprintable():
        problems.append(f"the password of user {shown} must be a string of printable characters")
    if role not in ROLES:
        problems.append(f"the role of user {shown} must be {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    return User(name, str(password), str(role))


def _shown(name: str) -> str:
    """A name as it can stand in a sentence."""
    return "".join(character if character.isprintable() else "�" for character in name[:70])


def hashed(password: str) -> str:
    """For nginx's password file. Salted SHA-1 because nginx checks it anew at every request: bcrypt would take most of
    the machine (554 requests a second against 34,000, measured). The file stays in /run, and the clear form it is made
    from is a generated one in SSM, so there is little to guess and less to steal."""
    if HASHED.fullmatch(password):
        return password
    salt = os.urandom(16)
    digest = hashlib.sha1(password.encode() + salt, usedforsecurity=False).digest()
    return "{SSHA}" + base64.b64encode(digest + salt).decode()


def password_file(users: tuple[User, ...]) -> str:
    return "".join(f"{user.name}:{hashed(user.password)}\n" for user in users)


def fetch(document: LaunchDocument, say: Callable[[str], None], patience: float = PATIENCE_SECONDS) -> Credentials:
    """Read the parameter with the instance's role, by IMDSv2. Raises StepFailed when that stays impossible."""
    parameter = document.credentials.parameter
    text = _parameter(document, parameter, say, patience)
    try:
        return parse(text)
    except CredentialsError as error:
        raise StepFailed(f"the parameter {parameter} cannot be used: {error}; write it anew and restart") from None


def secret(document: LaunchDocument, parameter: str) -> str:
    """Another parameter that is a secret as a whole, read the same way. Raises StepFailed."""
    return _parameter(document, parameter, lambda message: None, PATIENCE_SECONDS)


def _parameter(document: LaunchDocument, name: str, say: Callable[[str], None], patience: float) -> str:
    give_up = time.monotonic() + patience
    pause = 0.1
    while True:
        try:
            return aws.get_parameter(document, name, aws.role_keys())
        except aws.NoRole:
            reason = "the instance has no role yet: give it the stack's instance profile"
        except aws.Unreachable as error:
            reason = (
                f"{aws.ssm_address(document)} cannot be reached ({error}): it needs a route or an interface endpoint"
            )
        except aws.Refused as error:
            if error.code == "ParameterNotFound":
                reason = (
                    f"the parameter {name} does not exist in {document.stack.region}: create it, or correct its name"
                )
            elif error.code in ("AccessDeniedException", "AccessDenied"):
                reason = f"the instance's role may not read the parameter {name}: allow it ssm:GetParameter and its key"
            else:
                reason = f"SSM does not give the parameter {name} ({error})"
        if time.monotonic() + pause > give_up:
            raise StepFailed(f"{reason} (tried for {patience:.0f} s)")
        say(f"{reason}; trying again")
        time.sleep(pause)
        pause = min(pause * 2, 5)
