"""On every route, the server opens artifact locations only in the stack's two buckets."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from mlflow_host.server.artifact_location_checks import AllowedLocations
from tests.support.services import ObjectStore, create_schema, object_store, on_loopback, server_processes

pytestmark = pytest.mark.service

DESTINATION = "mlflow-host://artifacts/models"
ALLOWED = AllowedLocations.below(DESTINATION)
SECRET = b"a dump of everybody's runs"

OPEN = [
    "mlflow-artifacts:/1/abc/artifacts",
    "mlflow-artifacts:/",
    "runs:/abc/model",
    "models:/m-0123",
    "models:/name/1",
    "s3://artifacts/team",
    "s3://models",
    "S3://models/x",
    "mlflow-host://artifacts/models/1/traces/tr-1/artifacts",
]
CLOSED = [
    "s3://backups/dumps",
    "s3://artifacts-of-others/x",
    "s3://artifacts@backups/x",
    "s3:backups/x",
    "s3://",
    "S3://backups/dumps",
    "mlflow-host://backups/models",
    "mlflow-host://artifacts/backups",
    "mlflow-host://artifacts/modelsbackups",
    "mlflow-host-proxied://backups/models",
    "mlflow-artifacts://elsewhere.example.com/x",
    "models://profile@elsewhere/name/1",
    "runs://profile@elsewhere/abc",
    "file:///run/mlflow/x",
    "file:/dev/shm/x",
    "FILE:///tmp/x",
    "/tmp/x",
    "../x",
    "C:\\x",
    "http://169.254.169.254/latest/meta-data",
    "https://elsewhere.example.com/x",
    "ftp://elsewhere.example.com/x",
    "gs://bucket/x",
    "dbfs:/x",
    "nonsense://x",
    "s3://[x",
]


@pytest.mark.parametrize("location", OPEN)
def test_locations_of_the_stack_are_open(location: str) -> None:
    assert ALLOWED.problem(location) is None


@pytest.mark.parametrize("location", CLOSED)
def test_other_location_is_refused_with_value_and_allowed_locations(location: str) -> None:
    problem = ALLOWED.problem(location)
    assert problem and repr(location) in problem


CLOSED_ROWS = ["s3://backups/dumps", "file:///etc", "mlflow-host://backups/models/dumps", "/etc"]
"""Forbidden locations that an earlier image may have stored in rows."""


@dataclass(frozen=True)
class Running:
    url: str
    database: Path
    store: ObjectStore

    def post(self, route: str, **body: Any) -> requests.Response:
        return requests.post(f"{self.url}/api/2.0/mlflow/{route}", json=body, timeout=60)

    def get(self, route: str, **query: str) -> requests.Response:
        return requests.get(f"{self.url}/{route}", params=query, timeout=60)

    def change(self, statement: str, *values: str) -> None:
        """Write a location to MLflow's tables, as an earlier image or a restore may have done."""
        with sqlite3.connect(self.database) as connection:
            assert connection.execute(statement, values).rowcount == 1, statement


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("allowed")
    (folder / "tmp").mkdir()
    create_schema(f"sqlite:///{folder}/mlflow.db")
    with object_store(folder / "store") as store:
        for bucket in ("artifacts", "models", "backups"):
            store.client().create_bucket(Bucket=bucket)
        store.client().put_object(Bucket="backups", Key="dumps/nightly.dump", Body=SECRET)
        variables = {
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db",
            "MLFLOW_ARTIFACTS_DESTINATION": DESTINATION,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ALLOWED_HOSTS": "localhost,127.0.0.1:*",
            "TMPDIR": str(folder / "tmp"),
            **store.environment,
        }
        with server_processes(folder, variables) as (process,), on_loopback(process.socket) as url:
            yield Running(url, folder / "mlflow.db", store)


@pytest.mark.parametrize("location", CLOSED)
def test_a_request_that_would_store_a_closed_location_is_refused(running: Running, location: str) -> None:
    running.post("registered-models/create", name="m")
    for refused in (
        running.post("experiments/create", name=location, artifact_location=location),
        running.post("model-versions/create", name="m", source=location),
    ):
        assert refused.status_code == 400
        assert refused.json()["error_code"] == "INVALID_PARAMETER_VALUE"
        assert repr(location) in refused.json()["message"]
    assert running.get("api/2.0/mlflow/experiments/get-by-name", experiment_name=location).status_code == 404


@pytest.mark.parametrize("location", CLOSED_ROWS)
def test_a_closed_location_is_refused_however_it_is_spelled(running: Running, location: str) -> None:
    """MLflow also accepts protobuf's camel-case names, and JSON inside a JSON string."""
    running.post("registered-models/create", name="m")
    for route, body in (
        ("experiments/create", {"name": f"camel {location}", "artifactLocation": location}),
        ("experiments/create", json.dumps({"name": f"text {location}", "artifact_location": location})),
        ("experiments/create", json.dumps({"name": f"both {location}", "artifactLocation": location})),
        ("model-versions/create", json.dumps({"name": "m", "source": location})),
    ):
        refused = requests.post(f"{running.url}/api/2.0/mlflow/{route}", json=body, timeout=60)
        assert refused.status_code == 400 and repr(location) in refused.json()["message"], refused.text


def test_a_request_that_stores_an_open_location_is_answered_by_mlflow(running: Running) -> None:
    own = running.post("experiments/create", name="own bucket", artifact_location="s3://artifacts/t")
    assert own.status_code == 200, own.text
    running.post("registered-models/create", name="of a run")
    assert running.post("model-versions/create", name="of a run", source="s3://models/x").status_code == 200
    prompt = {"name": "p", "tags": [{"key": "mlflow.prompt.is_prompt", "value": "true"}]}
    assert running.post("registered-models/create", **prompt).status_code == 200
    tags = [*prompt["tags"], {"key": "mlflow.prompt.text", "value": "hello"}]
    made = running.post("model-versions/create", name="p", source="dummy-source", tags=tags)
    assert made.status_code == 200, made.text


@pytest.mark.parametrize("location", CLOSED_ROWS)
def test_stored_forbidden_location_is_opened_on_no_route(running: Running, location: str) -> None:
    """The test reads, lists and writes artifacts of runs, model versions, logged models and traces."""
    name = f"of {CLOSED_ROWS.index(location)}"
    experiment = running.post("experiments/create", name=name).json()["experiment_id"]
    run = running.post("runs/create", experiment_id=experiment).json()["run"]["info"]["run_id"]
    running.post("registered-models/create", name=name)
    version = running.post("model-versions/create", name=name, source="s3://models/x").json()["model_version"]
    model = running.post("logged-models", experiment_id=experiment, name="m").json()["model"]["info"]["model_id"]
    trace = "tr-" + experiment.rjust(32, "0")
    info = {
        "trace_id": trace,
        "trace_location": {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": experiment}},
        "request_time": "2026-11-29T00:00:00Z",
        "state": "OK",
    }
    started = requests.post(f"{running.url}/api/3.0/mlflow/traces", json={"trace": {"trace_info": info}}, timeout=60)
    assert started.status_code == 200, started.text
    running.change("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", location, run)
    change = "UPDATE model_versions SET source = ?, storage_location = ? WHERE name = ?"
    running.change(change, location, location, name)
    running.change("UPDATE logged_models SET artifact_location = ? WHERE model_id = ?", location, model)
    tag = "UPDATE trace_tags SET value = ? WHERE request_id = ? AND key = 'mlflow.artifactLocation'"
    running.change(tag, location, trace)
    file = "passwd" if "etc" in location else "nightly.dump"
    upload = f"{running.url}/ajax-api/2.0/mlflow/upload-artifact?run_uuid={run}&path=x.txt"
    asked = {
        "get-artifact": running.get("get-artifact", run_uuid=run, path=file),
        "list": running.get("api/2.0/mlflow/artifacts/list", run_id=run),
        "version": running.get("model-versions/get-artifact", name=name, version=version["version"], path=file),
        "model": running.get(f"ajax-api/2.0/mlflow/logged-models/{model}/artifacts/files", artifact_file_path=file),
        "models": running.get(f"api/2.0/mlflow/logged-models/{model}/artifacts/directories"),
        "trace": running.get("ajax-api/2.0/mlflow/get-trace-artifact", request_id=trace, path=file),
        "upload": requests.post(upload, data=b"planted", timeout=60),
    }
    answers = {name: (each.status_code, each.content) for name, each in asked.items()}
    assert all(SECRET not in content and b"root:" not in content for _, content in answers.values())
    assert {name: status for name, (status, _) in answers.items()} == dict.fromkeys(answers, 400), answers
    assert [each["Key"] for each in running.store.client().list_objects(Bucket="backups")["Contents"]] == [
        "dumps/nightly.dump"
    ]
