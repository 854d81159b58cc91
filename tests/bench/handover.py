"""Benchmark: processor time to pass a call from the event loop to a thread and to pass the result back.

    .venv/bin/python -m tests.bench.handover

The baseline is asyncio's run_in_executor with a ThreadPoolExecutor. The server's own threads (RequestThreads) and the
baseline are measured alternately, both on uvloop. The called function returns at once. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlflow_host.server.request_threads import RequestThreads
from scripts.interrupts import exit_with
from tests.bench import environments
from tests.bench.__main__ import say

ROOT = Path(__file__).parents[2]
THREADS = 8


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.handover", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds of both (15)")
    parser.add_argument("--calls", type=int, default=3000, help="calls per round (3000)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # only the image's packages have uvloop
    options = parser.parse_args()
    if not options.here:
        say("with the packages of the image")
        path = f"{ROOT}:{ROOT}/provisioning/rootfs/usr/lib/mlflow-host"
        arguments = ["--here", f"--rounds={options.rounds}", f"--calls={options.calls}"]
        command = [str(environments.image()), "-m", "tests.bench.handover", *arguments]
        return subprocess.run(command, env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"}).returncode

    import uvloop

    print(json.dumps(uvloop.run(measure(options.rounds, options.calls))))
    return 0


async def measure(rounds: int, calls: int) -> dict[str, float]:
    """Return the two medians in microseconds per call, and their ratio."""
    executor, threads = ThreadPoolExecutor(THREADS), RequestThreads(THREADS, "request")
    loop = asyncio.get_running_loop()

    def baseline() -> Awaitable[int]:
        return loop.run_in_executor(executor, int)

    def ours() -> Awaitable[int]:
        return threads.call(int)

    found: dict[Callable[[], Awaitable[int]], list[float]] = {baseline: [], ours: []}
    for number in range(rounds):
        for call in (baseline, ours) if number % 2 else (ours, baseline):
            begun = time.process_time()
            for _ in range(calls):
                await call()
            found[call].append((time.process_time() - begun) / calls * 1e6)
    before, now = (statistics.median(found[call]) for call in (baseline, ours))
    return {"run_in_executor_us": round(before, 1), "ours_us": round(now, 1), "ratio": round(before / now, 2)}


if __name__ == "__main__":
    exit_with(main, say, (RuntimeError,))
