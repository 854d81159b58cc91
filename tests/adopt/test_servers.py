"""To adopt a tracking server, adopt.py needs only the server's URL, and a login if the server has one. The script
copies every value that the server's API returns."""

from __future__ import annotations

import socket
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlflow_host.postgres.cluster import connection, rows
from scripts.adopting.target import basic
from scripts.drilling.worker_client import WorkerClient
from tests.adopt.stack import Stack
from tests.adopt.test_adopt import NEWEST, Reported, counted, fill, reported, without_places  # noqa: F401
from tests.adopt.test_releases import OLD, client_of
from tests.support.services import free_port, process, wait_until

pytestmark = pytest.mark.service


@contextmanager
def tracking_server(python: Path, folder: Path, uri: str, login: str = "", place: str = "") -> Iterator[str]:
    """Run a server with the MLflow release of the interpreter `python`, and yield the server's URL. The clients write
    artifacts to `place`."""
    port = free_port()
    log = folder / "old-server.log"
    command = [
        str(python),
        "-W",
        "ignore",
        str(Path(__file__).with_name("old_server.py")),
        uri,
        place or str(folder / "served"),
        str(port),
        login,
    ]

    def answers() -> bool:
        with socket.socket() as attempt:
            return attempt.connect_ex(("127.0.0.1", port)) == 0

    with process(command, log, cwd=folder) as running:
        wait_until(answers, running, log)
        yield f"http://127.0.0.1:{port}"


COMPARED = {
    "experiments": "experiment_id, name, lifecycle_stage, creation_time, last_update_time",
    "experiment_tags": "experiment_id, key, value",
    "runs": "run_uuid, name, user_id, status, start_time, end_time, lifecycle_stage, experiment_id",
    "params": "run_uuid, key, value",
    "tags": "run_uuid, key, value",
    "metrics": "run_uuid, key, value, timestamp, step, is_nan",
    "latest_metrics": "run_uuid, key, value, timestamp, step, is_nan",
    "datasets": "experiment_id, name, digest, dataset_source_type, dataset_source, dataset_schema, dataset_profile",
    "input_tags": "name, value",
    "registered_models": "name, creation_time, last_updated_time, description",
    "registered_model_tags": "name, key, value",
    "registered_model_aliases": "name, alias, version",
    "model_versions": "name, version, creation_time, last_updated_time, description, user_id, current_stage, run_id, "
    "status, status_message, run_link",
    "model_version_tags": "name, version, key, value",
    "logged_models": "model_id, experiment_id, name, creation_timestamp_ms, last_updated_timestamp_ms, status, "
    "lifecycle_stage, model_type, source_run_id, status_message",
    "logged_model_metrics": "model_id, metric_name, metric_timestamp_ms, metric_step, metric_value, run_id",
    "logged_model_params": "model_id, param_key, param_value",
    "logged_model_tags": "model_id, tag_key, tag_value",
    "trace_info": "request_id, experiment_id, timestamp_ms, execution_time_ms, status, request_preview, "
    "response_preview",
    "trace_request_metadata": "request_id, key, value",
    "assessments": "assessment_id, trace_id, name, assessment_type, value, error, created_timestamp, source_type, "
    "source_id, rationale, valid, overrides, span_id, assessment_metadata",
    "spans": "trace_id, span_id, parent_span_id, name, type, status, start_time_unix_nano, end_time_unix_nano, content",
    "scorers": "experiment_id, scorer_name",
    "scorer_versions": "scorer_version, serialized_scorer, creation_time",
    "evaluation_datasets": "dataset_id, name, schema, profile, digest, created_time, last_update_time, created_by",
    "evaluation_dataset_tags": "dataset_id, key, value",
    "evaluation_dataset_records": "dataset_record_id, dataset_id, inputs, outputs, expectations, tags, source_type, "
    "created_time, input_hash",
    "entity_associations": "source_type, source_id, destination_type, destination_id",
}
"""The columns that must be equal at the source and in the target. Experiments keep their IDs, because the target is
empty."""

LIVE = "SELECT name, version FROM model_versions WHERE current_stage <> 'Deleted_Internal'"
NOT_DELETED = dict.fromkeys(("model_versions", "model_version_tags"), f" WHERE (name, version) IN ({LIVE})")
"""A condition that excludes deleted model versions, because no API returns them."""


def compare_tables(file: Path, stack: Stack) -> dict[str, int]:
    """Assert that the target has every row of the source's file, with every value. Returns row counts by table."""
    counts = {}
    with closing(sqlite3.connect(file)) as source, connection(stack.cluster, stack.cluster.database) as here:
        known = {name for (name,) in source.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for table, columns in COMPARED.items():
            if table not in known:
                continue
            held = {row[1] for row in source.execute(f"PRAGMA table_info({table})")}
            listed = ", ".join(column for column in columns.split(", ") if column in held)
            where = " WHERE key <> 'mlflow-ami.adopted'" if table == "experiment_tags" else ""
            was = sorted(map(plain, source.execute(f"SELECT {listed} FROM {table}{NOT_DELETED.get(table, '')}")))
            now = sorted(map(plain, rows(here, f"SELECT {listed} FROM {table}{where}")))
            assert now == was, table
            counts[table] = len(was)
    return counts


def plain(row: Any) -> tuple[str, ...]:
    """Return the row's values as text, in the same form for every source. SQLite stores booleans as numbers. The API
    returns "" for NULL. The newest MLflow adds an empty list of links to spans of older releases."""
    texts = ("" if value is None else str(int(value) if isinstance(value, bool) else value) for value in row)
    return tuple(text.replace(', "links": []', "") for text in texts)


def reports_of(stack: Stack) -> list[tuple[str, str]]:
    return [(stack.target.buckets["backups"], key) for key in stack.keys("backups") if key.startswith("adoptions/")]


@pytest.mark.slow
@pytest.mark.parametrize("release", [*OLD, "newest"])
def test_server_of_each_release_is_adopted_by_its_url(
    stack: Stack,
    reported: Reported,  # noqa: F811
    tmp_path: Path,
    release: str,
) -> None:
    python = NEWEST if release == "newest" else client_of(release)
    with tracking_server(python, tmp_path, f"sqlite:///{tmp_path}/old.db") as url:
        made = fill(python, url, "")
        status, report = reported(url)
        assert (report["lost"], status) == (0, 0)
        print(compare_tables(tmp_path / "old.db", stack), file=sys.stderr)
        assert counted(report)["metric points"] == 128
        assert f"1/{made['run']}/artifacts/model/data.bin" in stack.keys("artifacts")
        again, report = reported(url)
        assert (again, report["lost"]) == (0, 0)
        compare_tables(tmp_path / "old.db", stack)  # the second adoption added no row


@pytest.mark.slow
@pytest.mark.parametrize("release", ["1.30.0", "2.22.0"])
def test_server_with_a_folder_mlruns_is_adopted_by_its_url(
    stack: Stack,
    reported: Reported,  # noqa: F811
    tmp_path: Path,
    release: str,
) -> None:
    """`mlflow ui` without options starts a server with a folder mlruns. In MLflow 1.30, a folder mlruns has no model
    registry."""
    python = client_of(release)
    with tracking_server(python, tmp_path, f"file://{tmp_path}/mlruns") as url:
        made = fill(python, url, "")
        status, report = reported(url)
    assert (report["lost"], status) == (0, 0)
    assert counted(report)["metric points"] == 128
    assert counted(report)["model versions"] == (0 if release == "1.30.0" else 12)
    number = report["experiments"][made["experiment"]]
    assert f"{number}/{made['run']}/artifacts/model/data.bin" in stack.keys("artifacts")


@pytest.mark.slow
def test_server_with_everything_and_a_login_is_adopted(
    stack: Stack,
    reported: Reported,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    login = basic("ada", "the secret")["Authorization"]
    variables = {"MLFLOW_TRACKING_USERNAME": "ada", "MLFLOW_TRACKING_PASSWORD": "the secret"}
    with tracking_server(NEWEST, tmp_path, f"sqlite:///{tmp_path}/old.db", login) as url:
        worker = WorkerClient(NEWEST, "", variables)
        try:
            worker.write(url, "one")
            worker.write(url, "two")
            status, told = reported(url, "--without-secrets")
            assert status == 2 and "401" in told["said"]
            for name, text in variables.items():
                monkeypatch.setenv(name, text)
            status, report = reported(url, "--without-secrets")
            assert (report["lost"], status) == (0, 0)
            was = worker.read(url)
        finally:
            worker.end()
        counts = compare_tables(tmp_path / "old.db", stack)
    assert counts["spans"] and counts["assessments"] and counts["evaluation_dataset_records"] and counts["scorers"]
    reader = WorkerClient(NEWEST, "")
    try:
        now = reader.read(stack.target.api.url)
    finally:
        reader.end()
    for key, trace in was["traces"].items():
        assert without_places(now["traces"][key]) == without_places(trace), key
    written = [file.read_bytes() for file in stack.folder.rglob("*") if file.is_file()]
    written += [stack.target.s3.get_object(Bucket=bucket, Key=key)["Body"].read() for bucket, key in reports_of(stack)]
    assert written and not any(b"the secret" in content for content in written)


@pytest.mark.slow
@pytest.mark.parametrize("release", ["2.22.0", "newest"])
def test_artifacts_that_the_server_does_not_serve_come_through_its_pages(
    stack: Stack,
    reported: Reported,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    release: str,
) -> None:
    python, place = NEWEST if release == "newest" else client_of(release), tmp_path / "on-the-server"
    uri = f"sqlite:///{tmp_path}/old.db"
    with tracking_server(python, tmp_path, uri, place=f"file://{place}") as url:
        made = fill(python, url, "")
        monkeypatch.setattr(Path, "rglob", lambda *_: pytest.fail("read a folder of the server's machine"))
        status, report = reported(url)
    assert (report["lost"], status) == (0, 0)
    assert {f"1/{made['run']}/artifacts/{name}" for name in ("notes.txt", "model/MLmodel", "model/data.bin")} <= (
        stack.keys("artifacts")
    )
    if "model" in made:
        assert f"1/models/{made['model']}/artifacts/MLmodel" in stack.keys("models")
    else:
        assert sum(key.endswith("/traces.json") for key in stack.keys("artifacts")) == 2


def test_url_with_a_password_is_refused(stack: Stack, reported: Reported) -> None:  # noqa: F811
    status, told = reported("http://ada:secret@127.0.0.1:9")
    assert status == 2 and "MLFLOW_TRACKING_PASSWORD" in told["said"] and "secret" not in told["said"]
