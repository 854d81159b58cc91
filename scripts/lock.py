#!/usr/bin/env python3
"""Renews provisioning/requirements.lock: what the server's environment in an image holds, to the byte."""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROVISIONING = Path(__file__).resolve().parent.parent / "provisioning"
OLDEST_PYTHON = "3.11"
"""Debian 12's. The lock file also serves Ubuntu 24.04's 3.12 and Debian 13's 3.13."""


class LockError(Exception):
    """The lock file cannot be made; the text says why and what to do."""


def find_uv() -> str:
    """The uv beside this Python, or else on PATH; LockError when there is none."""
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        raise LockError("uv resolves the lock file and is not installed: run make prepare, or pip install uv")
    return found


def resolve(source: Path, destination: Path, constraints: tuple[str, ...] = (), upgrade: bool = True) -> None:
    """Resolve `source` for every Python the image may carry and write it with hashes to `destination`.

    What a file beside `source` that ends in .exclude names is left out, whoever requires it. `constraints` are
    requirements that narrow the choice, as ``mlflow==3.12.0``. With `upgrade` everything becomes the newest that fits,
    else what an existing `destination` names is kept where it fits. The file names no index and no path of this
    machine, and comes out the same wherever it is made. LockError when nothing fits.
    """
    with tempfile.TemporaryDirectory(prefix="mlflow-ami-lock-") as scratch:
        shutil.copy(source, scratch)
        unwanted = source.with_suffix(".exclude")
        excludes = ["--excludes", str(unwanted)] if unwanted.exists() else []
        Path(scratch, "constraints").write_text("".join(f"{line}\n" for line in constraints))
        if not upgrade and destination.exists():
            shutil.copyfile(destination, Path(scratch, "lock"))
        done = subprocess.run(
            [
                find_uv(), "pip", "compile", source.name, "--no-config",
                "--output-file", "lock",
                "--constraints", "constraints", *excludes,
                "--universal", "--python-version", OLDEST_PYTHON,
                "--only-binary", ":all:",
                "--generate-hashes", "--no-emit-index-url", "--no-emit-find-links",
                "--annotation-style", "line",
                "--custom-compile-command", "make lock",
                "--quiet",
            ],
            check=False, capture_output=True, text=True, cwd=scratch,
        )  # fmt: skip
        if done.returncode:
            reason = " ".join(done.stderr.split())
            raise LockError(f"{source.name} cannot be resolved{narrowing(constraints)}: {reason}")
        destination.write_text(Path(scratch, "lock").read_text(encoding="utf-8"), encoding="utf-8")


def narrowing(constraints: tuple[str, ...]) -> str:
    return f" with {', '.join(constraints)}" if constraints else ""


def locked_version(lock: Path, package: str) -> str:
    """The version of `package` that a lock file names; LockError when it names none."""
    for line in lock.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{package}=="):
            return line.removeprefix(f"{package}==").split(" ")[0]
    raise LockError(f"{lock.name} names no {package}: renew it with make lock")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="To bake another MLflow release without touching the lock file: scripts/bake.py --mlflow-version X",
    )
    parser.add_argument("--keep", action="store_true", help="keep the versions named now where they still fit")
    parser.add_argument("--mlflow-version", metavar="X", help="this MLflow release (default: the newest that installs)")
    arguments = parser.parse_args()
    server = (f"mlflow=={arguments.mlflow_version}",) if arguments.mlflow_version else ()
    try:
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
