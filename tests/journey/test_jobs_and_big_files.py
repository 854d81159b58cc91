"""With jobExecution a job is done; with artifactTransfer either way a file of 1 GiB goes up and comes down."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
import pytest
from journey.test_artifacts import MEBIBYTE, write_noise
from local_cloud import LocalCloud
from servers import Server, client_of, launch_server, on_machine, own_stack

pytestmark = [pytest.mark.machine, pytest.mark.slow]

GIBIBYTE = 1024 * MEBIBYTE
MEMORY_BYTES = 64 * MEBIBYTE
"""What a transfer may add to the server processes."""


@pytest.fixture(scope="module", params=["direct", "proxied"])
def own(request: pytest.FixtureRequest, cloud: LocalCloud, image: Mapping[str, Any]) -> Iterator[Server]:
    """A machine that runs jobs, of a stack of its own."""
    settings = ["jobExecution=true", f"artifactTransfer={request.param}", "instanceType=t3.medium"]
    with own_stack(cloud, "transfers"):
        yield launch_server("--ami", image["ami_id"], *(word for each in settings for word in ("--set", each)))


def shell(cloud: LocalCloud, server: Server, line: str) -> str:
    return on_machine(cloud, server, "sh", "-c", line)


def test_a_job_is_done(cloud: LocalCloud, own: Server) -> None:
    from mlflow.genai.scorers import ResponseLength

    with client_of(own) as client:
        experiment = mlflow.set_experiment("jobs").experiment_id

        @mlflow.trace
        def answer() -> str:
            return "42"

        answer()
        mlflow.flush_trace_async_logging()  # type: ignore[no-untyped-call]
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


def test_a_file_of_a_gibibyte_goes_up_and_comes_down(cloud: LocalCloud, own: Server, tmp_path: Path) -> None:
    sent = write_noise(tmp_path / "weights.bin", 1024)
    before = memory(cloud, own)
    with client_of(own) as client:
        run = client.create_run(client.create_experiment("a gibibyte")).info.run_id
        client.log_artifact(run, str(tmp_path / "weights.bin"), "checkpoint")
        (tmp_path / "weights.bin").unlink()
        received = Path(client.download_artifacts(run, "checkpoint/weights.bin", dst_path=str(tmp_path)))
    with received.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == sent
    received.unlink()
    assert memory(cloud, own) - before < MEMORY_BYTES
    assert int(shell(cloud, own, "du -sb /srv/mlflow/tmp | cut -f1")) < MEBIBYTE, "nothing is left behind"

    # What the user interface shows a file by is put on the server's disk first.
    asked = f"/get-artifact?path=checkpoint/weights.bin&run_uuid={run}"
    free = int(shell(cloud, own, "df --output=avail -B1 /srv/mlflow | tail -1"))
    shell(cloud, own, f"fallocate -l {free - 2 * GIBIBYTE - 512 * MEBIBYTE} /srv/mlflow/ballast")
    try:
        refused = own.ask(asked, auth=own.login, timeout=120)
        assert refused.status_code == 507
        assert "1,024 MiB do not fit into the server's temporary space" in refused.json()["message"]
    finally:
        shell(cloud, own, "rm /srv/mlflow/ballast")
    with own.ask(asked, auth=own.login, timeout=300, stream=True) as answer:
        digest = hashlib.sha256()
        for piece in answer.iter_content(MEBIBYTE):
            digest.update(piece)
    assert digest.hexdigest() == sent


def memory(cloud: LocalCloud, server: Server) -> int:
    """Of the server processes, in bytes, with pages they share counted in proportion."""
    line = "for p in $(pgrep -f 'mlflow_host[.]server'); do grep ^Pss: /proc/$p/smaps_rollup; done"
    return sum(int(found.split()[1]) * 1024 for found in shell(cloud, server, line).splitlines())
