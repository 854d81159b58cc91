"""Compare this checkout's server with the server of an earlier commit, as ratios.

    .venv/bin/python -m tests.bench.against ab5bbc7
    .venv/bin/python -m tests.bench.against HEAD~20 --only log-metric "get run" --clients 1 8 --rounds 20

Each server has its own PostgreSQL and nginx. Both servers use the packages of the earlier commit's lock file, so that
both run the same MLflow release. The servers are measured alternately; one is suspended while the other is measured. In
each round, the script divides the requests per second of this checkout by those of the earlier commit, and prints the
median and the quartiles of these ratios. `cpu` is the same ratio for requests per second of processor time of MLflow's
server processes; other load on the machine affects `cpu` less. Each client logs in as a separate user, because some
limits are per user. With --one-user, all clients log in as one user.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scripts.interrupts import exit_with
from tests.bench import load
from tests.bench.__main__ import say
from tests.bench.contenders import alone
from tests.support import services

ROOT = Path(__file__).parents[2]
START = """
import dataclasses, json, sys
from pathlib import Path
from tests.bench import contenders, environments
try:
    from tests.support import services
except ImportError:  # a commit without tests/support
    from tests import services
environments.LOCK = Path(sys.argv[2])
folder = Path(sys.argv[1])
with services.object_store(folder / "object-store", https=True) as store:
    (folder / "ours").mkdir(mode=0o755)
    with contenders.CONTENDERS["ours"](folder / "ours", store) as started:
        target, data = dataclasses.asdict(started.target), dataclasses.asdict(started.data)
        print(json.dumps({"target": target, "data": data, "servers": started.servers}), flush=True)
        sys.stdin.read()
"""
"""A program that runs in the checkout of one commit, because it imports the code of that commit."""


@dataclass(frozen=True)
class Side:
    """The server of one commit."""

    target: load.Target
    data: load.Dataset
    servers: tuple[int, ...]

    def processes(self) -> list[int]:
        return [pid for server in self.servers for pid in services.family(server)]


def main() -> int:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="mlflow-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        earlier = folder / "earlier"
        check_out(options.commit, earlier)
        lock = earlier / "provisioning/requirements.lock"
        sides: list[Side] = []
        for checkout, what in ((earlier, options.commit), (ROOT, "this checkout")):
            say(f"starting the server of {what}")
            place = folder / f"side-{len(sides)}"
            place.mkdir(mode=0o755)
            sides.append(stack.enter_context(started(checkout, place, lock)))
        if options.one_user:
            sides = [replace(side, target=replace(side.target, logins=())) for side in sides]
        rows = measure(sides, options)
    print(json.dumps(rows) if options.json else table(rows))
    return 0


def check_out(commit: str, folder: Path) -> None:
    """Extract the files of a commit into `folder`. A git work tree is not used, because git would register it."""
    done = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True)
    if done.returncode:
        raise RuntimeError(f"git has no commit {commit!r}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")


@contextlib.contextmanager
def started(checkout: Path, folder: Path, lock: Path) -> Iterator[Side]:
    roots = tomllib.loads((checkout / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["pythonpath"]
    path = os.pathsep.join([str(checkout), *(str(checkout / root) for root in roots)])
    command = [sys.executable, "-c", START, str(folder), str(lock)]
    running = subprocess.Popen(
        command,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert running.stdin and running.stdout
    try:
        line = running.stdout.readline()
        if not line:
            raise RuntimeError(f"the server of {checkout} did not start; its messages are above")
        told = json.loads(line)
        target, data = load.Target(**with_tuples(told["target"])), load.Dataset(**with_tuples(told["data"]))
        yield Side(target, data, tuple(told["servers"]))
    finally:
        running.stdin.close()
        running.wait(120)


def with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def measure(sides: list[Side], options: argparse.Namespace) -> list[dict[str, Any]]:
    names = [name for name in load.OPERATIONS if any(wanted in name for wanted in options.only)]
    cases = [(name, clients) for name in names for clients in options.clients]
    found: dict[tuple[str, int], list[tuple[float, float]]] = {case: [] for case in cases}
    cpu: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    errors: dict[tuple[str, int], list[str]] = {case: [] for case in cases}
    for side in sides:
        with alone(side, sides):
            for name in names:
                load.run(side.target, name, side.data, 2, 1.0)
    for number in range(options.rounds):
        for case in cases:
            rates, used = {}, {}
            for index in (0, 1) if number % 2 else (1, 0):
                side = sides[index]
                with alone(side, sides):
                    begun = load.cpu_seconds(side.processes())
                    measured = load.run(side.target, case[0], side.data, case[1], options.seconds)
                    spent = load.cpu_seconds(side.processes()) - begun
                rates[index] = measured.per_second
                used[index] = spent / max(len(measured.latencies), 1)
                errors[case] += measured.errors
            found[case].append((rates[0], rates[1]))
            cpu[case].append(used[0] / max(used[1], 1e-9))
        say(f"round {number + 1} of {options.rounds}")
    rows = []
    for case, pairs in found.items():
        ratios = [now / max(before, 1e-9) for before, now in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows.append(
            {
                "operation": case[0],
                "clients": case[1],
                "before": round(statistics.median(before for before, _ in pairs), 1),
                "now": round(statistics.median(now for _, now in pairs), 1),
                "ratio": round(middle, 3),
                "quartiles": [round(low, 3), round(high, 3)],
                "cpu": round(statistics.median(cpu[case]), 3),
                "errors": len(errors[case]),
                "first_error": errors[case][0] if errors[case] else "",
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'operation':26} clients  before/s    now/s  ratio  quartiles    cpu    errors"]
    for row in rows:
        quartiles = "–".join(f"{each:.2f}" for each in row["quartiles"])
        lines.append(
            f"{row['operation']:26} {row['clients']:7} {row['before']:9} {row['now']:8}  {row['ratio']:.3f}  "
            f"{quartiles:11}  {row['cpu']:.3f} {row['errors']:7} {row['first_error'][:80]}"
        )
    means = [math.exp(statistics.fmean(math.log(max(row[each], 1e-9)) for row in rows)) for each in ("ratio", "cpu")]
    return "\n".join([*lines, "geometric means: {:.3f} of the ratios, {:.3f} of cpu".format(*means)])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.against", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="the earlier commit, in any form that git accepts")
    parser.add_argument("--rounds", type=int, default=10, help="rounds per operation (10)")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds per turn (2)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8], help="numbers of clients (1 8)")
    parser.add_argument("--only", nargs="+", default=[""], help="operations whose name contains one of these texts")
    parser.add_argument("--one-user", action="store_true", help="all clients log in as one user")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


if __name__ == "__main__":
    exit_with(main, say, (RuntimeError,))
