"""Step `smoke`: write data to the server with MLflow's own client, read the data back, and delete the data."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts import connect
from scripts.delivering import github
from scripts.delivering.commands import StepFailed
from scripts.rehearsal import boot_wait
from scripts.rehearsal.status_document import client_environment

EXPERIMENT = "delivery-smoke-test"
STEPS = 100


def smoke(arguments: argparse.Namespace) -> None:
    """Wait until the server answers, and test the server. The arguments select the server, as in connect.py. Raises
    StepFailed."""
    found = wait(arguments, time.monotonic() + arguments.wait)
    os.environ.update(client_environment(found))
    seconds = exercise()
    github.summary(
        f"MLflow at {found['url']} stored and returned a run, its metrics and an artifact: {seconds:.1f} s\n"
    )


def wait(arguments: argparse.Namespace, until: float) -> dict[str, Any]:
    """Wait until the server answers. Returns the values for `client_environment`. Raises StepFailed."""
    while True:
        try:
            found = connect.way_in(connect.choose(arguments))
            file = found["server_certificate"]
            certificate = Path(file).read_text(encoding="utf-8") if file else ""
            reply = boot_wait.ask(found["url"], found["username"], found["password"], certificate)
            if reply.status == 200:
                return found
            problem = f"{found['url']} " + (
                f"answers {reply.status}" if reply.status else "does not answer: is this address in allowedCidrs?"
            )
        except connect.NotConnected as error:
            problem = str(error)
        if time.monotonic() >= until:
            raise StepFailed(problem)
        time.sleep(2)


def exercise() -> float:
    """Write data with MLflow's client, read the data back, and delete it. Returns the duration in seconds. Raises
    StepFailed.

    The variable MLFLOW_TRACKING_URI names the server."""
    import mlflow
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException

    begun, client = time.monotonic(), mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    try:
        known = client.get_experiment_by_name(EXPERIMENT)
        if known and known.lifecycle_stage == "deleted":
            client.restore_experiment(known.experiment_id)
        run = client.create_run(known.experiment_id if known else client.create_experiment(EXPERIMENT)).info.run_id
        try:
            wanted = [Metric("loss", 1 / (step + 1), 1_700_000_000_000 + step, step) for step in range(STEPS)]
            client.log_batch(run, metrics=wanted, params=[Param("alpha", "0.5")])
            client.log_text(run, "written by delivery.py\n", "smoke/note.txt")
            read = client.get_run(run)
            history = [(each.step, each.value) for each in client.get_metric_history(run, "loss")]
            with tempfile.TemporaryDirectory() as folder:
                note = Path(client.download_artifacts(run, "smoke/note.txt", folder)).read_text(encoding="utf-8")
            require("params", read.data.params, {"alpha": "0.5"})
            require("metric history", sorted(history), [(each.step, each.value) for each in wanted])
            require("artifact", note, "written by delivery.py\n")
        finally:
            client.delete_run(run)
    except MlflowException as error:
        raise StepFailed(f"MLflow refused the smoke test: {' '.join(str(error).split())}") from None
    return time.monotonic() - begun


def require(what: str, read: object, written: object) -> None:
    if read != written:
        raise StepFailed(f"the {what} read back is {str(read)[:300]}, but {str(written)[:300]} was written")
