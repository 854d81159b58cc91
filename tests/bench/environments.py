"""Environments that the contenders run in: what tutorials install, and what the image holds, on this system's Python.

Made by uv on first use, kept outside the repository and made anew when the lock file changes. What the image has and a
`pip install mlflow` lacks (uvloop, httptools) must not help the others, and this project's own environment has more.
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

LOCK = Path(__file__).parents[2] / "provisioning/requirements.lock"
SYSTEM_PYTHON = Path("/usr/bin/python3")


def mlflow_version() -> str:
    """The release that the image installs."""
    found = re.search(r"^mlflow==(\S+)", LOCK.read_text(), re.MULTILINE)
    assert found
    return found[1]


def python_version() -> str:
    """Of the Python that all contenders run on."""
    return subprocess.run([SYSTEM_PYTHON, "-V"], check=True, capture_output=True, text=True).stdout.split()[1]


def image() -> Path:
    """The interpreter of an environment installed as the image's is."""
    wanted = ["sync", "--require-hashes", "--only-binary", ":all:", str(LOCK)]
    return made("bench-image", wanted, LOCK.read_text())


def tutorial() -> Path:
    """The interpreter of an environment with what tutorials have people install."""
    packages = [f"mlflow=={mlflow_version()}", "psycopg2-binary", "boto3"]
    return made("bench-tutorial", ["install", *packages], " ".join(packages))


def auth_packages() -> Path:
    """A folder with what the extra mlflow[auth] adds, apart, since MLflow searches more slowly where it is found."""
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
