"""With jobExecution, jobs are completed. With both values of artifactTransfer, 1 GiB is uploaded and downloaded."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest

from scripts.local_cloud import LocalCloud
from tests.journey.test_artifacts import MEBIBYTE, write_noise
from tests.journey.test_sandbox import in_the_sandbox_of
from tests.support.servers import Server, client_of, launch_server, on_machine, own_stack

pytestmark = [pytest.mark.machine, pytest.mark.slow]

GIBIBYTE = 1024 * MEBIBYTE
MEMORY_BYTES = 64 * MEBIBYTE
"""The maximum growth of the server processes' memory during a transfer."""


@pytest.fixture(scope="module", params=["direct", "proxied"])
def own(request: pytest.FixtureRequest, cloud: LocalCloud, image: Mapping[str, Any]) -> Iterator[Server]:
    """Launch a machine that runs jobs, in its own stack."""
    settings = ["jobExecution=true", f"artifactTransfer={request.param}", "instanceType=t3.medium"]
    with own_stack(cloud, "transfers"):
        yield launch_server("--ami", image["ami_id"], *(word for each in settings for word in ("--set", each)))


def shell(cloud: LocalCloud, server: Server, line: str) -> str:
    return on_machine(cloud, server, "sh", "-c", line)


def test_background_job_is_completed(cloud: LocalCloud, own: Server) -> None:
    from mlflow.genai.scorers import ResponseLength

    with client_of(own) as client:
        experiment = mlflow.set_experiment("jobs").experiment_id

        @mlflow.trace
        def answer() -> str:
            return "42"

        answer()
        mlflow.flush_trace_async_logging()
        (trace,) = mlflow.search_traces(locations=[experiment], return_type="list")
        asked = {
            "experiment_id": experiment,
            "serialized_scorer": json.dumps(ResponseLength(max_length=10).model_dump()),
            "trace_ids": [trace.info.trace_id],
            "log_assessments": True,
        }
        told = own.ask("/ajax-api/3.0/mlflow/scorer/invoke", "POST", json=asked, auth=own.login).json()
        deadline = time.monotonic() + 120
        while (job := own.ask(f"/ajax-api/3.0/jobs/{told['jobs'][0]['job_id']}", auth=own.login).json())["status"] in (
            "PENDING",
            "RUNNING",
        ):
            assert time.monotonic() < deadline, job
            time.sleep(1)
        assert job["status"] == "SUCCEEDED"
        (assessment,) = client.get_trace(trace.info.trace_id).info.assessments
        assert (assessment.name, assessment.value) == ("response_length", "yes")
    processes = shell(cloud, own, "pgrep -fc 'mlflow[.]server[.]jobs|[h]uey'")
    assert int(processes) == 2, "a runner and its scheduler, and no process for each kind of job"


def test_a_job_runs_no_code_of_a_user_and_reaches_no_backup(cloud: LocalCloud, own: Server) -> None:
    """A job has the rights of MLflow's processes: their user, their environment and their sandbox."""
    serialized = {
        "name": "mine",
        "call_source": "open('/srv/mlflow/tmp/proof', 'w').write('run')\nreturn 1",
        "call_signature": "(outputs)",
        "original_func_name": "mine",
        "mlflow_version": own.mlflow_version,
        "serialization_version": 1,
    }
    body = {"experiment_id": "0", "serialized_scorer": json.dumps(serialized), "trace_ids": ["tr-0"]}
    refused = own.ask("/ajax-api/3.0/mlflow/scorer/invoke", "POST", json=body, auth=own.login, timeout=60)
    assert 400 <= refused.status_code < 500, refused.text
    register = {"experiment_id": "0", "name": "mine", "serialized_scorer": json.dumps(serialized)}
    answer = own.ask("/api/3.0/mlflow/scorers/register", "POST", json=register, auth=own.login, timeout=60)
    assert 400 <= answer.status_code < 500, answer.text
    time.sleep(5)
    assert "proof" not in shell(cloud, own, "ls /srv/mlflow/tmp")

    runner = shell(cloud, own, "pgrep -f 'mlflow[.]server[.]jobs' | head -1").strip()
    shown = shell(cloud, own, f"ps -o user= -p {runner}; cat /proc/{runner}/cgroup")
    assert shown.split()[0] == "mlflow" and "mlflow-server@1.service" in shown
    found = in_the_sandbox_of("mlflow-server@1", cloud, own)
    assert found["metadata"] in ("PermissionError", "TimeoutError", "OSError")
    for what in ("cluster", "certificates", "passwords", "environment", "shadow"):
        assert found[what] == "PermissionError", f"{what}: {found[what]}"


def test_a_file_of_a_gibibyte_goes_up_and_comes_down(cloud: LocalCloud, own: Server, tmp_path: Path) -> None:
    sent = write_noise(tmp_path / "weights.bin", 1024)
    before = look(cloud, own)
    with client_of(own) as client, watched(cloud, own) as peak:
        run = client.create_run(client.create_experiment("a gibibyte")).info.run_id
        client.log_artifact(run, str(tmp_path / "weights.bin"), "checkpoint")
        (tmp_path / "weights.bin").unlink()
        received = Path(client.download_artifacts(run, "checkpoint/weights.bin", dst_path=str(tmp_path)))
    with received.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == sent
    received.unlink()
    assert len(peak) > 10
    assert max(each.memory for each in peak) - before.memory < MEMORY_BYTES
    assert max(each.spooled for each in peak) < MEBIBYTE, "either way nothing is put on the server's disk"

    # The user interface downloads a file through the server, which writes the file to its disk first.
    asked = f"/get-artifact?path=checkpoint/weights.bin&run_uuid={run}"
    free = int(shell(cloud, own, "df --output=avail -B1 /srv/mlflow | tail -1"))
    shell(cloud, own, f"fallocate -l {free - 2 * GIBIBYTE - 512 * MEBIBYTE} /srv/mlflow/ballast")
    try:
        refused = own.ask(asked, auth=own.login, timeout=120)
        assert refused.status_code == 507
        assert "1,024 MiB do not fit into the server's temporary space" in refused.json()["message"]
    finally:
        shell(cloud, own, "rm /srv/mlflow/ballast")
    with watched(cloud, own) as peak, own.ask(asked, auth=own.login, timeout=300, stream=True) as answer:
        digest = hashlib.sha256()
        for piece in answer.iter_content(MEBIBYTE):
            digest.update(piece)
    assert digest.hexdigest() == sent
    assert max(each.spooled for each in peak) < GIBIBYTE + MEBIBYTE
    assert look(cloud, own).spooled < MEBIBYTE, "nothing is left behind"


def test_what_cannot_be_streamed_is_refused_when_it_would_not_fit_and_the_rest_arrives(
    cloud: LocalCloud, own: Server
) -> None:
    """A server process streams six uploads at the same time. The process writes any further upload to the disk if the
    disk has room for the upload."""
    with client_of(own) as client:
        run = client.create_run(client.create_experiment("many at once")).info
    folder = f"/api/2.0/mlflow-artifacts/artifacts/{run.experiment_id}/{run.run_id}/artifacts"
    body = os.urandom(2 * MEBIBYTE)
    # 6 % of the volume is free: the server accepts writes to the database, but no temporary file.
    size, available = map(int, shell(cloud, own, "df --output=size,avail -B1M /srv/mlflow | tail -1").split())
    shell(cloud, own, f"fallocate -l {available - size * 6 // 100}M /srv/mlflow/ballast")
    try:
        with watched(cloud, own) as peak, ExitStack() as open_ones:
            uploads = [open_ones.enter_context(upload_begun(own, f"{folder}/{n}.bin", body)) for n in range(24)]
            time.sleep(3)
            answers = [finished(upload, body) for upload in uploads]
    finally:
        shell(cloud, own, "rm /srv/mlflow/ballast")
    refused = [answer for answer in answers if answer[0] != 200]
    assert 0 < len(refused) < len(answers) and {status for status, _ in refused} == {507}
    assert all("server's temporary space" in json.loads(told)["message"] for _, told in refused)
    assert max(each.spooled for each in peak) < MEBIBYTE


@contextmanager
def upload_begun(server: Server, path: str, body: bytes) -> Iterator[ssl.SSLSocket]:
    """Yield a connection that has sent half of an upload."""
    host = server.url.removeprefix("https://")
    trusted = ssl.create_default_context(cafile=server.server_certificate)
    login = base64.b64encode(":".join(server.login).encode()).decode()
    head = [f"PUT {path} HTTP/1.1", f"Host: {host}", f"Authorization: Basic {login}", f"Content-Length: {len(body)}"]
    with (
        socket.create_connection((host, 443), timeout=30) as plain,
        trusted.wrap_socket(plain, server_hostname=host) as connection,
    ):
        connection.sendall("\r\n".join([*head, "", ""]).encode() + body[: len(body) // 2])
        yield connection


def finished(upload: ssl.SSLSocket, body: bytes) -> tuple[int, str]:
    """Send the second half of the upload, and return the status and body of the response. If the server has refused the
    upload, it may have closed the connection, so an error while sending is ignored."""
    with contextlib.suppress(OSError):
        upload.sendall(body[len(body) // 2 :])
    answer = http.client.HTTPResponse(upload)
    answer.begin()
    return answer.status, answer.read().decode()


@dataclass(frozen=True)
class Look:
    """Bytes of memory of the server processes (shared pages are counted in proportion), and bytes of spooled files."""

    memory: int
    spooled: int


def look(cloud: LocalCloud, server: Server) -> Look:
    line = "for p in $(pgrep -f 'mlflow_host[.]server'); do grep ^Pss: /proc/$p/smaps_rollup; done; "
    line += "{ du -sb /srv/mlflow/tmp || true; } 2>/dev/null"  # du fails if a file disappears while it runs
    found = [line.split() for line in shell(cloud, server, line).splitlines()]
    return Look(sum(int(words[1]) * 1024 for words in found if words[0] == "Pss:"), int(found[-1][0]))


@contextmanager
def watched(cloud: LocalCloud, server: Server) -> Iterator[list[Look]]:
    """Record memory and spooled files during the `with` block. The yielded list is complete after the block."""
    seen: list[Look] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.3):
            seen.append(look(cloud, server))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield seen
    finally:
        done.set()
        watching.join()
