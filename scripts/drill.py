#!/usr/bin/env python3
"""Rehearse an upgrade, a rollback and a second upgrade, and count lost data. The images are FROM, TO, FROM, TO.

The drill launches its own server on the local cloud from the image FROM. An ordinary MLflow client writes every kind of
object that MLflow stores: runs with long metric histories, nested and deleted runs, datasets, logged and registered
models with aliases and tags, traces with spans and assessments, prompts, webhooks, artifacts, and all other kinds that
the release supports. After the first write, the drill replaces the server's image three times. At each stop (image),
the client reads all data of the earlier stops, and compares the data with what was written. After the comparison, the
client writes, changes and deletes more data.

Examples:
  drill.py 3.12.0 3.17.2                    bake an image for each release of MLflow that has no image
  drill.py 3.12.0 ami-0123456789abcdef0     use an existing image
  drill.py ami-… ami-… --json               print the table as JSON.

Columns: `written` counts new objects at this stop. `compared` counts the older objects that the client read.
`values` counts the values in the compared objects. `missing` and `changed` count lost objects. `waiting` counts objects
that are only in the kept database, because this release does not support them. `outage` is the time in seconds between
the old machine's last response and the new machine's first response.

After a passed drill, the image TO has the tag mlflow-ami:drill:<version of the image FROM>. The command
scripts/images.py promote reads this tag. To promote an image on AWS that has the same MLflow release, save the output
of --json in a file and run images.py promote --drill FILE.

Exit status 0: no object is missing or changed; 1: objects are missing or changed, or a stop failed; 2: an error with
one sentence on stderr; 130: interrupted. The drill's server and its data are removed at the end, except with --keep.
Images are kept.
"""

from __future__ import annotations

if __name__ == "__main__":
    import enter_venv  # noqa: F401 - this import restarts the script with the packages of .venv

# isort: split
import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from scripts import invoker, lock
from scripts.drilling.expected_writes import ExpectedWrites, leaves
from scripts.drilling.worker_client import WorkerClient, WorkerError
from scripts.imaging import comparing, ec2_images, promoting
from scripts.imaging.ec2_images import Place
from scripts.interrupts import end_like_ctrl_c, passed_on, uninterrupted
from scripts.local_cloud import LocalCloud, LocalCloudError
from scripts.rehearsal import boot_wait, stack, state
from scripts.rehearsal.errors import RehearsalError
from scripts.rehearsal.status_document import client_environment

SCRIPTS = Path(__file__).resolve().parent
LOCKED = SCRIPTS.parent / "provisioning" / "requirements.lock"
STACK = "drill"
SHOWN = 20
"""The maximum number of lost objects that the drill prints, one line each."""


class DrillFailed(Exception):
    """The drill cannot continue. The exception's text is the reason, and `status` is the exit status of drill.py."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Stop:
    """The result of one stop. `outage_seconds` is None at the first stop, which replaces no machine."""

    ami_id: str
    mlflow_version: str
    database: str
    """The message of the boot step `database` on the machine."""
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
            wanted = (arguments.older, arguments.newer)
            require_images(cloud.client("ec2"), [each for each in wanted if each.startswith("ami-")])
            ids = [find_image(each, arguments.base) for each in wanted]
            stops = drill(cloud, [*ids, *ids])
            older, newer = (image_of(cloud, each) for each in ids)
            lost = sum(stop.missing + stop.changed for stop in stops)
            at = datetime.now(UTC)
            if not lost:
                promoting.record_drill(Place(cloud.region, cloud.client), older, newer, at)
    except DrillFailed as failed:
        say(str(failed))
        return failed.status
    except (RehearsalError, LocalCloudError) as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        say("interrupted" if arguments.keep else "interrupted; the server is removed, images are kept")
        return 130
    for loss in [loss for stop in stops for loss in stop.losses][:SHOWN]:
        say(loss)
    print(table(stops), file=sys.stderr if arguments.json else sys.stdout)
    say(f"{lost} objects are lost" if lost else "nothing is lost")
    if arguments.json:
        ends = {"older": comparing.about(older), "newer": comparing.about(newer)}
        found = {"at": f"{at:%Y-%m-%dT%H:%M:%SZ}", **ends, "stops": [dataclasses.asdict(stop) for stop in stops]}
        print(json.dumps({"lost": lost, **found}, indent=2))
    return 1 if lost else 0


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="drill.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, metavar in (("older", "FROM"), ("newer", "TO")):
        parser.add_argument(name, metavar=metavar, type=image_argument, help="an image ID or a release of MLflow")
    parser.add_argument("--base", default="debian12", help="source image of baked images (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="do not remove the drill's server at the end")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    return parser.parse_args(argv)


def image_argument(text: str) -> str:
    if not re.fullmatch(r"ami-[0-9a-f]{8,17}|\d+(\.\d+){2}\w*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither an image ID nor a release of MLflow such as 3.12.0")
    return text


# The drill


def require_images(ec2: Any, ids: list[str]) -> None:
    """Raises DrillFailed if an ID is not the ID of a finished image on the local cloud."""
    there = {image.id for image in ec2_images.find(ec2) if image.finished and image.state == "available"}
    if missing := [each for each in ids if each not in there]:
        raise DrillFailed(
            f"the local cloud has no finished image {', '.join(missing)}: `scripts/images.py list --local` lists its "
            "images; for a release of MLflow, drill.py bakes an image",
            2,
        )


def image_of(cloud: LocalCloud, wanted: str) -> ec2_images.Image:
    """The image with this ID."""
    return next(image for image in ec2_images.find(cloud.client("ec2")) if image.id == wanted)


def find_image(wanted: str, base: str) -> str:
    """The ID of the image that `wanted` names. If `wanted` is an MLflow release without an image, bake an image."""
    if wanted.startswith("ami-"):
        return wanted
    release = () if wanted == lock.locked_version(LOCKED, "mlflow") else ("--mlflow-version", wanted)
    return str(run_script("bake.py", "--local", "--if-changed", "--base", base, *release, "--json")["ami_id"])


def drill(cloud: LocalCloud, ids: list[str]) -> list[Stop]:
    expected, stops = ExpectedWrites(), list[Stop]()
    server: dict[str, Any] = {}
    with contextlib.ExitStack() as opened:
        for number, ami in enumerate(ids, start=1):
            say(f"stop {number} of {len(ids)}: {ami}")
            server, outage = launch(ami, server)
            if number == 1:
                worker = WorkerClient(Path(sys.executable), "", client_environment(server))
                opened.callback(worker.end)
            did = database_step_message(cloud, server["instance_id"])
            stops.append(visit(expected, worker, server, number, did, outage))
    return stops


def launch(ami: str, replaced: dict[str, Any]) -> tuple[dict[str, Any], float | None]:
    """Launch or replace the server. Returns the JSON that `rehearse.py up` prints, and the outage in seconds."""
    if not replaced:
        return run_script("rehearse.py", "up", "--ami", ami, "--json"), None
    with watching(replaced) as outage:
        server = run_script("rehearse.py", "up", "--ami", ami, "--json")
    return server, round(outage(), 1)


def visit(
    expected: ExpectedWrites, worker: WorkerClient, server: dict[str, Any], number: int, did: str, outage: float | None
) -> Stop:
    """Read the data of the earlier images, compare the data with the written data, and write more data."""
    release, url = server["mlflow_version"], server["url"]
    try:
        say("reading back what was written" if number > 1 else "writing")
        now = worker.read(url)
        losses, compared, waiting = expected.compare(release, now), expected.supported(now), expected.unsupported(now)
        touched = worker.write(url, f"{number}-{release.replace('.', '-')}")
        written = expected.add(release, touched, worker.read(url))
    except WorkerError as error:
        raise DrillFailed(f"writing to or reading from MLflow {release} failed at stop {number}:\n{error}") from None
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


def database_step_message(cloud: LocalCloud, instance: str) -> str:
    status = cloud.exec(instance, ["cat", "/run/mlflow-host/status/database.json"]).stdout
    return str(json.loads(status)["message"])


@contextlib.contextmanager
def watching(server: dict[str, Any]) -> Iterator[Any]:
    """Send ten requests per second to the server during the block. Yields a function; after the block, this function
    returns the outage. The outage is the time in seconds between the old machine's last response with status 200 and
    the new machine's first response with status 200."""
    over = threading.Event()
    answers: list[tuple[float, bool]] = []
    certificate = Path(server["server_certificate"]).read_text() if server["server_certificate"] else None

    def ask() -> None:
        while not over.wait(0.1):
            answer = boot_wait.ask(server["url"], server["username"], server["password"], certificate, timeout=2)
            answers.append((time.monotonic(), answer.status == 200))

    def outage() -> float:
        good = [place for place, (_, answered) in enumerate(answers) if answered]
        if not good:
            raise DrillFailed(f"{server['url']} did not answer once while the machine was replaced")
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


# Output


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


# Setup and removal


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold the drill's lock during the block. Only one drill at a time can run on a local cloud."""
    path = stack.state_path().with_name("drill.lock")
    invoker.make_private_folder(path.parent)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DrillFailed(f"another drill is running on {path.parent}; wait until it ends, or stop it", 2) from None
        yield


@contextlib.contextmanager
def local_cloud(*, keep: bool) -> Iterator[LocalCloud]:
    """Start the local cloud and remove the stack of an earlier drill. At the end, remove this drill's stack. If this
    drill started the local cloud and no other stack has a machine, also stop the local cloud."""
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
    """Run one of this project's scripts and return the JSON from its stdout. The script's stderr goes to the terminal.
    Raises DrillFailed."""
    command = [sys.executable, str(SCRIPTS / name), *arguments]
    say(f"scripts/{name} {shlex.join(arguments)}")
    running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
    with passed_on(running, running.communicate):
        printed, _ = running.communicate()
    if running.returncode:
        message = f"scripts/{name} failed (exit status {running.returncode}); its error is above"
        raise DrillFailed(message, running.returncode)
    return dict(json.loads(printed))


if __name__ == "__main__":
    sys.exit(main())
