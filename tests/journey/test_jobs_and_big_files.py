"""With jobExecution, jobs run; with each value of artifactTransfer, a file of 1 GiB is uploaded and downloaded."""

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
from tests.support.servers import Server, client_of, launch_server, on_machine, own_stack

pytestmark = [pytest.mark.machine, pytest.mark.slow]

GIBIBYTE = 1024 * MEBIBYTE
MEMORY_BYTES = 64 * MEBIBYTE
"""Maximum memory that a transfer may add to the server processes."""


@pytest.fixture(scope="module", params=["direct", "proxied"])
def own(request: pytest.FixtureRequest, cloud: LocalCloud, image: Mapping[str, Any]) -> Iterator[Server]:
    """A machine that runs jobs, in its own stack."""
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


def test_file_of_a_gibibyte_is_uploaded_and_downloaded(cloud: LocalCloud, own: Server, tmp_path: Path) -> None:
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

    # The endpoint with which the user interface shows a file spools it to the server's disk first.
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


def test_uploads_that_cannot_be_streamed_are_refused_when_they_would_not_fit_and_others_arrive(
    cloud: LocalCloud, own: Server
) -> None:
    """A process streams six uploads at once, and spools further ones to the disk if there is space."""
    with client_of(own) as client:
        run = client.create_run(client.create_experiment("many at once")).info
    folder = f"/api/2.0/mlflow-artifacts/artifacts/{run.experiment_id}/{run.run_id}/artifacts"
    body = os.urandom(2 * MEBIBYTE)
    # 6 % is free, so the server accepts writes, but no temporary file.
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
    """A connection on which half of an upload has been sent."""
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
    """Status and text of the response after the other half; a refused upload need not be read."""
    with contextlib.suppress(OSError):
        upload.sendall(body[len(body) // 2 :])
    answer = http.client.HTTPResponse(upload)
    answer.begin()
    return answer.status, answer.read().decode()


@dataclass(frozen=True)
class Look:
    """Bytes of the server processes' memory (shared pages divided among them), and of spooled files."""

    memory: int
    spooled: int


def look(cloud: LocalCloud, server: Server) -> Look:
    line = "for p in $(pgrep -f 'mlflow_host[.]server'); do grep ^Pss: /proc/$p/smaps_rollup; done; "
    line += "{ du -sb /srv/mlflow/tmp || true; } 2>/dev/null"  # a file may have been deleted since
    found = [line.split() for line in shell(cloud, server, line).splitlines()]
    return Look(sum(int(words[1]) * 1024 for words in found if words[0] == "Pss:"), int(found[-1][0]))


@contextmanager
def watched(cloud: LocalCloud, server: Server) -> Iterator[list[Look]]:
    """Measures during the block; the list is complete at its end."""
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
