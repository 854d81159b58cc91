"""How long a bake, a launch and the change to another image of the same schema take on the local cloud.

    python -m tests.bench.launches             two bakes, three launches, four swaps: the medians
    python -m tests.bench.launches --rounds 1

A launch counts from RunInstances to the first authenticated 200. An outage counts as the drill's does, from the last
200 of the old machine to the first of the new one. JSON on standard output and in build/bench/launches.json, where the
report of `python -m tests.bench` finds it.
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

sys.path[:0] = [str(Path(__file__).parents[2] / "scripts"), str(Path(__file__).parents[1])]

import drill  # noqa: E402
import pytest  # noqa: E402
from interrupts import exit_with  # noqa: E402
from local_cloud import LocalCloud, LocalCloudError  # noqa: E402
from rehearsal import stack  # noqa: E402

if TYPE_CHECKING:
    from servers import Server

STACK = "bench"


def main() -> int:
    options = arguments()
    os.environ[stack.NAMED_BY] = STACK
    from servers import destroy_server, launch_server

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
            say(f"away for {outages[-1]:.1f} s")
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
    """Seconds of each bake, and two images of this working copy; the newest there are, as far as none is baked."""
    from images import find
    from servers import script

    seconds = []
    for _ in range(bakes):
        begun = time.monotonic()
        script("bake.py", "--local")
        seconds.append(time.monotonic() - begun)
        say(f"baked in {seconds[-1]:.0f} s")
    finished = [each for each in find(stack.clients(cloud)("ec2")) if each.finished]
    newest = [each.id for each in sorted(finished, key=lambda each: each.created)][-2:]
    if len(newest) < 2:
        raise SystemExit(f"launches: there are {len(newest)} images, and a swap needs two: bake with --bakes 2")
    return seconds, newest


def boot_steps(cloud: Any, server: Server) -> dict[str, float]:
    """Seconds that each step of the boot took."""
    told = cloud.exec(
        server.instance_id, ["sh", "-c", "for each in /run/mlflow-host/status/*.json; do cat $each; done"]
    )
    return {each["step"]: each["seconds"] for each in map(json.loads, told.stdout.splitlines())}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.launches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="launches, and one more swap (3)")
    parser.add_argument("--bakes", type=int, default=2, help="bakes before; 0 takes the two newest images (2)")
    parser.add_argument("--out", type=Path, default=Path("build/bench/launches.json"))
    return parser.parse_args()


def say(text: str) -> None:
    print(f"launches: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_with(main, say, (drill.DrillFailed, LocalCloudError, pytest.fail.Exception))
