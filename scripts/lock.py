#!/usr/bin/env python3
"""Update provisioning/requirements.lock: the versions and hashes of the Python packages that a bake installs."""

if __name__ == "__main__":
    import enter_venv  # noqa: F401 - starts this script again with the project's packages

# isort: split
import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.version import Version

PROVISIONING = Path(__file__).resolve().parent.parent / "provisioning"
OLDEST_PYTHON = "3.11"
"""Python version of Debian 12. The lock file is also used with Python 3.12 (Ubuntu 24.04) and 3.13 (Debian 13)."""


COMPANIONS = ("mlflow-skinny", "mlflow-tracing")
"""Packages that `mlflow` requires in the same version as itself. The two packages contain a part of MLflow's modules,
and require the packages that this part imports."""


class LockError(Exception):
    """The lock file cannot be written. The error's message contains the reason and the remedy."""


def oldest_release() -> str:
    """Return the oldest MLflow release that can be baked. requirements.in contains this release and the reason."""
    (line,) = [
        each for each in (PROVISIONING / "requirements.in").read_text().splitlines() if each.startswith("mlflow>=")
    ]
    return line.removeprefix("mlflow>=").split()[0]


def require_bakeable(version: str) -> None:
    """Raise LockError if the release is older than `oldest_release`."""
    oldest = oldest_release()
    if Version(version) < Version(oldest):
        raise LockError(f"MLflow {version} cannot be baked: the oldest supported release is {oldest} (requirements.in)")


def newest_release() -> str:
    """Return the newest MLflow release in the package index, even if the index lacks its `COMPANIONS`. Raises
    LockError."""
    command = [find_uv(), "pip", "compile", "-", "--no-config", "--no-deps", "--no-header", "--no-annotate", "--quiet"]
    done = subprocess.run(
        [*command, "--python-version", OLDEST_PYTHON], input="mlflow", check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise LockError(f"the newest release of MLflow cannot be looked up: {' '.join(done.stderr.split())}")
    return done.stdout.strip().removeprefix("mlflow==")


def find_uv() -> str:
    """Return the path of uv, in the folder of this Python or on PATH. Raises LockError if uv is not installed."""
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        raise LockError("uv resolves the lock file and is not installed: run make prepare, or pip install uv")
    return found


def resolve(source: Path, destination: Path, constraints: tuple[str, ...] = (), upgrade: bool = True) -> None:
    """Resolve the requirements in `source` for all Python versions of the images. Write the lock file to `destination`.

    Packages in the .exclude file next to `source` are omitted, even if another package requires them. `constraints`
    limit versions, such as ``mlflow==3.12.0``. With `upgrade`, every package gets the newest possible version. Without
    `upgrade`, the versions in an existing `destination` are kept where possible. The lock file contains no index URL
    and no local path, so the file is the same on every machine. Raises LockError if uv finds no solution.

    If the package index has a release of MLflow but not its `COMPANIONS`, the lock file omits these packages, because
    the `mlflow` wheel contains the same modules. In place of the omitted packages, the lock file contains the
    requirements of the packages' newest release in the index.
    """
    with tempfile.TemporaryDirectory(prefix="mlflow-ami-lock-") as scratch:
        folder = Path(scratch)
        shutil.copy(source, folder)
        unwanted = source.with_suffix(".exclude")
        (folder / "excludes").write_text(unwanted.read_text(encoding="utf-8") if unwanted.exists() else "")
        (folder / "constraints").write_text("".join(f"{line}\n" for line in constraints))
        if not upgrade and destination.exists():
            shutil.copyfile(destination, folder / "lock")
        sources = [source.name]
        failed = compile_lock(folder, sources)
        if failed and (version := lacking_companions(failed, constraints)):
            for name in COMPANIONS:
                sources.append(requirements_of(name, folder))
            with (folder / "excludes").open("a") as excludes:
                excludes.writelines(f"{name}\n" for name in COMPANIONS)
            print(f"lock: the index lacks {' and '.join(f'{name} {version}' for name in COMPANIONS)}", file=sys.stderr)
            failed = compile_lock(folder, sources)
        if failed:
            raise LockError(f"{source.name} cannot be resolved{narrowing(constraints)}: {' '.join(failed.split())}")
        destination.write_text((folder / "lock").read_text(encoding="utf-8"), encoding="utf-8")


def compile_lock(folder: Path, sources: list[str]) -> str | None:
    """Resolve the requirements in `sources` and write `folder`/lock. Returns uv's message if there is no solution."""
    done = subprocess.run(
        [
            find_uv(), "pip", "compile", *sources, "--no-config",
            "--output-file", "lock",
            "--constraints", "constraints", "--excludes", "excludes",
            "--universal", "--python-version", OLDEST_PYTHON,
            "--only-binary", ":all:",
            "--generate-hashes", "--no-emit-index-url", "--no-emit-find-links",
            "--annotation-style", "line",
            "--custom-compile-command", "make lock",
            "--quiet",
        ],
        check=False, capture_output=True, text=True, cwd=folder,
    )  # fmt: skip
    return done.stderr or f"uv ended with status {done.returncode}" if done.returncode else None


def lacking_companions(said: str, constraints: tuple[str, ...]) -> str | None:
    """Return the requested MLflow version if the index lacks a package of `COMPANIONS` in this version, otherwise None.

    `said` is uv's message. If MLflow has no constraint, uv selects the newest release that can be resolved.
    """
    text = " ".join(said.split())
    wanted = dict(constraint.split("==") for constraint in constraints).get("mlflow")
    for name, needed in re.findall(r"\bmlflow[=<>]=?\S+ depends on ([\w.-]+)==([\w.]*\w)", text):
        without = re.search(rf"\b(no versions? of|only|only the following versions of) {name}\b", text)
        if name in COMPANIONS and needed == wanted and without:
            return str(needed)
    return None


def requirements_of(name: str, folder: Path) -> str:
    """Download the newest release of a package and write its requirements to a file. Returns the file's name, which
    contains the package's name and version. uv mentions the file name in the lock file. Raises LockError."""
    wheel = folder / name
    command = [find_uv(), "pip", "install", "--no-config", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--target", str(wheel), name], check=False, capture_output=True, text=True, cwd=folder
    )
    if done.returncode:
        raise LockError(
            f"the requirements of {name} cannot be read, because its download failed: {' '.join(done.stderr.split())}"
        )
    (found,) = metadata.distributions(path=[str(wheel)])
    file = folder / f"{name}-{found.version}.in"
    file.write_text("".join(f"{line}\n" for line in found.requires or () if "extra ==" not in line))
    return file.name


def narrowing(constraints: tuple[str, ...]) -> str:
    return f" with {', '.join(constraints)}" if constraints else ""


def locked_version(lock: Path, package: str) -> str:
    """Return the version of `package` in a lock file. Raises LockError if the file does not contain the package."""
    for line in lock.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{package}=="):
            return line.removeprefix(f"{package}==").split(" ")[0]
    raise LockError(f"{lock.name} does not contain {package}: run make lock")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="To bake another MLflow release without touching the lock file: scripts/bake.py --mlflow-version X",
    )
    parser.add_argument("--keep", action="store_true", help="keep the current versions where possible")
    parser.add_argument("--mlflow-version", metavar="X", help="lock this MLflow release (default: the newest)")
    arguments = parser.parse_args()
    try:
        kept = locked_version(PROVISIONING / "requirements.lock", "mlflow") if arguments.keep else newest_release()
        version = arguments.mlflow_version or kept
        require_bakeable(version)
        server = (f"mlflow=={version}",)
        for name, constraints in (("requirements", server), ("installer", ())):
            lock = PROVISIONING / f"{name}.lock"
            resolve(PROVISIONING / f"{name}.in", lock, constraints, upgrade=not arguments.keep)
            print(f"lock: wrote {lock.relative_to(PROVISIONING.parent)}", file=sys.stderr)
        print(f"lock: MLflow {locked_version(PROVISIONING / 'requirements.lock', 'mlflow')}", file=sys.stderr)
    except LockError as error:
        print(f"lock: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
