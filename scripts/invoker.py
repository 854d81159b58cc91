"""Home folder and file ownership of the sudo user: the user who called sudo to run a script as root.

Without sudo, every function uses the process's own user.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
from pathlib import Path
from typing import Any


def person() -> pwd.struct_passwd | None:
    """Return the user who called sudo; None if sudo was not used or root called it."""
    uid = os.environ.get("SUDO_UID", "")
    if os.geteuid() or not uid.isdigit() or uid == "0":
        return None
    try:
        return pwd.getpwuid(int(uid))
    except KeyError:
        return None


def home() -> Path:
    """Return the sudo user's home folder. $HOME cannot be used, because sudo may set it to root's home folder."""
    user = person()
    return Path(user.pw_dir) if user else Path.home()


def hand_over(path: Path) -> None:
    """Make the sudo user the owner of a file or folder."""
    if user := person():
        os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents. The sudo user owns the new folders."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        hand_over(folder)


def make_private_folder(path: Path) -> None:
    """Create a folder owned by root. The sudo user can open files in the folder by name, but cannot list the folder."""
    make_folder(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    user = person()
    if user and path.stat().st_uid == 0:
        os.chown(path, 0, user.pw_gid)
        path.chmod(0o710)


def as_person(environment: dict[str, str]) -> dict[str, Any]:
    """Return arguments for `subprocess` that run a program as the sudo user, with this environment."""
    user = person()
    environment = {name: value for name, value in environment.items() if name != "PYTHONPYCACHEPREFIX"}
    if user is None:
        return {"env": environment}
    theirs = {"HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name}
    groups = os.getgrouplist(user.pw_name, user.pw_gid)
    return {"env": environment | theirs, "user": user.pw_uid, "group": user.pw_gid, "extra_groups": groups}


def give_back(checkout: str | Path) -> None:
    """Make the checkout's owner the owner of all files that root wrote in the checkout. The folders .venv and .git are
    skipped, because scripts do not write to .venv and .git."""
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
    """Return the error message for a file that this process may not read."""
    return f"{path} belongs to the user who started the local cloud: use that user's account, or sudo"
