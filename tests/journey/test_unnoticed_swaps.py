"""A training that runs while the machine is replaced gets no exception, loses no data and creates nothing twice."""

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
    """One training per client release, with connect.py's variables except the retries, during the block.

    Yields by release the files with the acknowledged data. Fails with the traceback of a training that ended early.
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
    """The rounds of a training. MLflow's client prints other lines between them."""
    return [json.loads(line) for line in file.read_text().splitlines() if line.startswith("{")]


def differences(server: Server, release: str, file: Path) -> list[str]:
    """The differences between the server's data and the acknowledged data."""
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
    """Replace the machine while the trainings run; returns when each has finished a round on the new machine.

    A client waits up to two minutes between its last tries, so two swaps within that time are one outage to it.
    """
    wait_for_rounds(files)
    launch_server(*arguments)
    wait_for_rounds(files)
    return describe_server()


def wait_for_rounds(files: Mapping[str, Path]) -> None:
    """Wait until each training has begun and finished a round."""
    due = {release: len(acknowledged(file)) + 2 for release, file in files.items()}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while late := [release for release, file in files.items() if len(acknowledged(file)) < due[release]]:
        told = {release: files[release].with_suffix(".err").read_text()[-1000:] for release in late}
        assert time.monotonic() < deadline, f"no round for {PATIENCE_SECONDS} s: {told}"
        time.sleep(1)


@contextmanager
def asking(server: Server) -> Iterator[list[str]]:
    """Send POST requests every 20 ms during the block, on a kept connection and on new ones.

    Yields the failures after which MLflow's client does not repeat a POST that creates something: connections that end
    before the response. Failures to connect and SSL errors are left out, because the client repeats those. A starting
    machine causes SSL errors with its temporary certificate.
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
    """Swaps to the same schema, forward and back, with clients of four releases."""
    newer = image["ami_id"]
    with own_stack(cloud, "swaps"):
        server = launch_server("--ami", older_image)
        with trainings(server, CLIENTS, tmp_path) as files:
            for number in range(5):
                swap(files, "--ami", newer)
                server = swap(files, "--ami", older_image, "--set", f"backupRetentionDays={7 + number}")
        for release, file in files.items():
            assert differences(server, release, file) == [], release
