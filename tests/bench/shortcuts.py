"""The gain of each server shortcut: requests per second with the shortcut, divided by requests per second without the
shortcut.

    .venv/bin/python -m tests.bench.shortcuts [--rounds 5] [--seconds 2] [--json]

All variants of the server process run on one database. One variant is measured while the other variants are suspended.
The fast path does not serve an endpoint if MLflow's source code for this endpoint differs from that of every tested
release. Therefore, the shortcuts that speed up MLflow's own responses are measured without the fast path.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scripts.interrupts import exit_with
from tests.bench import environments, load
from tests.bench.contenders import Contender, alone, seeded_cluster
from tests.bench.run_without import SHORTCUTS
from tests.support import services

RUNNER = Path(__file__).with_name("run_without.py")
CASES = {name: "" if name == "fast path" else "fast path" for name in SHORTCUTS}
"""Shortcut → the names of the shortcuts that both servers lack when this shortcut is measured."""
CLIENTS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=CASES, metavar="SHORTCUT")
    parser.add_argument("--operations", nargs="+", default=list(load.OPERATIONS), choices=load.OPERATIONS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlflow-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        ratios = measure(folder, options)
    if options.json:
        print(json.dumps(ratios, indent=1))
        return 0
    print(f"| requests/s with the shortcut / without it | {' | '.join(options.operations)} |")
    print("| --- |" + " --- |" * len(options.operations))
    for shortcut, row in ratios.items():
        print(f"| {shortcut} | {' | '.join(f'{row[each]:.2f}' for each in options.operations)} |")
    return 0


def measure(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return a dictionary: shortcut → operation → ratio of the median requests per second."""
    lacking = sorted({"", *(CASES[each] for each in options.only)} | {joined(each) for each in options.only})
    with contextlib.ExitStack() as stack:
        say("filling the database")
        cluster, data = stack.enter_context(seeded_cluster(folder / "postgresql", {}))
        servers = {}
        for lack in lacking:
            say(f"starting the server without {lack or 'nothing'}")
            servers[lack] = stack.enter_context(server(folder, cluster, data, lack))
        found: dict[tuple[str, str], list[float]] = {}
        everyone = list(servers.values())
        for number in range(options.rounds + 1):  # the first round warms up
            for operation in options.operations:
                for lack in lacking if number % 2 else lacking[::-1]:
                    with alone(servers[lack], everyone):
                        measured = load.run(servers[lack].target, operation, data, CLIENTS, options.seconds)
                    assert not measured.errors, measured.errors[0]
                    if number:
                        found.setdefault((lack, operation), []).append(measured.per_second)
            say(f"round {number} of {options.rounds}")
    rates = {case: statistics.median(values) for case, values in found.items()}
    return {
        name: {each: rates[CASES[name], each] / rates[joined(name), each] for each in options.operations}
        for name in options.only
    }


def joined(shortcut: str) -> str:
    """Return the names of all shortcuts that the server without `shortcut` lacks."""
    return ",".join(filter(None, (CASES[shortcut], shortcut)))


@contextlib.contextmanager
def server(folder: Path, cluster: services.PostgreSQL, data: load.Dataset, lack: str) -> Iterator[Contender]:
    """Run one server process on a Unix socket, without nginx."""
    place = folder / (lack.replace(" ", "-").replace(",", "+") or "whole")
    place.mkdir()
    variables = {
        "MLFLOW_BACKEND_STORE_URI": cluster.uri(),
        "MLFLOW_ARTIFACTS_DESTINATION": "mlflow-host://artifacts/models",
        "MLFLOW_SERVER_ALLOWED_HOSTS": "localhost",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MALLOC_ARENA_MAX": "2",
        "TMPDIR": str(place),
    }
    program = [str(RUNNER), lack]
    with services.server_processes(place, variables, 1, str(environments.image()), program) as (process,):
        yield Contender(
            place.name,
            f"without {lack}",
            load.Target(str(process.socket)),
            "",
            data,
            cluster,
            (process.pid,),
        )


def say(text: str) -> None:
    print(f"shortcuts: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_with(main, say)
