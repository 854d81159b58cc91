"""The user who runs a script as root through sudo: home folder and file ownership.

Without sudo every function works for the process's own user.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
from pathlib import Path
from typing import Any


def person() -> pwd.struct_passwd | None:
    """The user who called sudo; None without sudo, and for root."""
    uid = os.environ.get("SUDO_UID", "")
    if os.geteuid() or not uid.isdigit() or uid == "0":
        return None
    try:
        return pwd.getpwuid(int(uid))
    except KeyError:
        return None


def home() -> Path:
    """The home folder of that user: sudo sets HOME to root's, or to the user's with -E."""
    user = person()
    return Path(user.pw_dir) if user else Path.home()


def hand_over(path: Path) -> None:
    """Make that user the owner of a file or folder."""
    if user := person():
        os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)


def make_folder(path: Path) -> None:
    """Create a folder with its parents, all owned by that user."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        hand_over(folder)


def make_private_folder(path: Path) -> None:
    """Create a folder of root's. The user can enter it to reach files of their own, but not list it."""
    make_folder(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    user = person()
    if user and path.stat().st_uid == 0:
        os.chown(path, 0, user.pw_gid)
        path.chmod(0o710)


def as_person(environment: dict[str, str]) -> dict[str, Any]:
    """Arguments of `subprocess` that run a program as that user, with this environment."""
    user = person()
    environment = {name: value for name, value in environment.items() if name != "PYTHONPYCACHEPREFIX"}
    if user is None:
        return {"env": environment}
    theirs = {"HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name}
    groups = os.getgrouplist(user.pw_name, user.pw_gid)
    return {"env": environment | theirs, "user": user.pw_uid, "group": user.pw_gid, "extra_groups": groups}


def give_back(checkout: str | Path) -> None:
    """Make the owner of the checkout the owner of the files that root wrote into it. Scripts do not write .venv and
    .git."""
    owner = Path(checkout).stat()
    if os.geteuid() or owner.st_uid == 0:
        return
    for folder, folders, files in os.walk(checkout):
        folders[:] = [name for name in folders if name not in (".venv", ".git")]
        for path in (Path(folder, name) for name in [*folders, *files]):
            with contextlib.suppress(FileNotFoundError):
                found = path.lstat()
                if found.st_uid == 0 and (stat.S_ISDIR(found.st_mode) or found.st_nlink == 1):
                    os.lchown(path, owner.st_uid, owner.st_gid)


def not_readable(path: str | Path) -> str:
    """The error for a file that this process may not read."""
    return f"{path} belongs to the user who started the local cloud: use their account, or sudo"
