#!/usr/bin/env python3
"""Rehearse an upgrade and the way back, twice, and count what was lost: FROM, TO, FROM, TO.

A server of its own is launched on the local cloud from FROM and filled, by an ordinary MLflow client, with every kind
of thing MLflow stores: runs with long histories, nested and deleted runs, datasets, logged and registered models with
aliases and tags, traces with spans and assessments, prompts, webhooks, artifacts and what else the release knows. Then
the image is replaced, three times. At each stop everything that was ever written is read back and compared with what
it was, before more is written, changed and deleted.

  drill.py 3.12.0 3.17.2                    bakes an image with each release of MLflow, if there is none yet
  drill.py 3.12.0 ami-0123456789abcdef0     takes an image that is there
  drill.py ami-… ami-… --json               the table as JSON on standard output

What the columns say: `written` things that are new at this stop; `compared` things of earlier stops that were read
back, and in how many `values`; `missing` of them, `changed` in some value though nobody changed it; `waiting` in the
database that was replaced, as this release knows no such thing; `outage` seconds from the last answer of the old
machine to the first of the new one.

Exit status 0: nothing is missing, nothing changed; 1: something is, or a stop failed; 2: something you can put right,
said in a sentence; 130: interrupted. The drill's server goes with all its data, however it ends; images are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import lock
from drilling.ledger import Ledger, leaves
from drilling.reader import Reader, ReaderError
from interrupts import end_like_ctrl_c, uninterrupted
from local_cloud import LocalCloud, LocalCloudError
from rehearsal import boot, stack, state
from rehearsal.errors import RehearsalError
from rehearsal.status import client_environment

SCRIPTS = Path(__file__).resolve().parent
LOCKED = SCRIPTS.parent / "provisioning" / "requirements.lock"
STACK = "drill"
SHOWN = 20
"""Losses that are told one by one."""


class DrillFailed(Exception):
    """The drill cannot go on; the text says why, and `status` is the exit status."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Stop:
    """What one stop of the drill saw; `outage_seconds` is None at the first, where nothing was replaced."""

    ami_id: str
    mlflow_version: str
    database: str
    """What the database step of the boot said it did."""
    compared: int
    values: int
    missing: int
    changed: int
    waiting: int
    written: int
    outage_seconds: float | None
    losses: tuple[str, ...]


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    end_like_ctrl_c()
    os.environ[stack.NAMED_BY] = STACK
    try:
        with alone(), local_cloud(keep=arguments.keep) as cloud:
            images = [find_image(each, arguments.base) for each in (arguments.older, arguments.newer)]
            stops = drill(cloud, [*images, *images])
    except DrillFailed as failed:
        say(str(failed))
        return failed.status
    except (RehearsalError, LocalCloudError) as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        say("interrupted" if arguments.keep else "interrupted; nothing of the drill is left but images")
        return 130
    lost = sum(stop.missing + stop.changed for stop in stops)
    for loss in [loss for stop in stops for loss in stop.losses][:SHOWN]:
        say(loss)
    print(table(stops), file=sys.stderr if arguments.json else sys.stdout)
    say(f"{lost} things lost" if lost else "nothing is lost")
    if arguments.json:
        print(json.dumps({"lost": lost, "stops": [dataclasses.asdict(stop) for stop in stops]}, indent=2))
    return 1 if lost else 0


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="drill.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, metavar in (("older", "FROM"), ("newer", "TO")):
        parser.add_argument(name, metavar=metavar, type=image_argument, help="id of an image, or a release of MLflow")
    parser.add_argument("--base", default="debian12", help="source image for what is baked (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave the drill's server up to be looked at")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    return parser.parse_args(argv)


def image_argument(text: str) -> str:
    if not re.fullmatch(r"ami-[0-9a-f]{8,17}|\d+(\.\d+){2}\w*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither an image's id nor a release of MLflow, such as 3.12.0")
    return text


# The drill


def find_image(wanted: str, base: str) -> str:
    """The id of the image that `wanted` names, baked first where it names a release that none is there of."""
    if wanted.startswith("ami-"):
        return wanted
    release = () if wanted == lock.locked_version(LOCKED, "mlflow") else ("--mlflow-version", wanted)
    return str(run_script("bake.py", "--local", "--if-changed", "--base", base, *release, "--json")["ami_id"])


def drill(cloud: LocalCloud, images: list[str]) -> list[Stop]:
    ledger, stops = Ledger(), list[Stop]()
    server: dict[str, Any] = {}
    with contextlib.ExitStack() as opened:
        for number, ami in enumerate(images, start=1):
            say(f"stop {number} of {len(images)}: {ami}")
            server, outage = launch(ami, server)
            if number == 1:
                reader = Reader(Path(sys.executable), "", client_environment(server))
                opened.callback(reader.end)
            did = what_the_database_step_did(cloud, server["instance_id"])
            stops.append(visit(ledger, reader, server, number, did, outage))
    return stops


def launch(ami: str, replaced: dict[str, Any]) -> tuple[dict[str, Any], float | None]:
    """What `rehearse.py up` says of the new server, and the seconds during which there was none."""
    if not replaced:
        return run_script("rehearse.py", "up", "--ami", ami, "--json"), None
    with watching(replaced) as outage:
        server = run_script("rehearse.py", "up", "--ami", ami, "--json")
    return server, round(outage(), 1)


def visit(ledger: Ledger, reader: Reader, server: dict[str, Any], number: int, did: str, outage: float | None) -> Stop:
    """Read everything back and compare it, then write more."""
    release, url = server["mlflow_version"], server["url"]
    try:
        say("reading back what was written" if number > 1 else "writing")
        now = reader.read(url)
        losses, compared, waiting = ledger.compare(release, now), ledger.known(now), ledger.waiting(now)
        touched = reader.write(url, f"{number}-{release.replace('.', '-')}")
        written = ledger.enter(release, touched, reader.read(url))
    except ReaderError as error:
        raise DrillFailed(f"at stop {number} MLflow {release} could not be written to or read from:\n{error}") from None
    return Stop(
        ami_id=server["ami_id"],
        mlflow_version=release,
        database=did,
        compared=len(compared),
        values=sum(leaves(now[section].get(name)) for section, name in compared),
        missing=len({loss.key for loss in losses if loss.problem == "missing"}),
        changed=len({loss.key for loss in losses if loss.problem != "missing"}),
        waiting=len(waiting),
        written=len(written),
        outage_seconds=outage,
        losses=tuple(f"at stop {number}: {loss}" for loss in losses),
    )


def what_the_database_step_did(cloud: LocalCloud, instance: str) -> str:
    said = cloud.exec(instance, ["cat", "/run/mlflow-host/status/database.json"]).stdout
    return str(json.loads(said)["message"])


@contextlib.contextmanager
def watching(server: dict[str, Any]) -> Iterator[Any]:
    """Asks the server ten times a second while the block runs; yields a function that tells, after it, how long nobody
    was answered: from the last 200 of the old machine to the first of the new one."""
    over = threading.Event()
    answers: list[tuple[float, bool]] = []
    certificate = Path(server["server_certificate"]).read_text() if server["server_certificate"] else None

    def ask() -> None:
        while not over.wait(0.1):
            answer = boot.ask(server["url"], server["username"], server["password"], certificate, timeout=2)
            answers.append((time.monotonic(), answer.status == 200))

    def outage() -> float:
        good = [place for place, (_, answered) in enumerate(answers) if answered]
        if not good:
            raise DrillFailed(f"{server['url']} never answered while the machine was replaced, neither old nor new")
        gaps = [answers[after][0] - answers[before][0] for before, after in pairwise(good) if after > before + 1]
        return max(gaps, default=0.0)

    asking = threading.Thread(target=ask, daemon=True, name="outage")
    asking.start()
    try:
        yield outage
        ends = time.monotonic() + 10
        while time.monotonic() < ends and not (answers and answers[-1][1]):
            time.sleep(0.1)
    finally:
        over.set()
        asking.join()


# What is said


def table(stops: list[Stop]) -> str:
    head = ("stop", "MLflow", "image", "written", "compared", "values", "missing", "changed", "waiting", "outage")
    lines = [
        (
            str(number), stop.mlflow_version, stop.ami_id, str(stop.written), str(stop.compared), f"{stop.values:,}",
            str(stop.missing), str(stop.changed), str(stop.waiting),
            "" if stop.outage_seconds is None else f"{stop.outage_seconds:.1f} s",
        )
        for number, stop in enumerate(stops, start=1)
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    texts = 3
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < texts else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *lines)
    )


def say(text: str) -> None:
    for line in text.splitlines() or [""]:
        print(f"drill: {line}", file=sys.stderr, flush=True)


# Coming and going


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One drill at a time on a local cloud."""
    path = stack.state_path().with_name("drill.lock")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DrillFailed(f"another drill is at work on {path.parent}; wait for it to end, or end it", 2) from None
        yield


@contextlib.contextmanager
def local_cloud(*, keep: bool) -> Iterator[LocalCloud]:
    """The local cloud, up and without a stack of an earlier drill. Afterwards this drill's is gone as well, and the
    cloud is down unless someone else's machine runs on it."""
    cloud = LocalCloud()
    was_up = cloud.is_up()
    try:
        cloud.up()
        remove_server(cloud)
        yield cloud
    finally:
        if keep:
            say(f"the server is kept: scripts/rehearse.py --stack {STACK} status")
        else:
            with uninterrupted():
                remove_server(cloud)
                if not was_up and not stack.others_with_a_machine():
                    cloud.down()


def remove_server(cloud: LocalCloud) -> None:
    with stack.exclusive():
        current = state.load(stack.state_path())
        if current.resources:
            say("removing the drill's server and its data")
            stack.destroy(cloud, stack.clients(cloud), current, say=say, done=lambda step: None)


def run_script(name: str, *arguments: str) -> dict[str, Any]:
    """What a script of ours printed as JSON; its story goes to the terminal. Raises DrillFailed.

    It has a session of its own, so that an interrupt reaches it once, through us, and is waited for."""
    command = [sys.executable, str(SCRIPTS / name), *arguments]
    say(f"scripts/{name} {shlex.join(arguments)}")
    running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
    try:
        printed, _ = running.communicate()
    except BaseException:
        with uninterrupted():
            running.send_signal(signal.SIGINT)
            running.communicate()
        raise
    if running.returncode:
        message = f"scripts/{name} failed (exit status {running.returncode}); the reason stands above"
        raise DrillFailed(message, running.returncode)
    return dict(json.loads(printed))


if __name__ == "__main__":
    sys.exit(main())
