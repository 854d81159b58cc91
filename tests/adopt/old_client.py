"""Fill a server or a database with the client of one MLflow release. The script runs in a Python environment of this
MLflow release.

    python old_client.py URI PLACE

URI is the address of a database, a server or a FileStore. Experiments store their artifacts below PLACE. If PLACE is
"", the server chooses the artifact location. The script skips the kinds of objects that the MLflow release does not
have. The script prints JSON: {"run": ID of a run with artifacts, …}."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(
    MLFLOW_DISABLE_TELEMETRY="true",
    MLFLOW_ENABLE_ASYNC_TRACE_LOGGING="false",
    MLFLOW_ALLOW_FILE_STORE="true",  # without this variable, MLflow 3.13 and newer refuse a FileStore
)

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient


def main() -> None:
    uri, place = sys.argv[1:]
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    client: Any = MlflowClient(uri, uri)
    made = runs(client, place)
    if has_registry(client):
        registry(client, made["run"])
    if hasattr(client, "log_inputs"):
        datasets(client, made["run"])
    if hasattr(client, "create_logged_model"):
        made["model"] = logged_model(client, made["experiment"], made["run"])
    if hasattr(client, "start_trace"):
        traces(client, made["experiment"])
    print(json.dumps(made))


def runs(client: Any, place: str) -> dict[str, str]:
    location = f"{place}/one" if place else None
    experiment = client.create_experiment("churn ünïcode", location)
    client.set_experiment_tag(experiment, "team", "a\tb\\n\nc 'quoted'")
    gone = client.create_experiment("deleted", f"{place}/gone" if place else None)
    client.log_metric(client.create_run(gone).info.run_id, "m", 1.5)
    client.delete_experiment(gone)
    in_default = client.create_run("0").info.run_id
    client.log_param(in_default, "p", "of the default experiment")
    parent = client.create_run(experiment, start_time=1_600_000_000_123, tags={"mlflow.user": "ada"}).info.run_id
    client.set_tag(parent, "mlflow.runName", "parent")  # create_run of MLflow 1.30 fails with this tag
    history = [Metric("loss", 1 / (step + 1), 1_600_000_000_000 + step, step) for step in range(120)]
    odd = [
        Metric("odd", value, 1_600_000_000_000, i) for i, value in enumerate((math.inf, -math.inf, 1e-300, math.nan))
    ]
    client.log_batch(parent, history + odd, [Param("lr", "1e-3"), Param("long", "x" * 240)], [RunTag("note", "a\\b")])
    with tempfile.TemporaryDirectory() as folder:
        for name, text in {
            "notes.txt": "written long ago",
            "model/MLmodel": "flavors: {}",
            "model/data.bin": "y" * 5000,
        }.items():
            path = Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        client.log_artifacts(parent, folder)
    for number in range(3):
        child = client.create_run(experiment, tags={"mlflow.parentRunId": parent}).info.run_id
        client.log_metric(child, "accuracy", 0.5 + number / 10, timestamp=1_600_000_100_000, step=number)
        client.set_terminated(child, "FAILED" if number == 1 else "FINISHED")
        if number == 2:
            client.delete_run(child)
    client.set_terminated(parent, end_time=1_600_000_500_000)
    return {"experiment": experiment, "run": parent}


def has_registry(client: Any) -> bool:
    """Return whether the store has a model registry. A FileStore of MLflow 1.30 has no model registry."""
    try:
        client.search_registered_models()
    except mlflow.exceptions.MlflowException:
        return False
    return True


def registry(client: Any, run: str) -> None:
    client.create_registered_model("fraud", {"team": "red"}, "described")
    source = f"{client.get_run(run).info.artifact_uri}/model"
    for _ in range(2):
        client.create_model_version("fraud", source, run, tags={"v": "1"}, description="of a version")
    if hasattr(client, "set_registered_model_alias"):
        client.set_registered_model_alias("fraud", "champion", "2")
    else:
        client.transition_model_version_stage("fraud", "1", "Production")


def datasets(client: Any, run: str) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset("iris", "digest-1", "code", json.dumps({"tags": {}}), '{"schema": 1}', '{"rows": 3}')
    client.log_inputs(run, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def logged_model(client: Any, experiment: str, run: str) -> str:
    model = client.create_logged_model(
        experiment, name="forest", source_run_id=run, params={"depth": "3"}, tags={"t": "1"}
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "MLmodel").write_text("flavors: {}")
        client.log_model_artifacts(model.model_id, folder)
    client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def traces(client: Any, experiment: str) -> None:
    for number in range(2):
        span = client.start_trace(f"trace {number}", inputs={"q": number}, tags={"t": "1"}, experiment_id=experiment)
        trace = getattr(span, "trace_id", None) or span.request_id
        client.end_trace(trace, outputs={"a": number})


if __name__ == "__main__":
    main()
