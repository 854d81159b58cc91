"""Load test of a machine on the local cloud, with a mix of requests or with many connections.

    .venv/bin/python -m tests.bench.machine --minutes 10                    8 clients log, a browser opens pages
    .venv/bin/python -m tests.bench.machine --connections 200 --seconds 60   every operation in turn from 200 clients

The script launches the newest image as a t3.small (2 cores, 2 GiB) in its own stack, and deletes the stack at the end.
The script prints JSON on stdout and progress on stderr. Exit status 1 means that a response was wrong, or that a
process was killed, restarted or swapped out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from scripts.interrupts import exit_with
from scripts.local_cloud import LocalCloud, LocalCloudError
from scripts.rehearsal import stack
from tests.bench import load
from tests.bench.load import Dataset, Target

if TYPE_CHECKING:
    from tests.support.servers import Server

STACK = "bench"
GIGABYTE = 10**9

UPLOAD = """
import sys, time, mlflow
with mlflow.start_run():
    started = time.monotonic()
    mlflow.log_artifact(sys.argv[1])
    took = time.monotonic() - started
print(took)
"""

WRONG = re.compile(
    r"too many clients|remaining connection slots|out of memory|could not fork|server process .* was term"
)
"""This pattern matches PostgreSQL's log messages about refused connections and killed processes."""


def main() -> int:
    options = arguments()
    os.environ[stack.NAMED_BY] = STACK
    from tests.support.servers import destroy_server, launch_server

    say("launching")
    changes = [word for change in options.set for word in ("--set", change)]
    cloud = LocalCloud()
    cloud.up()
    try:
        server = launch_server("--set", "instanceType=t3.small", "--set", "allowedCidrs=0.0.0.0/0", *changes)
        say(f"on {server.ami_id} with MLflow {server.mlflow_version}")
        before = machine_facts(cloud, server)
        if options.connections:
            seen = many_connections(server, options.connections, options.seconds)
        else:
            seen = everything_at_once(server, options.minutes * 60)
        after = machine_facts(cloud, server)
    finally:
        if not options.keep:
            destroy_server(cloud)
            cloud.down()
    wrong = [*seen.pop("wrong"), *complaints(before, after)]
    image = {"ami_id": server.ami_id, "mlflow_version": server.mlflow_version}
    result = {**image, **seen, "machine": after, "wrong": wrong[:20], "wrongs": len(wrong)}
    print(json.dumps(result, indent=2))
    say("no errors" if not wrong else f"{len(wrong)} errors, for example: {wrong[0]}")
    return 1 if wrong else 0


def everything_at_once(server: Server, seconds: float) -> dict[str, Any]:
    """Eight clients log metrics, one client uploads files of 1 GB in sequence, and a browser opens pages."""
    data, until = prepare(server), time.monotonic() + seconds
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlflow-load-")))
        side_by_side = [
            BackgroundTask(lambda: upload_files(server, folder, until)),
            BackgroundTask(lambda: browse(server, data, until)),
        ]
        say(f"8 clients, an upload and a browser for {seconds / 60:g} minutes")
        logged = load.run(target(server), "log-batch, 100 metrics", data, 8, seconds)
        uploads, pages = (each.result() for each in side_by_side)
    return {
        "log-batch, 100 metrics": summary(logged),
        "uploads of 1 GB": uploads["seconds"],
        "pages": {"opened": pages["opened"], "p99 s": pages["p99"]},
        "wrong": [*logged.errors, *uploads["wrong"], *pages["wrong"]],
    }


def many_connections(server: Server, connections: int, seconds: float) -> dict[str, Any]:
    data = prepare(server)
    say(f"{connections} connections for {seconds:g} s")
    measured = load.run(target(server), load.IN_TURN, data, connections, seconds)
    return {f"{connections} connections": summary(measured), "wrong": measured.errors}


def prepare(server: Server) -> Dataset:
    """Create runs for the clients with MLflow's client. One of the runs has a metric history."""
    from mlflow.entities import Metric

    from tests.support.servers import client_of

    with client_of(server) as client:
        experiment = client.create_experiment(f"load-{time.time_ns()}")
        runs = [client.create_run(experiment).info.run_id for _ in range(32)]
        for start in range(0, 10_000, 1000):
            steps = range(start, start + 1000)
            client.log_batch(
                runs[0], [Metric("loss", 1 / (step + 1), 1_700_000_000_000 + step, step) for step in steps]
            )
    return Dataset(experiment, experiment, experiment, tuple(runs[1:]), runs[0])


def target(server: Server) -> Target:
    import base64

    host = server.url.removeprefix("https://")
    login = base64.b64encode(f"{server.username}:{server.password}".encode()).decode()
    return Target((host, 443), host, (f"Authorization: Basic {login}",), server.server_certificate or "")


def summary(measured: load.Measured) -> dict[str, Any]:
    return {
        "requests": len(measured.latencies),
        "per second": round(measured.per_second, 1),
        "p50 ms": round(measured.percentile(0.5)),
        "p99 ms": round(measured.percentile(0.99)),
        "errors": len(measured.errors),
    }


def upload_files(server: Server, folder: Path, until: float) -> dict[str, Any]:
    file = folder / "large.bin"
    seconds: list[float] = []
    wrong: list[str] = []
    block = os.urandom(2**20)
    with file.open("wb") as output:
        for start in range(0, GIGABYTE, len(block)):
            output.write(block[: min(len(block), GIGABYTE - start)])
    environment = {**os.environ, **server.exports, "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    while time.monotonic() < until and len(seconds) < MOST_UPLOADS:
        command = [sys.executable, "-W", "ignore", "-c", UPLOAD, str(file)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ended.returncode:
            wrong.append(f"upload: {ended.stderr.strip().splitlines()[-1:]}")
            break
        seconds.append(round(float(ended.stdout.splitlines()[-1]), 1))
    return {"seconds": seconds, "wrong": wrong}


MOST_UPLOADS = 3
"""The number of uploads is limited, because the object store keeps the files on this machine's disk."""


def browse(server: Server, data: Dataset, until: float) -> dict[str, Any]:
    """Open pages in a browser: experiments, runs, a run's metrics. An error in the console counts as a wrong page."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    from tests.browser.conftest import SWITCHES, log_in
    from tests.browser.test_mlflow_pages import EXPECTED_ERRORS

    pages = {
        "#/experiments": "load-",
        f"#/experiments/{data.small_experiment}/runs": "load-",
        f"#/experiments/{data.small_experiment}/runs/{data.history_run}": "loss",
        f"#/experiments/{data.small_experiment}/runs/{data.history_run}/model-metrics": "loss",
    }
    took: list[float] = []
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mlflow-chromium-") as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for switch in (*SWITCHES, f"--user-data-dir={profile}"):
            options.add_argument(switch)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        options.accept_insecure_certs = True
        browser = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
        try:
            log_in(browser, server)
            browser.get_log("browser")  # type: ignore[no-untyped-call]
            while time.monotonic() < until:
                for place, wanted in pages.items():
                    started = time.monotonic()
                    browser.get("about:blank")
                    browser.get(f"{server.url}/{place}")
                    shows = lambda driver, text=wanted: text in driver.find_element(By.TAG_NAME, "body").text  # noqa: E731
                    try:
                        WebDriverWait(browser, 60).until(shows)
                    except Exception as error:
                        wrong.append(f"page {place}: {type(error).__name__}")
                    took.append(time.monotonic() - started)
                    complaints = browser.get_log("browser")  # type: ignore[no-untyped-call]
                    severe = [entry["message"] for entry in complaints if entry["level"] == "SEVERE"]
                    wrong += [f"page {place}: {one}" for one in severe if not any(e in one for e in EXPECTED_ERRORS)]
                time.sleep(1)
        finally:
            browser.quit()
    return {"opened": len(took), "p99": round(sorted(took)[int(0.99 * len(took))], 1), "wrong": wrong}


class BackgroundTask:
    """Run a function in a separate thread. `result` waits until the function returns."""

    def __init__(self, act: Callable[[], dict[str, Any]]):
        self._found: dict[str, Any] = {}
        self._thread = threading.Thread(target=lambda: self._found.update(act()), daemon=True)
        self._thread.start()

    def result(self) -> dict[str, Any]:
        self._thread.join()
        if not self._found:
            raise RuntimeError("the background task failed: its error is above")
        return self._found


FACTS = r"""
memory=/sys/fs/cgroup/memory
[ -d $memory ] || memory=/sys/fs/cgroup
first() { for each; do [ -e $memory/$each ] && cat $memory/$each && return; done; echo 0; }
echo "limit_mb $(($(first memory.limit_in_bytes memory.max) / 1000000))"
echo "used_mb $(($(first memory.usage_in_bytes memory.current) / 1000000))"
echo "unreclaimable_mb $(($(awk '$1 == "total_rss" || $1 == "anon" {print $2; exit}' $memory/memory.stat) / 1000000))"
echo "swapped_mb $(($(awk '$1 == "total_swap" {print $2}' $memory/memory.stat | grep . || echo 0) / 1000000))"
count() { awk "$1"' {n += $NF} END {print n + 0}'; }
echo "killed $(cat $memory/memory.oom_control $memory/memory.events 2>/dev/null | count '$1 == "oom_kill"')"
echo "failed_units $(systemctl list-units --state=failed --no-legend | wc -l)"
echo "restarts $(systemctl show 'mlflow-*' nginx.service --property=NRestarts --value | count 1)"
"""

RESTARTED = r"""
units=$(systemctl list-units --all --plain --no-legend --type=service 'mlflow-*' nginx.service | awk '{print $1}')
for unit in $units; do
  [ "$(systemctl show $unit --property=NRestarts --value)" = 0 ] ||
    journalctl --unit=$unit --output=cat | grep -B 3 'Scheduled restart job'
done
"""
"""A script that prints the journal lines before each restart of a unit."""


def machine_facts(cloud: Any, server: Server) -> dict[str, Any]:
    """Return the machine's memory in MB, and its killed processes, failed units, restarts and PostgreSQL errors."""
    output = cloud.exec(server.instance_id, ["bash", "-c", FACTS]).stdout
    facts: dict[str, Any] = {name: int(value) for name, value in (line.split() for line in output.splitlines())}
    journal = cloud.exec(server.instance_id, ["journalctl", "--unit=mlflow-host-postgresql", "--output=cat"]).stdout
    restarted = cloud.exec(server.instance_id, ["bash", "-c", RESTARTED]).stdout.splitlines()
    return facts | {"postgresql": [line for line in journal.splitlines() if WRONG.search(line)], "restarted": restarted}


def complaints(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    more = {name: after[name] - before[name] for name in ("killed", "failed_units", "restarts", "swapped_mb")}
    return [f"{name}: {count}" for name, count in more.items() if count > 0] + [
        *after["postgresql"],
        *after["restarted"],
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.machine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="duration of the mixed load (10)")
    parser.add_argument("--connections", type=int, help="run this many clients instead of the mixed load")
    parser.add_argument("--seconds", type=float, default=60, help="duration with --connections (60)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the stack")
    parser.add_argument("--keep", action="store_true", help="do not delete the stack at the end")
    return parser.parse_args()


def say(text: str) -> None:
    print(f"machine: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_with(main, say, (LocalCloudError, pytest.fail.Exception))
