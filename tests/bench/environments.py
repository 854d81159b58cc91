"""Environments of the contenders, on this system's Python: the packages that tutorials install, and those of the image.

uv creates them on first use, outside the repository, and again when the lock file changes. Each contender has its own,
because the image's packages include some that `pip install mlflow` does not install (uvloop, httptools) and that would
make the others faster. This project's own environment has even more packages.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts import lock

LOCK = Path(__file__).parents[2] / "provisioning/requirements.lock"
SYSTEM_PYTHON = Path("/usr/bin/python3")


def mlflow_version() -> str:
    """The release that the image installs."""
    found = re.search(r"^mlflow==(\S+)", LOCK.read_text(), re.MULTILINE)
    assert found
    return found[1]


def python_version() -> str:
    """Version of the Python that all contenders use."""
    return subprocess.run([SYSTEM_PYTHON, "-V"], check=True, capture_output=True, text=True).stdout.split()[1]


def image() -> Path:
    """The interpreter of an environment installed like the image's."""
    wanted = ["sync", "--require-hashes", "--only-binary", ":all:", str(LOCK)]
    return made("bench-image", wanted, LOCK.read_text())


def tutorial() -> Path:
    """The interpreter of an environment with the packages that tutorials install."""
    wanted = home() / "bench-tutorial.in"
    wanted.write_text("mlflow\npsycopg2-binary\nboto3\n")
    resolved = wanted.with_suffix(f".{mlflow_version()}.lock")
    if not resolved.exists():
        # Resolved like the image's packages, because the index may lack companions of the newest MLflow.
        lock.resolve(wanted, resolved, (f"mlflow=={mlflow_version()}",))
    return made("bench-tutorial", ["sync", "--require-hashes", str(resolved)], resolved.read_text())


def auth_packages() -> Path:
    """A separate folder with the packages of the extra mlflow[auth], because their presence slows MLflow's searches."""
    folder = home() / "bench-auth"
    if not (folder / "flask_wtf").is_dir():
        uv("pip", "install", "--target", str(folder), "--no-deps", "Flask-WTF<2", "WTForms")
    return folder


def made(name: str, command: Sequence[str], content: str) -> Path:
    folder, mark = home() / name, hashlib.sha256(content.encode()).hexdigest()
    python, complete = folder / "bin/python", folder / "complete"
    with (home() / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists() or complete.read_text() != mark:
            shutil.rmtree(folder, ignore_errors=True)
            uv("venv", "--python", str(SYSTEM_PYTHON), str(folder))
            uv("pip", command[0], "--compile-bytecode", "--python", str(python), *command[1:])
            complete.write_text(mark)
    return python


def home() -> Path:
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlflow-ami"
    path.mkdir(parents=True, exist_ok=True)
    return path


def uv(*arguments: str) -> None:
    beside = Path(sys.executable).with_name("uv")
    program = str(beside) if beside.exists() else "uv"
    subprocess.run([program, "--quiet", *arguments], check=True, stdout=sys.stderr)
