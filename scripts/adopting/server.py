"""Read another tracking server through its REST API into a SQLite file with the installed MLflow's schema.

IDs, dates, users and locations are copied from the API's responses. The API returns no IDs for datasets and inputs. The
ID of a dataset or input is computed from its content, so that a second run computes the same ID. The API provides no
snapshot, so if data changes during a run of adopt.py, the next run copies the change.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import itertools
import json
import math
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow_host.contract.adoption import AdoptionError
from scripts.adopting.target import Api
from scripts.adopting.verdict import PROMPTS, number, pages

OLDEST = (1, 28)
"""The oldest supported MLflow release, which is the first release with the search endpoints."""
REQUESTS = 8
"""Maximum number of concurrent requests."""
LARGEST = 1.7976931348623157e308
"""The largest floating-point number. MLflow stores an infinite value as this number."""
SPANS_IN_DATABASE = ("mlflow.trace.spansLocation", "TRACKING_STORE")
TRACES = "/api/3.0/mlflow/traces/search"
PLACE_TAG = "mlflow.artifactLocation"
NAME_TAG = "mlflow.traceName"
MODEL_STATUS = {"LOGGED_MODEL_PENDING": 1, "LOGGED_MODEL_READY": 2, "LOGGED_MODEL_UPLOAD_FAILED": 3}


@dataclass
class Reading:
    """The state that the functions below share. `in_files` has the IDs of the traces whose spans are in a file."""

    api: Api
    database: sqlite3.Connection
    say: Callable[[str], None]
    release: tuple[int, ...]
    experiments: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    in_files: set[str] = field(default_factory=set)

    def insert(self, table: str, rows: list[dict[str, Any]]) -> None:
        """Insert `rows`, which all have the same columns. A row that already exists stays unchanged."""
        if rows:
            columns = ", ".join(f'"{column}"' for column in rows[0])
            holes = ", ".join("?" * len(rows[0]))
            statement = f'INSERT OR IGNORE INTO "{table}" ({columns}) VALUES ({holes})'
            self.database.executemany(statement, [tuple(row.values()) for row in rows])


def read(api: Api, path: Path, say: Callable[[str], None]) -> frozenset[str]:
    """Write the SQLite file `path`. Returns the IDs of the traces whose spans are in a file. Raises AdoptionError."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store: Any = SqlAlchemyStore(  # type: ignore[no-untyped-call]
        f"sqlite:///{path}", "mlflow-artifacts:/"
    )
    with contextlib.closing(sqlite3.connect(path)) as database, ThreadPoolExecutor(REQUESTS) as pool:
        database.execute("DELETE FROM experiments")
        reading = Reading(api, database, say, release_of(api))
        say(f"MLflow {'.'.join(map(str, reading.release))}")
        read_experiments(reading)
        read_runs(reading, pool)
        read_registry(reading)
        if reading.release >= (3,):
            read_logged_models(reading)
        if reading.release >= (3, 4):
            read_scorers(reading)
            read_evaluation_datasets(reading)
        database.commit()
        if reading.release >= (2, 14):
            read_traces(reading, store, pool)
        if reading.release >= (3, 2):
            read_links(reading, pool)
        for experiment in reading.deleted:
            database.execute("UPDATE experiments SET lifecycle_stage = 'deleted' WHERE experiment_id = ?", [experiment])
        database.commit()
        return frozenset(reading.in_files)


def release_of(api: Api) -> tuple[int, ...]:
    """The server's MLflow release. Raises AdoptionError if the server is not MLflow or is older than `OLDEST`."""
    try:
        with api.download("/version") as answer:
            said = answer.read(100).decode(errors="replace")
    except AdoptionError as error:
        if "404" not in str(error):
            raise
        return OLDEST  # MLflow 1 has no route /version
    except (OSError, http.client.HTTPException) as error:
        raise AdoptionError(f"{api.url} cannot be reached: {str(error) or type(error).__name__}") from None
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", said)
    release = tuple(int(part) for part in found.groups()) if found else (0,)
    if release < OLDEST:
        raise AdoptionError(
            f"{api.url} is not an MLflow {OLDEST[0]}.{OLDEST[1]} or newer: /version answered {said[:40]!r}; give "
            "adopt.py its database instead"
        )
    return release


# Experiments and runs


def read_experiments(reading: Reading) -> None:
    api = reading.api
    search = "/api/2.0/mlflow/experiments/search"
    for each in pages(api.post, search, "experiments", max_results=1000, view_type="ALL"):
        experiment = each["experiment_id"]
        reading.experiments.append(experiment)
        if each["lifecycle_stage"] == "deleted":
            # The experiment is marked as deleted at the end, because only active experiments accept traces.
            reading.deleted.append(experiment)
        row = {
            "experiment_id": int(experiment),
            "name": each["name"],
            "artifact_location": each.get("artifact_location"),
            "lifecycle_stage": "active",
            "creation_time": number(each.get("creation_time")),
            "last_update_time": number(each.get("last_update_time")),
        }
        reading.insert("experiments", [row])
        tags = [{"key": key, "value": text, "experiment_id": int(experiment)} for key, text in listed(each.get("tags"))]
        reading.insert("experiment_tags", tags)
    reading.say(f"{len(reading.experiments):,} experiments")


def read_runs(reading: Reading, pool: ThreadPoolExecutor) -> None:
    search, count = "/api/2.0/mlflow/runs/search", 0
    for few in batches(reading.experiments, 20):
        found = pages(reading.api.post, search, "runs", experiment_ids=few, run_view_type="ALL", max_results=500)
        for runs in batches(found, 500):
            if reading.release >= (3,):  # in some releases, a search does not return a run's outputs
                runs = list(pool.map(lambda run: whole(reading.api, run), runs))
            histories = pool.map(
                lambda key: history(reading.api, *key),
                [(run["info"]["run_id"], each["key"]) for run in runs for each in run["data"].get("metrics", ())],
            )
            for run in runs:
                insert_run(reading, run)
            for points in histories:
                reading.insert("metrics", points)
            count += len(runs)
            reading.say(f"{count:,} runs")


def whole(api: Api, run: dict[str, Any]) -> dict[str, Any]:
    return dict(api.get("/api/2.0/mlflow/runs/get", run_id=run["info"]["run_id"])["run"])


def history(api: Api, run: str, key: str) -> list[dict[str, Any]]:
    found = pages(
        api.get, "/api/2.0/mlflow/metrics/get-history", "metrics", run_id=run, metric_key=key, max_results=25000
    )
    return [metric_row(run, each) for each in found]


def metric_row(run: str, each: dict[str, Any]) -> dict[str, Any]:
    value = float(each["value"])
    return {
        "key": each["key"],
        "value": 0.0 if math.isnan(value) else stored(value),
        "timestamp": number(each.get("timestamp")) or 0,
        "step": number(each.get("step")) or 0,
        "is_nan": math.isnan(value),
        "run_uuid": run,
    }


def stored(value: float) -> float:
    return math.copysign(LARGEST, value) if math.isinf(value) else value


def insert_run(reading: Reading, run: dict[str, Any]) -> None:
    info, data = run["info"], run.get("data", {})
    name, experiment = info["run_id"], int(info["experiment_id"])
    tags = dict(listed(data.get("tags")))
    row = {
        "run_uuid": name,
        "name": info.get("run_name") or tags.get("mlflow.runName", ""),
        "source_type": "UNKNOWN",
        "source_name": "",
        "entry_point_name": "",
        "user_id": info.get("user_id", ""),
        "status": info["status"],
        "start_time": number(info.get("start_time")),
        "end_time": number(info.get("end_time")) or None,
        "source_version": "",
        "lifecycle_stage": info["lifecycle_stage"],
        "artifact_uri": info.get("artifact_uri"),
        "experiment_id": experiment,
    }
    reading.insert("runs", [row])
    for table, values in (("params", dict(listed(data.get("params")))), ("tags", tags)):
        reading.insert(table, [{"key": key, "value": text, "run_uuid": name} for key, text in values.items()])
    reading.insert("latest_metrics", [metric_row(name, each) for each in data.get("metrics", ())])
    for given in run.get("inputs", {}).get("dataset_inputs", ()):
        dataset = given["dataset"]
        of = dataset_id(experiment, dataset["name"], dataset["digest"])
        described = {
            "dataset_uuid": of,
            "experiment_id": experiment,
            "name": dataset["name"],
            "digest": dataset["digest"],
            "dataset_source_type": dataset.get("source_type", ""),
            "dataset_source": dataset.get("source", ""),
            "dataset_schema": dataset.get("schema"),
            "dataset_profile": dataset.get("profile"),
        }
        reading.insert("datasets", [described])
        link = insert_input(reading, ("DATASET", of), ("RUN", name))
        labels = [{"input_uuid": link, "name": key, "value": text} for key, text in listed(given.get("tags"))]
        reading.insert("input_tags", labels)
    for given in run.get("inputs", {}).get("model_inputs", ()):
        insert_input(reading, ("RUN_INPUT", name), ("MODEL_INPUT", given["model_id"]))
    for given in run.get("outputs", {}).get("model_outputs", ()):
        step = number(given.get("step")) or 0
        insert_input(reading, ("RUN_OUTPUT", name), ("MODEL_OUTPUT", given["model_id"]), step)


def insert_input(reading: Reading, source: tuple[str, str], destination: tuple[str, str], step: int = 0) -> str:
    row = {
        "input_uuid": computed_id(*source, *destination),
        "source_type": source[0],
        "source_id": source[1],
        "destination_type": destination[0],
        "destination_id": destination[1],
        "step": step,
    }
    reading.insert("inputs", [row])
    return str(row["input_uuid"])


def dataset_id(experiment: int, name: str, digest: str) -> str:
    return computed_id("dataset", str(experiment), name, digest)


def computed_id(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


# Registry


def read_registry(reading: Reading) -> None:
    api = reading.api
    if not has_registry(api):
        reading.say("the server has no model registry")
        return
    kinds: list[dict[str, Any]] = [{}, {"filter": PROMPTS}]
    for kind in kinds if reading.release >= (2, 21) else kinds[:1]:
        search = "/api/2.0/mlflow/registered-models/search"
        for each in pages(api.get, search, "registered_models", max_results=1000, **kind):
            name = each["name"]
            row = {
                "name": name,
                "creation_time": number(each.get("creation_timestamp")),
                "last_updated_time": number(each.get("last_updated_timestamp")),
                "description": each.get("description"),
            }
            reading.insert("registered_models", [row])
            tags = [{"name": name, "key": key, "value": text} for key, text in listed(each.get("tags"))]
            reading.insert("registered_model_tags", tags)
            aliases = [
                {"name": name, "alias": alias["alias"], "version": int(alias["version"])}
                for alias in each.get("aliases", ())
            ]
            reading.insert("registered_model_aliases", aliases)
        search = "/api/2.0/mlflow/model-versions/search"
        for each in pages(api.get, search, "model_versions", max_results=10000, **kind):
            insert_version(reading, each)
    reading.say(f"{reading.database.execute('SELECT count(*) FROM model_versions').fetchone()[0]:,} model versions")


def has_registry(api: Api) -> bool:
    """Whether the server has a model registry. MLflow 1 has no registry if its data is in a folder mlruns/."""
    try:
        api.get("/api/2.0/mlflow/registered-models/search", max_results=1)
    except AdoptionError as error:
        if "Model registry functionality is unavailable" not in str(error):
            raise
        return False
    return True


def insert_version(reading: Reading, each: dict[str, Any]) -> None:
    name, version, source = each["name"], each["version"], each.get("source")
    storage = source
    if (source or "").startswith("models:/"):  # the source is a model version or a logged model
        query = {"name": name, "version": version}
        answer = reading.api.get("/api/2.0/mlflow/model-versions/get-download-uri", **query)
        storage = answer.get("artifact_uri", source)
    row = {
        "name": name,
        "version": int(version),
        "creation_time": number(each.get("creation_timestamp")),
        "last_updated_time": number(each.get("last_updated_timestamp")),
        "description": each.get("description"),
        "user_id": each.get("user_id"),
        "current_stage": each.get("current_stage", "None"),
        "source": source,
        "storage_location": storage,
        "run_id": each.get("run_id"),
        "run_link": each.get("run_link"),
        "status": each.get("status", "READY"),
        "status_message": each.get("status_message"),
    }
    reading.insert("model_versions", [row])
    tags = [
        {"name": name, "version": int(version), "key": key, "value": text} for key, text in listed(each.get("tags"))
    ]
    reading.insert("model_version_tags", tags)


# Logged models, scorers, evaluation datasets


def read_logged_models(reading: Reading) -> None:
    search = "/api/2.0/mlflow/logged-models/search"
    for few in batches(reading.experiments, 20):
        for each in pages(reading.api.post, search, "models", experiment_ids=few, max_results=50):
            info, data = each["info"], each.get("data", {})
            model, experiment = info["model_id"], int(info["experiment_id"])
            row = {
                "model_id": model,
                "experiment_id": experiment,
                "name": info.get("name", ""),
                "artifact_location": info.get("artifact_uri", ""),
                "creation_timestamp_ms": number(info.get("creation_timestamp_ms")),
                "last_updated_timestamp_ms": number(info.get("last_updated_timestamp_ms")),
                "status": MODEL_STATUS.get(info.get("status", ""), 0),
                "lifecycle_stage": "active",
                "model_type": info.get("model_type"),
                "source_run_id": info.get("source_run_id"),
                "status_message": info.get("status_message"),
            }
            reading.insert("logged_models", [row])
            for table, column, found in (
                ("logged_model_tags", "tag", info.get("tags")),
                ("logged_model_params", "param", data.get("params")),
            ):
                rows = [
                    {"model_id": model, "experiment_id": experiment, f"{column}_key": key, f"{column}_value": text}
                    for key, text in listed(found)
                ]
                reading.insert(table, rows)
            reading.insert(
                "logged_model_metrics", [model_metric(model, experiment, found) for found in data.get("metrics", ())]
            )


def model_metric(model: str, experiment: int, each: dict[str, Any]) -> dict[str, Any]:
    value, name, digest = float(each["value"]), each.get("dataset_name"), each.get("dataset_digest")
    return {
        "model_id": model,
        "metric_name": each["key"],
        "metric_timestamp_ms": number(each.get("timestamp")) or 0,
        "metric_step": number(each.get("step")) or 0,
        "metric_value": value,
        "experiment_id": experiment,
        "run_id": each.get("run_id", ""),
        "dataset_uuid": dataset_id(experiment, name, digest) if name and digest else None,
        "dataset_name": name,
        "dataset_digest": digest,
    }


def read_scorers(reading: Reading) -> None:
    for experiment in reading.experiments:
        if experiment in reading.deleted:
            continue
        scorers = reading.api.get("/api/3.0/mlflow/scorers/list", experiment_id=experiment).get("scorers", ())
        for name in {each["scorer_name"] for each in scorers}:
            query = {"experiment_id": experiment, "name": name}
            for each in reading.api.get("/api/3.0/mlflow/scorers/versions", **query).get("scorers", ()):
                of = each.get("scorer_id") or computed_id("scorer", experiment, name)
                row = {"experiment_id": int(experiment), "scorer_name": name, "scorer_id": of}
                version = {
                    "scorer_id": of,
                    "scorer_version": int(each["scorer_version"]),
                    "serialized_scorer": each["serialized_scorer"],
                    "creation_time": number(each.get("creation_time")),
                }
                reading.insert("scorers", [row])
                reading.insert("scorer_versions", [version])


def read_evaluation_datasets(reading: Reading) -> None:
    api, base = reading.api, "/api/3.0/mlflow/datasets"
    for each in pages(api.post, f"{base}/search", "datasets", max_results=100):
        dataset, columns = each["dataset_id"], ("name", "schema", "profile", "digest", "created_by", "last_updated_by")
        times = {column: number(each.get(column)) for column in ("created_time", "last_update_time")}
        row = {"dataset_id": dataset, **{column: each.get(column) for column in columns}, **times}
        reading.insert("evaluation_datasets", [row])
        tags = json.loads(each.get("tags") or "{}")
        rows = [{"dataset_id": dataset, "key": key, "value": text} for key, text in tags.items()]
        reading.insert("evaluation_dataset_tags", rows)
        links = [
            {
                "association_id": computed_id(dataset, experiment),
                "source_type": "evaluation_dataset",
                "source_id": dataset,
                "destination_type": "experiment",
                "destination_id": experiment,
                "created_time": times["created_time"],
            }
            for experiment in api.get(f"{base}/{dataset}/experiment-ids").get("experiment_ids", ())
        ]
        reading.insert("entity_associations", links)
        token: Any = None
        while True:
            query = {"max_results": 1000, **({"page_token": token} if token else {})}
            answer = api.get(f"{base}/{dataset}/records", **query)
            records = [record_row(found) for found in json.loads(answer.get("records") or "[]")]
            reading.insert("evaluation_dataset_records", records)
            token = answer.get("next_page_token")
            if not token:
                break


def record_row(found: dict[str, Any]) -> dict[str, Any]:
    plain = ("dataset_record_id", "dataset_id", "source_id", "created_by", "last_updated_by")
    outputs, source = found.get("outputs"), found.get("source")
    texts = {
        "inputs": found["inputs"],
        "outputs": None if outputs is None else {"mlflow_wrapped": outputs},
        "expectations": found.get("expectations"),
        "tags": found.get("tags"),
        "source": source,
    }
    return {
        **{column: found.get(column) for column in plain},
        **{column: None if value is None else json.dumps(value) for column, value in texts.items()},
        "source_type": (source or {}).get("source_type"),
        "created_time": found["created_time"],
        "last_update_time": found["last_update_time"],
        "input_hash": hashlib.sha256(json.dumps(found["inputs"], sort_keys=True).encode()).hexdigest(),
    }


# Traces


def read_traces(reading: Reading, store: Any, pool: ThreadPoolExecutor) -> None:
    count = 0
    for experiment in reading.experiments:
        for infos in batches(trace_infos(reading, experiment), 200):
            infos = [info for info in infos if info.experiment_id == experiment]
            spans = pool.map(lambda info: spans_of(reading, info), infos)
            for info, found in zip(infos, spans, strict=True):
                insert_trace(reading, store, info, found)
            count += len(infos)
            reading.say(f"{count:,} traces")


def trace_infos(reading: Reading, experiment: str) -> Iterator[Any]:
    """The traces of an experiment, as objects of MLflow's class TraceInfo."""
    from google.protobuf.json_format import ParseDict
    from mlflow.entities import TraceInfo
    from mlflow.entities.trace_info_v2 import TraceInfoV2
    from mlflow.protos import service_pb2

    if reading.release >= (3, 2):
        query = {"locations": [trace_place(experiment)], "max_results": 500}
        for each in pages(reading.api.post, TRACES, "traces", **query):
            yield TraceInfo.from_proto(ParseDict(each, service_pb2.TraceInfoV3(), ignore_unknown_fields=True))
    else:
        query = {"experiment_ids": experiment, "max_results": 100}
        for each in pages(reading.api.get, "/api/2.0/mlflow/traces", "traces", **query):
            message = ParseDict(each, service_pb2.TraceInfo(), ignore_unknown_fields=True)
            info = TraceInfoV2.from_proto(message).to_v3()
            if each.get("status") == "IN_PROGRESS":
                info.execution_duration = None  # the API returns 0
            yield info


def spans_of(reading: Reading, info: Any) -> list[Any]:
    """The spans of a trace, or an empty list if the spans are in an artifact and not in the server's database."""
    from mlflow.entities import Span

    if info.tags.get(SPANS_IN_DATABASE[0]) != SPANS_IN_DATABASE[1]:
        reading.in_files.add(info.trace_id)
        return []
    answer = reading.api.get("/ajax-api/3.0/mlflow/get-trace-artifact", request_id=info.trace_id)
    return [Span.from_dict(each) for each in answer["spans"]]


def insert_trace(reading: Reading, store: Any, info: Any, spans: list[Any]) -> None:
    """Insert a trace with MLflow's own store, which computes many columns from the spans. Then replace the tags, the
    metadata and some columns of the trace with the values in the API's response."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.tracking.utils.trace_analytics import (
        PROMOTED_TRACE_METADATA_KEYS,
        analytics_columns_from_metadata,
    )

    trace, tags = info.trace_id, dict(info.tags)
    info.tags.pop(PLACE_TAG, None)  # the store sets its own
    try:
        store.start_trace(info)
        store.log_spans(info.experiment_id, spans)
    except MlflowException as error:
        raise AdoptionError(f"trace {trace} does not fit MLflow's schema: {error.message}") from None
    database = reading.database
    for table in ("trace_tags", "trace_request_metadata"):
        database.execute(f"DELETE FROM {table} WHERE request_id = ?", [trace])
    metadata = {key: text for key, text in info.trace_metadata.items() if key not in PROMOTED_TRACE_METADATA_KEYS}
    tags.pop(NAME_TAG, None)  # a column
    for table, values in (("trace_tags", tags), ("trace_request_metadata", metadata)):
        reading.insert(table, [{"key": key, "value": text, "request_id": trace} for key, text in values.items()])
    columns = {
        "timestamp_ms": info.request_time,
        "execution_time_ms": info.execution_duration,
        "status": info.state.value,
        "request_preview": info.request_preview,
        "response_preview": info.response_preview,
        **analytics_columns_from_metadata(info.trace_metadata),
    }
    changed = ", ".join(f"{column} = ?" for column in columns)
    database.execute(f"UPDATE trace_info SET {changed} WHERE request_id = ?", [*columns.values(), trace])
    for each in info.assessments:
        if each.valid is False:
            database.execute("UPDATE assessments SET valid = 0 WHERE assessment_id = ?", [each.assessment_id])
    database.commit()  # releases the lock on the file, because MLflow's store writes through its own connection


def read_links(reading: Reading, pool: ThreadPoolExecutor) -> None:
    """Insert the links from traces to runs and to versions of prompts. If a link was added after the creation of a
    trace, only a search finds the link."""
    found = reading.database.execute("SELECT DISTINCT experiment_id FROM trace_info").fetchall()
    places = [trace_place(str(experiment)) for (experiment,) in found]
    if not places:
        return
    searches = [("run", "run_id", run) for (run,) in reading.database.execute("SELECT run_uuid FROM runs")]
    if reading.release >= (3, 9):
        versions = (
            "SELECT name || '/' || version FROM model_versions JOIN registered_model_tags USING (name) "
            "WHERE key = 'mlflow.prompt.is_prompt' AND lower(registered_model_tags.value) = 'true'"
        )
        searches += [("prompt_version", "prompt", version) for (version,) in reading.database.execute(versions)]

    def linked(kind: str, key: str, name: str) -> list[dict[str, Any]]:
        query = {"locations": places, "filter": f"{key} = '{name}'", "max_results": 500}
        return [
            {
                "association_id": computed_id(each["trace_id"], kind, name),
                "source_type": "trace",
                "source_id": each["trace_id"],
                "destination_type": kind,
                "destination_id": name,
            }
            for each in pages(reading.api.post, TRACES, "traces", **query)
            if each.get("trace_metadata", {}).get("mlflow.sourceRun") != name
        ]

    for few in batches(searches, 500):
        for links in pool.map(lambda search: linked(*search), few):
            reading.insert("entity_associations", links)


def trace_place(experiment: str) -> dict[str, Any]:
    return {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": experiment}}


def listed(pairs: Any) -> list[tuple[str, str]]:
    return [(each["key"], each.get("value", "")) for each in pairs or ()]


def batches(found: Any, size: int) -> Iterator[list[Any]]:
    remaining = iter(found)
    while few := list(itertools.islice(remaining, size)):
        yield few
