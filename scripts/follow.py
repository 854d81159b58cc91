#!/usr/bin/env python3
"""Test the newest release of MLflow with this checkout, and write one report page.

Examples:
  follow.py                              the newest release in the package index
  follow.py --mlflow-version 3.19.0rc1   another release or a release candidate
  follow.py --without-machines           without root: packages, routes, sources, comparison with plain MLflow.

The script works in a copy of the checkout's last commit, and does not change the checkout itself. The script locks the
release and the packages that the release needs. Then the script proposes changes of two lists that people maintain: the
reading and writing routes, and the hashes of the MLflow sources for which the fast path is tested. After these changes,
the script compares each response of the server with plain MLflow, bakes an image, rehearses an upgrade from the locked
release and a rollback, and runs the bench. The script proposes new hashes only if the comparison with plain MLflow
finds no difference.

The script writes the folder build/follow/X, where X is the release. The folder contains page.md, proposal.patch and a
log of each step. page.md describes the new features, the fallbacks, the result of each step and the evidence. Read
page.md, and then run `git apply build/follow/X/proposal.patch`.

Exit status 0: every step passed; 1: a step failed, and page.md names the step; 2: an error with one sentence on stderr;
130: interrupted. The next run for the same commit and release skips the steps that passed, except with --again.
"""

from __future__ import annotations

if __name__ == "__main__":
    import enter_venv  # noqa: F401 - this import restarts the script with the packages of .venv

# isort: split
import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts import invoker, lock
from scripts.following import page, proposal
from scripts.following.page import Step
from scripts.interrupts import end_like_ctrl_c, uninterrupted

REPOSITORY = Path(__file__).resolve().parent.parent
LOCK = Path("provisioning/requirements.lock")
HOST_PACKAGE = Path("provisioning/rootfs/usr/lib/mlflow-host")
COMPARISON = "comparison"


class FollowError(Exception):
    """The release cannot be tested. The exception's text contains the reason and the remedy."""


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    end_like_ctrl_c()
    try:
        return follow(arguments)
    except (FollowError, lock.LockError, proposal.ProposalError) as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        say("interrupted; the logs of the steps that ended are kept")
        return 130


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="follow.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mlflow-version", metavar="X", help="the release to try (default: the newest)")
    parser.add_argument("--without-machines", action="store_true", help="leave out the bake, the drill and the bench")
    parser.add_argument("--without-bench", action="store_true", help="leave out the bench, which takes longest")
    parser.add_argument("--again", action="store_true", help="repeat the steps that passed before")
    parser.add_argument("--json", action="store_true", help="print the steps as JSON")
    return parser.parse_args(argv)


def follow(arguments: argparse.Namespace) -> int:
    """Raises FollowError, LockError or ProposalError."""
    current = lock.locked_version(REPOSITORY / LOCK, "mlflow")
    wanted = arguments.mlflow_version or lock.newest_release()
    lock.require_bakeable(wanted)
    if wanted == current:
        say(f"MLflow {current} is already in the lock file: nothing to do")
        return 0
    if not arguments.without_machines and os.geteuid():
        raise FollowError("the bake and the drill need root: use sudo, or --without-machines")
    folder = REPOSITORY / "build/follow" / wanted
    invoker.make_folder(folder)
    if arguments.again:
        shutil.rmtree(folder / "passed", ignore_errors=True)
    say(f"MLflow {current} → {wanted}; logs are in {folder.relative_to(REPOSITORY)}")
    with checkout(folder / "checkout") as copy:
        before = facts_of(current, copy, folder)
        lock.resolve(copy / "provisioning/requirements.in", copy / LOCK, (f"mlflow=={wanted}",))
        after = facts_of(wanted, copy, folder)
        steps, notes = try_release(copy, folder, current, wanted, after, arguments)
        patch = git(copy, "diff")
    (folder / "proposal.patch").write_text(patch)
    lists = re.split(r"(?m)^(?=diff --git )", patch)
    shown = "".join(each for each in lists if str(LOCK) not in each.split("\n", 1)[0])
    (folder / "page.md").write_text(page.page(before, after, steps, shown, notes))
    for path in folder.iterdir():
        invoker.hand_over(path)
    failed = [each.name for each in steps if each.status]
    say(f"{', '.join(failed)} failed" if failed else "every step passed")
    say(f"read {(folder / 'page.md').relative_to(REPOSITORY)}")
    if arguments.json:
        print(json.dumps([{"step": each.name, "result": each.result, "seconds": each.seconds} for each in steps]))
    return 1 if failed else 0


@contextlib.contextmanager
def checkout(path: Path) -> Iterator[Path]:
    """A worktree of the last commit, with a link to the project's own .venv. The worktree is removed at the end."""
    if path.exists():
        remove_checkout(path)
    git(REPOSITORY, "worktree", "add", "--detach", "--force", str(path), "HEAD")
    try:
        (path / ".venv").symlink_to(Path(sys.prefix))
        yield path
    finally:
        with uninterrupted():
            remove_checkout(path)


def remove_checkout(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    git(REPOSITORY, "worktree", "prune")


def facts_of(version: str, copy: Path, folder: Path) -> dict[str, Any]:
    """The result of `bake.release_facts.facts` for the release in the copy's lock file. The program runs in a virtual
    environment with the packages of this lock file."""
    path, environment = folder / f"facts-{version}.json", folder / f"environment-{version}"
    python, locked = environment / "bin/python", (copy / LOCK).read_text()
    kept = environment / "lock"
    if not kept.exists() or kept.read_text() != locked:
        say(f"installing the packages of MLflow {version}")
        shutil.rmtree(environment, ignore_errors=True)
        uv("venv", "--python", "/usr/bin/python3", str(environment))
        uv("pip", "sync", "--python", str(python), "--require-hashes", "--only-binary", ":all:", str(copy / LOCK))
        kept.write_text(locked)
    say(f"reading the routes and sources of MLflow {version}")
    done = subprocess.run(
        [str(python), "-W", "ignore", "-m", "mlflow_host.bake.release_facts"],
        env={**os.environ, "PYTHONPATH": str(copy / HOST_PACKAGE), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        (folder / f"facts-{version}.log").write_text(done.stderr)
        raise FollowError(f"MLflow {version} cannot be read: {reason}; the whole output is in facts-{version}.log")
    path.write_text(done.stdout)
    return page.read_facts(path)


def try_release(
    copy: Path, folder: Path, current: str, wanted: str, after: dict[str, Any], arguments: argparse.Namespace
) -> tuple[list[Step], list[str]]:
    """Change the two lists in `copy`, which is a copy of the checkout, and run the steps there. Returns the steps, and
    remarks for the report page."""
    routes, compared = copy / proposal.ROUTES, copy / proposal.COMPARED
    unsorted = [each["path"] for each in after["unsorted"] if each["method"] == "POST"]
    routes.write_text(proposal.sort_routes(routes.read_text(), unsorted, wanted))
    known = compared.read_text()
    hashes = {name: after["sources"][name]["hash"] for name in after["different"]}
    compared.write_text(proposal.accept_sources(known, hashes))
    notes = []

    def run(name: str, *command: str) -> Step:
        return run_step(name, command, copy, folder)

    steps = [
        run(
            COMPARISON,
            ".venv/bin/pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/compare",
            "-k",
            "default and not 10000",
        )
    ]
    if hashes and steps[0].status:
        compared.write_text(known)
        notes.append("The comparison found differences, so no source is proposed: MLflow answers those requests.")
    steps.append(run("routes", ".venv/bin/pytest", "-q", "-p", "no:cacheprovider", "tests/unit/test_routes.py"))
    if arguments.without_machines:
        return [
            *steps,
            *(Step(name, "", None, 0, None, "--without-machines") for name in ("bake", "drill", "bench")),
        ], notes
    bake = run("bake", "scripts/bake.py", "--local", "--if-changed", "--json")
    steps.append(bake)
    if bake.status:
        return [*steps, *(Step(name, "", None, 0, None, "the bake failed") for name in ("drill", "bench"))], notes
    steps.append(run("drill", "scripts/drill.py", current, wanted))
    if arguments.without_bench:
        return [*steps, Step("bench", "", None, 0, None, "--without-bench")], notes
    return [*steps, run("bench", ".venv/bin/python", "-m", "tests.bench")], notes


def run_step(name: str, command: tuple[str, ...], copy: Path, folder: Path) -> Step:
    """Run a command in the folder `copy`, and write its output to a log. If the command has already passed with files
    equal to the current files, skip the command."""
    log, passed = folder / f"{name}.log", folder / "passed" / name
    inputs = git(copy, "rev-parse", "HEAD") + git(copy, "diff") + " ".join(command)
    if passed.exists() and passed.read_text() == inputs and log.exists():
        say(f"{name}: passed before")
        return Step(name, " ".join(command), 0, 0, log)
    say(f"{name}: {' '.join(command)}")
    begun = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(copy / command[0]) if "/" in command[0] else command[0], *command[1:]],
            cwd=copy, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        status = wait(process, name, begun)
    seconds = time.monotonic() - begun
    result = f"exit status {status}, see {log.relative_to(REPOSITORY)}" if status else "passed"
    say(f"{name}: {result}, {seconds:.0f} s")
    if not status:
        passed.parent.mkdir(exist_ok=True)
        passed.write_text(inputs)
    return Step(name, " ".join(command), status, seconds, log)


def wait(process: subprocess.Popen[bytes], name: str, begun: float) -> int:
    """Wait for the command and return its exit status. Logs a line every minute. On Ctrl-C, the function sends SIGTERM
    to the command, and waits until the command has ended."""
    try:
        while True:
            try:
                return process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                say(f"{name}: {time.monotonic() - begun:.0f} s")
    finally:
        if process.poll() is None:
            with uninterrupted():
                process.terminate()
                process.wait()


def git(folder: Path, *arguments: str) -> str:
    """What git prints. Raises FollowError."""
    done = subprocess.run(
        ["git", "-c", "safe.directory=*", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise FollowError(f"git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout


def uv(*arguments: str) -> None:
    done = subprocess.run([lock.find_uv(), "--quiet", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise FollowError(f"uv {' '.join(arguments[:2])} failed: {' '.join(done.stderr.split())}")


def say(text: str) -> None:
    print(f"follow: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
