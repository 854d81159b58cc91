"""The SSM parameter with the credentials, format 1: users with their roles, and the stack's KEK passphrase.

    {"format": 1, "kek_passphrase": "…", "users": {"ada": {"password": "…", "role": "writer"}}}

The short form `"users": {"ada": "password"}` is also accepted. In the short form, the first user is an admin and all
other users are writers. A password is clear text or a hash for nginx ({SSHA}, $apr1$, $2y$, $6$). Error messages never
contain a password.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
from dataclasses import dataclass
from typing import Any

FORMAT = 1
ROLES = ("admin", "writer", "reader")
HASHED = re.compile(r"\{SSHA\}[A-Za-z0-9+/]+=*|\$(apr1|1|5|6|y|2[aby])\$[!-~]+")
"""Matches the password hashes that nginx or crypt() of the C library can verify."""


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
    """The credentials are invalid. `problems` has one sentence per mistake. The sentences contain no secrets."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("; ".join(problems))


def parse(text: str) -> Credentials:
    """Parse the parameter's text. Raises CredentialsError, which lists every problem."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        raise CredentialsError(["it is not JSON"]) from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise CredentialsError([f"it must be a JSON object with format {FORMAT}"])
    problems = [f'"{_shown(name)}" is not a known key' for name in raw.keys() - {"format", "kek_passphrase", "users"}]
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


def webhook_key(kek_passphrase: str) -> str:
    """A Fernet key that is equal on every machine of the stack. Without a common key, each MLflow process would
    generate its own key, and the other processes could not list a webhook that has a secret."""
    derived = hmac.digest(kek_passphrase.encode(), b"mlflow-host: secrets of webhooks", "sha256")
    return base64.urlsafe_b64encode(derived).decode()


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
    """Shorten a name to 70 characters for an error message, and replace characters that are not printable."""
    return "".join(character if character.isprintable() else "�" for character in name[:70])


def hashed(password: str, salt: bytes | None = None) -> str:
    """A hash for nginx's password file. The hash is salted SHA-1, because nginx verifies the password at every request.
    Measured: nginx handled 554 requests per second with bcrypt, and 34,000 with SHA-1. The password file is only in
    /run. The passwords in SSM are generated, and too long to guess."""
    if HASHED.fullmatch(password):
        return password
    salt = salt or os.urandom(16)
    digest = hashlib.sha1(password.encode() + salt, usedforsecurity=False).digest()
    return "{SSHA}" + base64.b64encode(digest + salt).decode()


def fits(password: str, stored: str) -> bool:
    """Whether `password` equals the stored password. `stored` is clear text, or a hash that `hashed` made."""
    if not stored.startswith("{SSHA}"):
        return hmac.compare_digest(password.encode(), stored.encode())
    salt = base64.b64decode(stored.removeprefix("{SSHA}"))[hashlib.sha1(usedforsecurity=False).digest_size :]
    return hmac.compare_digest(hashed(password, salt), stored)


def password_file(users: tuple[User, ...]) -> str:
    return "".join(f"{user.name}:{hashed(user.password)}\n" for user in users)
