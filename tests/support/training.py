"""Train with MLflow's client until the file STOP exists. The Python of any MLflow release can run this script.

    python training.py STOP PREFIX

Each round creates an experiment, a run, a registered model and, if the client supports it, a logged model. In each
round, the script logs data to the new run and requires that `search_runs` returns the run. After each round, the script
prints one line of JSON with the data that the server acknowledged. An exception of the client ends the script.
"""

import json
import sys
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag


def rounds(stop: Path, prefix: str) -> None:
    client, number = MlflowClient(), 0
    while not stop.exists():
        name = f"{prefix}-{number}"
        experiment = client.create_experiment(name)
        run = client.create_run(experiment).info.run_id
        for step in range(5):
            client.log_metric(run, "loss", 1 / (step + 1), step=step, timestamp=1000 + step)
        batch = [Metric("accuracy", step / 10, 1000 + step, step) for step in range(10)]
        client.log_batch(run, metrics=batch, params=[Param("depth", "3")], tags=[RunTag("round", str(number))])
        client.log_text(run, name, "notes/name.txt")
        client.create_registered_model(name)
        client.create_model_version(name, f"runs:/{run}/notes", run)
        logged = None
        if hasattr(client, "create_logged_model"):
            logged = client.create_logged_model(experiment, name="model").model_id
        found = [each.info.run_id for each in client.search_runs([experiment])]
        assert found == [run], f"search_runs found {found}, not {run}"
        client.set_terminated(run)
        print(json.dumps({"name": name, "experiment": experiment, "run": run, "logged_model": logged}), flush=True)
        number += 1


if __name__ == "__main__":
    rounds(Path(sys.argv[1]), sys.argv[2])
