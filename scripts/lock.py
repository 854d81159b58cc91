#!/usr/bin/env python3
"""Update provisioning/requirements.lock, the pinned and hashed packages of the server's environment in an image."""

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
"""Debian 12's. The lock file also serves Ubuntu 24.04's 3.12 and Debian 13's 3.13."""


COMPANIONS = ("mlflow-skinny", "mlflow-tracing")
"""Packages that `mlflow` requires in its own version. They contain parts of its modules, and require the packages that
these need."""


class LockError(Exception):
    """The lock file cannot be written; the text is the reason and the remedy."""


def oldest_release() -> str:
    """The oldest MLflow release that can be baked, from requirements.in, which contains the reason."""
    (line,) = [
        each for each in (PROVISIONING / "requirements.in").read_text().splitlines() if each.startswith("mlflow>=")
    ]
    return line.removeprefix("mlflow>=").split()[0]


def require_bakeable(version: str) -> None:
    """Raises LockError for a release that is older than `oldest_release`."""
    oldest = oldest_release()
    if Version(version) < Version(oldest):
        raise LockError(f"MLflow {version} cannot be baked: {oldest} is the oldest release that can (requirements.in)")


def newest_release() -> str:
    """The newest MLflow release in the index, even if its companion packages are missing. Raises LockError."""
    command = [find_uv(), "pip", "compile", "-", "--no-config", "--no-deps", "--no-header", "--no-annotate", "--quiet"]
    done = subprocess.run(
        [*command, "--python-version", OLDEST_PYTHON], input="mlflow", check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise LockError(f"the newest release of MLflow cannot be looked up: {' '.join(done.stderr.split())}")
    return done.stdout.strip().removeprefix("mlflow==")


def find_uv() -> str:
    """The uv in the folder of this Python, or on PATH. Raises LockError without one."""
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        raise LockError("uv resolves the lock file and is not installed: run make prepare, or pip install uv")
    return found


def resolve(source: Path, destination: Path, constraints: tuple[str, ...] = (), upgrade: bool = True) -> None:
    """Resolve `source` for all Python versions of the images and write the result with hashes to `destination`.

    Packages in the .exclude file next to `source` are left out, even if another package requires them. `constraints`
    limit versions, such as ``mlflow==3.12.0``. With `upgrade`, every package gets its newest possible version; without,
    the versions in an existing `destination` are kept where possible. The file contains no index URL and no path of
    this machine, so it is the same on every machine. Raises LockError when the resolution fails.

    Where the index has a release of MLflow but not yet its companions (`COMPANIONS`), the lock file omits them: the
    `mlflow` wheel contains the same modules. It then contains the packages that their newest release in the index
    requires.
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
    """Write `folder`/lock from the requirements in `sources`. Returns uv's message if there is no solution."""
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
    """The version of MLflow, if the index lacks that version of a package in `COMPANIONS`; else None.

    `said` is uv's message. Without a constraint on MLflow uv takes the newest release that resolves.
    """
    text = " ".join(said.split())
    wanted = dict(constraint.split("==") for constraint in constraints).get("mlflow")
    for name, needed in re.findall(r"\bmlflow[=<>]=?\S+ depends on ([\w.-]+)==([\w.]*\w)", text):
        without = re.search(rf"\b(no versions? of|only|only the following versions of) {name}\b", text)
        if name in COMPANIONS and needed == wanted and without:
            return str(needed)
    return None


def requirements_of(name: str, folder: Path) -> str:
    """Write the requirements of the newest release of the package `name` in the index to a file. Returns the file's
    name, which contains the package's name and version and appears in the lock file. Raises LockError."""
    wheel = folder / name
    command = [find_uv(), "pip", "install", "--no-config", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--target", str(wheel), name], check=False, capture_output=True, text=True, cwd=folder
    )
    if done.returncode:
        raise LockError(
            f"{name} cannot be downloaded from the index, to read its requirements: {' '.join(done.stderr.split())}"
        )
    (found,) = metadata.distributions(path=[str(wheel)])
    file = folder / f"{name}-{found.version}.in"
    file.write_text("".join(f"{line}\n" for line in found.requires or () if "extra ==" not in line))
    return file.name


def narrowing(constraints: tuple[str, ...]) -> str:
    return f" with {', '.join(constraints)}" if constraints else ""


def locked_version(lock: Path, package: str) -> str:
    """The version of `package` in a lock file. Raises LockError without one."""
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
