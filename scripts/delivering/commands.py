"""Run the scripts and tools of the steps."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from scripts.interrupts import passed_on

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = Path("build/delivery")
"""Folder in the repository for files that one step writes and another reads."""


class StepFailed(Exception):
    """The step ends here; the text is the reason, and `status` the exit status."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def script(name: str, *arguments: str, accepted: Sequence[int] = (0,)) -> str:
    """The stdout of one of our scripts. Its stderr is passed on, and the last line of stderr is the reason of a
    failure.

    Raises StepFailed with the script's exit status unless that is among the accepted ones.
    """
    print(f"delivery: scripts/{name} {shlex.join(arguments)}", file=sys.stderr, flush=True)
    status, out, errors = run([sys.executable, str(REPOSITORY / "scripts" / name), *arguments], REPOSITORY)
    if status not in accepted:
        reason = (errors.strip().splitlines() or ["it printed no reason"])[-1]
        raise StepFailed(f"scripts/{name} ended with {status}: {reason}", status)
    return out


def pulumi(*arguments: str, stack: str) -> tuple[int, str]:
    """Exit status and output of a Pulumi command on a stack of infra/. Raises StepFailed without the CLI."""
    if shutil.which("pulumi") is None:
        raise StepFailed("there is no pulumi on PATH: see https://www.pulumi.com/docs/install/", 2)
    options = ["--non-interactive", "--color", "never", "--stack", stack]
    status, out, errors = run(["pulumi", *arguments, *options], REPOSITORY / "infra", show=True)
    return status, "\n".join(part for part in (out.strip(), errors.strip()) if part)


def keep(name: str, content: bytes) -> Path:
    """Write a file of the results; returns its path below the repository."""
    (REPOSITORY / RESULTS).mkdir(parents=True, exist_ok=True)
    (REPOSITORY / RESULTS / name).write_bytes(content)
    return RESULTS / name


def tool(name: str, *arguments: str) -> str:
    """The stdout of git or gh in the repository. Raises StepFailed."""
    if shutil.which(name) is None:
        raise StepFailed(f"there is no {name} on PATH: install it, or run this step on a GitHub runner", 2)
    status, out, errors = run([name, *arguments], REPOSITORY)
    if status:
        raise StepFailed(f"{name} {' '.join(arguments[:2])} ended with {status}: {' '.join(errors.split())}")
    return out.strip()


def run(command: Sequence[str], folder: Path, *, show: bool = False) -> tuple[int, str, str]:
    """Exit status, stdout and stderr. stderr also goes to the terminal line by line; stdout does with `show`."""
    out, errors = list[str](), list[str]()
    process = subprocess.Popen(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip

    def read(stream: IO[str] | None, lines: list[str], shown: bool) -> None:
        for line in stream or ():
            lines.append(line)
            if shown:
                print(line, end="", file=sys.stderr, flush=True)

    reader = threading.Thread(target=read, args=(process.stderr, errors, True), daemon=True)
    reader.start()

    def finish() -> int:
        read(process.stdout, out, show)  # a program with a full pipe would not end
        return process.wait()

    with passed_on(process, finish):
        status = finish()
    reader.join()
    return status, "".join(out), "".join(errors)
