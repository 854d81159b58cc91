"""Run the scripts and tools that the steps of delivery.py need."""

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
"""The folder in the repository for files that one step writes and a later step reads."""


class StepFailed(Exception):
    """The step failed. The exception's text is the reason, and `status` is the exit status of delivery.py."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def script(name: str, *arguments: str, accepted: Sequence[int] = (0,)) -> str:
    """Run one of this project's scripts and return its stdout. Its stderr is printed.

    If `accepted` does not contain the script's exit status, the function raises StepFailed with this status. The reason
    in the exception is the last line of stderr.
    """
    print(f"delivery: scripts/{name} {shlex.join(arguments)}", file=sys.stderr, flush=True)
    status, out, errors = run([sys.executable, str(REPOSITORY / "scripts" / name), *arguments], REPOSITORY)
    if status not in accepted:
        reason = (errors.strip().splitlines() or ["it printed no reason"])[-1]
        raise StepFailed(f"scripts/{name} ended with {status}: {reason}", status)
    return out


def pulumi(*arguments: str, stack: str) -> tuple[int, str]:
    """Run a Pulumi command on a stack of infra/. Returns the exit status and the output. Raises StepFailed if the
    Pulumi CLI is missing."""
    if shutil.which("pulumi") is None:
        raise StepFailed("there is no pulumi on PATH: see https://www.pulumi.com/docs/install/", 2)
    options = ["--non-interactive", "--color", "never", "--stack", stack]
    status, out, errors = run(["pulumi", *arguments, *options], REPOSITORY / "infra", show=True)
    return status, "\n".join(part for part in (out.strip(), errors.strip()) if part)


def keep(name: str, content: bytes) -> Path:
    """Write a file into the folder RESULTS. Returns the file's path relative to the repository."""
    (REPOSITORY / RESULTS).mkdir(parents=True, exist_ok=True)
    (REPOSITORY / RESULTS / name).write_bytes(content)
    return RESULTS / name


def tool(name: str, *arguments: str) -> str:
    """Run git or gh in the repository and return its stdout. Raises StepFailed."""
    if shutil.which(name) is None:
        raise StepFailed(f"there is no {name} on PATH: install it, or run this step on a GitHub runner", 2)
    status, out, errors = run([name, *arguments], REPOSITORY)
    if status:
        raise StepFailed(f"{name} {' '.join(arguments[:2])} ended with {status}: {' '.join(errors.split())}")
    return out.strip()


def run(command: Sequence[str], folder: Path, *, show: bool = False) -> tuple[int, str, str]:
    """Run a command, and return its exit status, stdout and stderr. The function also prints the lines of stderr, and
    with `show` the lines of stdout."""
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
        read(process.stdout, out, show)  # the program would block if its output pipe were full
        return process.wait()

    with passed_on(process, finish):
        status = finish()
    reader.join()
    return status, "".join(out), "".join(errors)
