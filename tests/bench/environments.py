"""Python environments of the contenders: one with the packages that tutorials install, one with the image's packages.

Both environments use this system's Python and are outside the repository. uv creates the environments on first use, and
again if the lock file has changed. The contenders do not share an environment, because the image's packages include
uvloop and httptools. `pip install mlflow` does not install uvloop and httptools, which would make the other contenders
faster. This project's .venv has even more packages than the image.
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
    """Return the MLflow release that the image installs."""
    found = re.search(r"^mlflow==(\S+)", LOCK.read_text(), re.MULTILINE)
    assert found
    return found[1]


def python_version() -> str:
    """Return the version of the Python that all contenders use."""
    return subprocess.run([SYSTEM_PYTHON, "-V"], check=True, capture_output=True, text=True).stdout.split()[1]


def image() -> Path:
    """Return the interpreter of an environment with the image's packages."""
    wanted = ["sync", "--require-hashes", "--only-binary", ":all:", str(LOCK)]
    return made("bench-image", wanted, LOCK.read_text())


def tutorial() -> Path:
    """Return the interpreter of an environment with the packages that tutorials install."""
    wanted = home() / "bench-tutorial.in"
    wanted.write_text("mlflow\npsycopg2-binary\nboto3\n")
    resolved = wanted.with_suffix(f".{mlflow_version()}.lock")
    if not resolved.exists():
        # `lock.resolve` works even if the index lacks companions (mlflow-skinny, mlflow-tracing) of the newest MLflow.
        lock.resolve(wanted, resolved, (f"mlflow=={mlflow_version()}",))
    return made("bench-tutorial", ["sync", "--require-hashes", str(resolved)], resolved.read_text())


def auth_packages() -> Path:
    """Return a folder with the packages of the extra mlflow[auth]. These packages slow down MLflow's searches, so the
    other contenders do not have them."""
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
