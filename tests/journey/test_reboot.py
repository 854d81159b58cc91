"""A restarting machine shows the progress of its boot, and has all its data after the boot."""

import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests
import urllib3
from mlflow import MlflowClient

from scripts.local_cloud import LocalCloud, LocalCloudError
from tests.support.servers import QUESTION, Server

pytestmark = pytest.mark.machine

PATIENCE_SECONDS = 300


def everything(client: MlflowClient) -> dict[str, Any]:
    """Return the experiments, runs, metric histories, traces and models that the API returns."""
    experiments = client.search_experiments()
    ids = [each.experiment_id for each in experiments]
    runs = [run for each in ids for run in client.search_runs([each], max_results=1000)]
    return {
        "experiments": {each.experiment_id: each.name for each in experiments},
        "runs": {run.info.run_id: (run.data.to_dictionary(), run.info.status) for run in runs},
        "histories": {
            (run.info.run_id, key): [
                (point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)
            ]
            for run in runs
            for key in run.data.metrics
        },
        "artifacts": {run.info.run_id: sorted(f.path for f in client.list_artifacts(run.info.run_id)) for run in runs},
        "traces": sorted(trace.info.trace_id for trace in client.search_traces(locations=ids)),
        "models": sorted((each.name, each.version) for each in client.search_model_versions()),
    }


def test_reboot_loses_nothing_and_shows_its_progress(
    server: Server, cloud: LocalCloud, client: MlflowClient, example_runs: Mapping[str, str], tmp_path: Path
) -> None:
    before = everything(client)
    assert len(before["runs"]) >= 3 and before["traces"] and before["models"]
    booted_at = first_process_start(cloud, server)
    assert booted_at

    with pages_meanwhile(server) as pages:
        cloud.client("ec2").reboot_instances(InstanceIds=[server.instance_id])
        answers = answers_until_ready(server, booted_at, cloud)

    assert everything(client) == before
    picture = client.download_artifacts(
        example_runs["classification_iris.py"], "confusion_matrix.png", dst_path=str(tmp_path)
    )
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    client.set_tag(example_runs["regression_diabetes.py"], "after-the-reboot", "writable")

    waiting = [each for each in answers if each.status_code == 429]
    assert waiting, f"no status 429 between reboot and ready, only {sorted({each.status_code for each in answers})}"
    assert {each.status_code for each in answers} == {200, 429}
    for scheme in ("http", "https"):
        shown = [each for each in pages if each.url.startswith(f"{scheme}:") and "MLflow is starting" in each.text]
        assert shown, f"no {scheme} request without a login returned the boot's status page"
        for each in shown:
            assert each.status_code == 503 and each.headers["Content-Type"].startswith("text/html")
            assert server.password not in each.text
            assert "WWW-Authenticate" not in each.headers, "a browser would ask for a password that does not work yet"
    for each in waiting:
        assert "Retry-After" not in each.headers
        assert each.headers["Content-Type"].startswith("application/json")
        assert each.json()


def test_boot_survives_a_public_address_that_changes_again_and_again(
    server: Server, cloud: LocalCloud, client: MlflowClient
) -> None:
    """In this test, each change of address drops the machine's connections to AWS without a TCP reset. On AWS, the
    attachment of the Elastic IP during the boot has the same effect."""
    before, booted_at = everything(client), first_process_start(cloud, server)
    assert booted_at
    ec2 = cloud.client("ec2")
    (address,) = ec2.describe_addresses(Filters=[{"Name": "instance-id", "Values": [server.instance_id]}])["Addresses"]
    ec2.reboot_instances(InstanceIds=[server.instance_id])
    deadline = time.monotonic() + PATIENCE_SECONDS
    while first_process_start(cloud, server) in (None, booted_at):
        assert time.monotonic() < deadline, "the machine does not boot again"
        time.sleep(0.05)
    for _ in range(8):
        ec2.disassociate_address(PublicIp=address["PublicIp"])
        ec2.associate_address(AllocationId=address["AllocationId"], InstanceId=server.instance_id)
        time.sleep(0.5)
    answers_until_ready(server, booted_at, cloud)
    assert everything(client) == before


def test_postgresql_killed_while_a_query_runs_is_back_in_seconds(
    server: Server, cloud: LocalCloud, client: MlflowClient, example_runs: Mapping[str, str]
) -> None:
    """Kill only the main process, as the kernel does when memory runs out. A surviving child process would hold
    PostgreSQL's shared memory and prevent the start of a new server."""
    before = everything(client)
    unit = "mlflow-host-postgresql.service"

    def show(name: str) -> str:
        return cloud.exec(server.instance_id, ["systemctl", "show", "--value", "--property", name, unit]).stdout.strip()

    restarts, killed = int(show("NRestarts")), show("MainPID")
    endless = "SELECT count(*) FROM generate_series(1, 100000000000)"
    query = ["systemd-run", "--quiet", "--uid=postgres", "psql", "--host=/run/postgresql", "--command", endless]
    assert cloud.exec(server.instance_id, query).returncode == 0
    at_work = ["pgrep", "--parent", killed, "--full", "SELECT"]
    deadline = time.monotonic() + 20
    while not (child := cloud.exec(server.instance_id, at_work).stdout.strip()):
        assert time.monotonic() < deadline, "the query does not run"
        time.sleep(0.1)

    assert cloud.exec(server.instance_id, ["kill", "-KILL", killed]).returncode == 0
    deadline = time.monotonic() + 60
    while show("MainPID") in (killed, "0") or not server.answers():
        assert time.monotonic() < deadline, "PostgreSQL was killed and MLflow does not answer after 60 s"
        time.sleep(0.2)

    assert cloud.exec(server.instance_id, ["kill", "-0", child]).returncode != 0, "the query outlived its server"
    assert int(show("NRestarts")) == restarts + 1
    assert everything(client) == before
    client.set_tag(example_runs["regression_diabetes.py"], "after-the-kill", "writable")


@contextmanager
def pages_meanwhile(server: Server) -> Iterator[list[requests.Response]]:
    """Yield the list of pages that a browser without a login receives over http and https during the `with` block."""
    seen: list[requests.Response] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.1):
            for scheme in ("http", "https"):
                with suppress(requests.RequestException), warnings.catch_warnings():
                    warnings.simplefilter("ignore", urllib3.exceptions.InsecureRequestWarning)
                    address = server.url.replace("https:", f"{scheme}:", 1)
                    # Until the data volume is mounted, the server has a temporary certificate.
                    page = {"Accept": "text/html"}
                    seen.append(
                        requests.get(f"{address}/", timeout=2, verify=False, allow_redirects=False, headers=page)
                    )

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield seen
    finally:
        ended.set()
        looking.join()


def first_process_start(cloud: LocalCloud, server: Server) -> str | None:
    """Return the start time of the machine's first process in clock ticks, or None between two boots."""
    try:
        done = cloud.exec(server.instance_id, ["cut", "-d ", "-f22", "/proc/1/stat"])
    except LocalCloudError:
        return None
    return done.stdout.strip() or None


def answers_until_ready(server: Server, booted_at: str, cloud: LocalCloud) -> list[requests.Response]:
    """Return the responses that an API client receives until the restarted server answers 200."""
    answers: list[requests.Response] = []
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            answer = server.ask(
                QUESTION,
                auth=server.login,
                headers={"Accept": "application/json"},
                timeout=5,
            )
        except requests.ConnectionError:
            pass
        except requests.Timeout:
            pass
        else:
            answers.append(answer)
            if answer.status_code == 200 and first_process_start(cloud, server) not in (None, booted_at):
                return answers
        time.sleep(0.1)
    raise AssertionError(f"not ready {PATIENCE_SECONDS} s after the reboot; last answers: {answers[-3:]}")
