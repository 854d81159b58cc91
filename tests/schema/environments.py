"""Python environments, each with one release of MLflow. In the tests, an environment stands in for a machine image with
the same MLflow release.

The releases are the newest patch of each of the last eight minor releases in the package index. uv creates an
environment on first use, outside the repository. `mlflow-skinny` is the smallest package with MLflow's stores. If the
index has no `mlflow-skinny` for a release, uv installs the wheel of `mlflow`, which contains the same modules.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from mlflow_host.schema.release import ImageSchema
from mlflow_host.schema.revisions import known_revisions

STORES_NEED = ("sqlalchemy", "alembic", "psycopg2-binary", "pandas", "graphene", "flask", "cryptography", "huey")
SERVERS_NEED = ("flask-cors", "boto3", "httptools", "uvloop", "jinja2", "aiohttp", "docker")
"""Packages that a server process needs in addition to STORES_NEED."""
RELEASES = 8


def folder() -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(cache_home) / "mlflow-ami"
    path.mkdir(parents=True, exist_ok=True)
    return path


@cache
def releases() -> tuple[str, ...]:
    """Return the newest patch of each of the last eight minor releases, oldest first. Query the index once a day."""
    remembered = folder() / "releases.json"
    day = 24 * 3600
    if not remembered.exists() or remembered.stat().st_mtime < _now() - day:
        pip = [sys.executable, "-m", "pip"] if _has_pip() else ["pip"]
        listed = subprocess.run([*pip, "index", "versions", "mlflow"], capture_output=True, text=True, check=True)
        found = re.search(r"Available versions: (.*)", listed.stdout)
        assert found, listed.stdout
        remembered.write_text(json.dumps(found[1].split(", ")))
    versions = [v for v in json.loads(remembered.read_text()) if re.fullmatch(r"\d+\.\d+\.\d+", v)]
    newest: dict[tuple[int, int], tuple[int, ...]] = {}
    for version in versions:
        number = tuple(map(int, version.split(".")))
        minor = (number[0], number[1])
        newest[minor] = max(newest.get(minor, ()), number)
    return tuple(".".join(map(str, newest[minor])) for minor in sorted(newest)[-RELEASES:])


def image(version: str) -> ImageSchema:
    """Return the schema facts that an image with this MLflow release would have."""
    python = environment(version)
    chain = known_revisions(python)
    return ImageSchema(python, chain[-1], len(chain), version, f"stand-in-{version}")


def environment(version: str) -> Path:
    """Return the interpreter of an environment with this release. The call is idempotent, and a lock makes parallel
    calls safe."""
    return _environment(f"mlflow-{version}", version, STORES_NEED)


def server_environment(version: str) -> Path:
    """Like `environment`, with SERVERS_NEED too."""
    return _environment(f"mlflow-server-{version}", version, (*STORES_NEED, *SERVERS_NEED))


def _environment(name: str, version: str, packages: tuple[str, ...]) -> Path:
    home = folder() / name
    python = home / "bin" / "python"
    with (folder() / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "complete").exists():
            shutil.rmtree(home, ignore_errors=True)
            _make(version, home, python, packages)
            (home / "complete").touch()
    return python


def _make(version: str, home: Path, python: Path, packages: tuple[str, ...]) -> None:
    interpreter = f"{sys.version_info.major}.{sys.version_info.minor}"
    _uv("venv", "--quiet", "--python", interpreter, str(home))
    install = ("pip", "install", "--quiet", "--compile-bytecode", "--python", str(python))
    try:
        _uv(*install, f"mlflow-skinny=={version}", *packages)
    except subprocess.CalledProcessError:
        _uv(*install, "mlflow-skinny", *packages)
        _uv("pip", "uninstall", "--quiet", "--python", str(python), "mlflow-skinny")
        _uv(*install, "--no-deps", f"mlflow=={version}")


def _uv(*arguments: str) -> None:
    uv = shutil.which("uv") or str(Path(sys.executable).parent / "uv")
    subprocess.run([uv, *arguments], check=True, stdin=subprocess.DEVNULL)


def _has_pip() -> bool:
    return subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0


def _now() -> float:
    import time

    return time.time()
