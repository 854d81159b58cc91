"""A training that runs while the machine is replaced gets no exception, loses no data and creates no object twice."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from scripts.local_cloud import LocalCloud
from tests.schema.environments import environment, releases
from tests.support import training
from tests.support.servers import OLDER, Server, client_of, describe_server, launch_server, own_stack

pytestmark = pytest.mark.machine

NEWEST = releases()[-1]
CLIENTS = ("2.22.0", OLDER, "3.17.2", NEWEST)
SEARCH = "/api/2.0/mlflow/runs/search"
PATIENCE_SECONDS = 300


@contextmanager
def trainings(server: Server, clients: tuple[str, ...], folder: Path) -> Iterator[dict[str, Path]]:
    """During the block, run one training per client release, with connect.py's variables except the retry variables.

    Yields for each release the file with the data that the server acknowledged. If a training ends early, the test
    fails with the traceback of the training.
    """
    stop, running = folder / "stop", {}
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    exports = {name: value for name, value in server.exports.items() if "RETR" not in name}
    files = {release: folder / f"{release}.jsonl" for release in clients}
    try:
        for release, file in files.items():
            command = [str(environment(release)), training.__file__, str(stop), f"by-{release}"]
            with file.open("wb") as out, file.with_suffix(".err").open("wb") as err:
                running[release] = subprocess.Popen(command, stdout=out, stderr=err, env=plain | exports)
        yield files
        stop.touch()
        for release, process in running.items():
            assert process.wait(timeout=300) == 0, files[release].with_suffix(".err").read_text()[-3000:]
    finally:
        for process in running.values():
            process.send_signal(signal.SIGKILL)
            process.wait()


def acknowledged(file: Path) -> list[dict[str, Any]]:
    """Return the rounds that a training completed. The file also contains lines that MLflow's client printed."""
    return [json.loads(line) for line in file.read_text().splitlines() if line.startswith("{")]


def differences(server: Server, release: str, file: Path) -> list[str]:
    """Return the differences between the server's data and the acknowledged data."""
    rounds = acknowledged(file)
    found = []
    with client_of(server) as client:
        names = [each.name for each in client.search_experiments(filter_string=f"name LIKE 'by-{release}-%'")]
        if sorted(names) != sorted(each["name"] for each in rounds):
            found.append(f"experiments {names}, acknowledged {[each['name'] for each in rounds]}")
        for each in rounds:
            name, run = each["name"], each["run"]
            runs = [one.info.run_id for one in client.search_runs([each["experiment"]])]
            losses = [(one.step, one.value) for one in client.get_metric_history(run, "loss")]
            accuracies = [(one.step, one.value) for one in client.get_metric_history(run, "accuracy")]
            versions = [one.version for one in client.search_model_versions(f"name = '{name}'")]
            logged = [one.model_id for one in client.search_logged_models([each["experiment"]])]
            seen = (runs, sorted(losses), sorted(accuracies), [int(one) for one in versions], logged)
            due = (
                [run],
                [(step, 1 / (step + 1)) for step in range(5)],
                [(step, step / 10) for step in range(10)],
                [1],
                [each["logged_model"]] if each["logged_model"] else [],
            )
            if seen != due:
                found.append(f"{name}: {seen}, not {due}")
            stored = client.get_run(run)
            if (stored.info.status, stored.data.params) != ("FINISHED", {"depth": "3"}):
                found.append(f"{name}: {stored.info.status}, {stored.data.params}")
            if [one.path for one in client.list_artifacts(run, "notes")] != ["notes/name.txt"]:
                found.append(f"{name}: the artifact is missing")
    return found


def swap(files: Mapping[str, Path], *arguments: str) -> Server:
    """Replace the machine while the trainings run, and return when each training has finished a round on the new
    machine.

    Between its last retries, a client waits up to two minutes: two swaps in that time are one outage for the client.
    """
    wait_for_rounds(files)
    launch_server(*arguments)
    wait_for_rounds(files)
    return describe_server()


def wait_for_rounds(files: Mapping[str, Path]) -> None:
    """Wait until each training has begun a new round and finished that round."""
    due = {release: len(acknowledged(file)) + 2 for release, file in files.items()}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while late := [release for release, file in files.items() if len(acknowledged(file)) < due[release]]:
        told = {release: files[release].with_suffix(".err").read_text()[-1000:] for release in late}
        assert time.monotonic() < deadline, f"no round for {PATIENCE_SECONDS} s: {told}"
        time.sleep(1)


@contextmanager
def asking(server: Server) -> Iterator[list[str]]:
    """Send POST requests every 20 ms during the block, on one connection that stays open and on new connections.

    Yields the list of connections that ended before the response. If a POST that creates an object fails in this way,
    MLflow's client does not repeat the POST. The list excludes failed connects and SSL errors, after which MLflow's
    client repeats a request. The temporary certificate of a starting machine causes SSL errors.
    """
    failures: list[str] = []
    stop = threading.Event()

    def ask(kept: bool) -> None:
        session = requests.Session()
        while not stop.wait(0.02):
            session = session if kept else requests.Session()
            try:
                session.post(f"{server.url}{SEARCH}", json={}, verify=server.server_certificate or True, timeout=120)
            except requests.ConnectionError as error:
                if not isinstance(error, requests.exceptions.SSLError) and "Failed to establish" not in str(error):
                    failures.append(f"{'kept' if kept else 'new'} connection: {error!r}")

    threads = [threading.Thread(target=ask, args=(kept,)) for kept in (True, False)]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_training_goes_on_while_the_machine_is_replaced(
    cloud: LocalCloud, image: Mapping[str, Any], tmp_path: Path
) -> None:
    with own_stack(cloud, "swaps"):
        server = launch_server("--ami", image["ami_id"])
        with trainings(server, (NEWEST,), tmp_path) as files:
            with asking(server) as failures:
                after = swap(files, "--set", "backupRetentionDays=7")
            assert after.instance_id != server.instance_id
        assert failures == []
        assert len(acknowledged(files[NEWEST])) >= 2
        assert differences(after, NEWEST, files[NEWEST]) == []


@pytest.mark.slow
def test_trainings_of_old_and_new_clients_go_on_over_ten_swaps(
    cloud: LocalCloud, image: Mapping[str, Any], older_image: str, tmp_path: Path
) -> None:
    """Swap five times to a newer MLflow release and back, while clients of four releases train."""
    newer = image["ami_id"]
    with own_stack(cloud, "swaps"):
        server = launch_server("--ami", older_image)
        with trainings(server, CLIENTS, tmp_path) as files:
            for number in range(5):
                swap(files, "--ami", newer)
                server = swap(files, "--ami", older_image, "--set", f"backupRetentionDays={7 + number}")
        for release, file in files.items():
            assert differences(server, release, file) == [], release
