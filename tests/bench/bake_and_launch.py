"""Benchmark: duration of a bake, of a launch, and of a swap to another image with the same schema, on the local cloud.

    .venv/bin/python -m tests.bench.bake_and_launch             medians of two bakes, three launches and four swaps
    .venv/bin/python -m tests.bench.bake_and_launch --rounds 1

A launch lasts from RunInstances to the first authenticated response with status 200. The outage of a swap lasts from
the old machine's last authenticated 200 to the new machine's first authenticated 200, like in the drill. The script
prints JSON on stdout, and writes it to build/bench/bake_and_launch.json for the report of `python -m tests.bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from scripts import drill
from scripts.interrupts import exit_with
from scripts.local_cloud import LocalCloud, LocalCloudError
from scripts.rehearsal import stack

if TYPE_CHECKING:
    from tests.support.servers import Server

STACK = "bench"


def main() -> int:
    options = arguments()
    os.environ[stack.NAMED_BY] = STACK
    from tests.support.servers import destroy_server, launch_server

    cloud = LocalCloud()
    cloud.up()
    try:
        bakes, images = two_images(cloud, options.bakes)
        launched, steps = [], []
        for number in range(options.rounds):
            server = launch_server("--ami", images[number % 2], "--set", "allowedCidrs=0.0.0.0/0")
            launched.append(server.seconds_to_first_answer)
            steps.append(boot_steps(cloud, server))
            say(f"launched in {launched[-1]:.1f} s")
            if number + 1 < options.rounds:
                destroy_server(cloud)
        outages = []
        for number in range(options.rounds + 1):
            with drill.watching(vars(server)) as outage:
                launch_server("--ami", images[(options.rounds + number) % 2])
            outages.append(outage())
            say(f"outage of {outages[-1]:.1f} s")
    finally:
        destroy_server(cloud)
        cloud.down()
    result = {
        "bake": [round(each, 1) for each in bakes],
        "launch": launched,
        "swap": [round(each, 2) for each in outages],
        "steps": {name: round(statistics.median(each[name] for each in steps), 2) for name in steps[-1]},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


def two_images(cloud: Any, bakes: int) -> tuple[list[float], list[str]]:
    """Return the duration of each bake in seconds, and the two newest images. If `bakes` is less than two, existing
    images are used too."""
    from scripts.imaging.ec2_images import find
    from tests.support.servers import script

    seconds = []
    for _ in range(bakes):
        begun = time.monotonic()
        script("bake.py", "--local")
        seconds.append(time.monotonic() - begun)
        say(f"baked in {seconds[-1]:.0f} s")
    finished = [each for each in find(stack.clients(cloud)("ec2")) if each.finished]
    newest = [each.id for each in sorted(finished, key=lambda each: each.created)][-2:]
    if len(newest) < 2:
        raise SystemExit(f"bake_and_launch: a swap needs two images, but there are {len(newest)}: bake with --bakes 2")
    return seconds, newest


def boot_steps(cloud: Any, server: Server) -> dict[str, float]:
    """Return the seconds that each boot step took."""
    told = cloud.exec(
        server.instance_id, ["sh", "-c", "for each in /run/mlflow-host/status/*.json; do cat $each; done"]
    )
    return {each["step"]: each["seconds"] for each in map(json.loads, told.stdout.splitlines())}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.bake_and_launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3, help="number of launches; there is one more swap (3)")
    parser.add_argument("--bakes", type=int, default=2, help="number of bakes; 0: use the two newest images (2)")
    parser.add_argument("--out", type=Path, default=Path("build/bench/bake_and_launch.json"))
    return parser.parse_args()


def say(text: str) -> None:
    print(f"bake_and_launch: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_with(main, say, (drill.DrillFailed, LocalCloudError, pytest.fail.Exception))
