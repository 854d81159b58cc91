"""The write requests of the fast path: log metrics, and create runs, with one or two SQL statements per request.

MLflow spends most of the time of a write request on a message, an ORM object and a row for every metric, and on several
queries. A log request with parameters, tags, models or datasets is passed to MLflow. A create request with unusual
fields is also passed to MLflow.
"""

# mypy: disable-error-code="no-untyped-call, no-any-return"

from __future__ import annotations

import json
import uuid
from typing import Any

# Functions that an MLflow release may lack are not imported by name: each request looks up the function in its module.
# If a function is missing, only requests to the endpoints that use this function are passed to MLflow.
from mlflow.entities import LifecycleStage
from mlflow.protos.service_pb2 import CreateRun, LogBatch, LogMetric
from mlflow.utils import name_utils, uri, validation

from mlflow_host.server.fast_path.reads import Found, info, members
from mlflow_host.server.fast_path.requests import in_body
from mlflow_host.server.fast_path.store import DirectStore, Unusual, only, whole_number
from mlflow_host.server.flask_shortcut import Scope
from mlflow_host.server.request_ids import PARSED

EXPERIMENT = "select artifact_location from experiments where experiment_id = %s and lifecycle_stage = 'active'"

CREATE_RUN = """
with run as (
    insert into runs (run_uuid, name, source_type, source_name, entry_point_name, user_id, status, start_time,
                      source_version, lifecycle_stage, artifact_uri, experiment_id)
    values (%(run_id)s, %(name)s, 'UNKNOWN', '', '', %(user)s, %(status)s, %(started)s,
            '', %(lifecycle_stage)s, %(artifact_uri)s, %(experiment_id)s)
)
insert into tags (run_uuid, key, value) select %(run_id)s, * from unnest(%(keys)s::varchar[], %(values)s::varchar[])
"""

NOTHING = "{}"
RUN_NAME = "mlflow.runName"
"""The key of the tag with a run's name, one of the system tags in MLflow's documentation."""

REQUIRED = ("key", "value", "timestamp")
LINKS = ("model_id", "dataset_name", "dataset_digest")


def log_metric(store: DirectStore, scope: Scope, body: bytes) -> str:
    request = in_body(scope, body, LogMetric)
    if not is_plain(request) or request.run_id != (request.run_uuid or request.run_id):
        raise Unusual
    store.write_metrics(request.run_id, [request])
    return NOTHING


def log_batch(store: DirectStore, scope: Scope, body: bytes) -> str:
    request = in_body(scope, body, LogBatch)
    if request.params or request.tags or not all(map(is_plain, request.metrics)):
        raise Unusual
    validation._validate_run_id(request.run_id)
    validation._validate_batch_log_limits(request.metrics, [], [])
    store.write_metrics(request.run_id, request.metrics)
    return NOTHING


def is_plain(metric: Any) -> bool:
    """Return true if a metric has all required fields, and no fields for a model or a dataset."""
    return all(map(metric.HasField, REQUIRED)) and not any(map(metric.HasField, LINKS))


def create_run(store: DirectStore, scope: Scope, body: bytes) -> str:
    request = in_body(scope, body, CreateRun)
    tags = [(tag.key, tag.value) for tag in request.tags]
    named = next((value for key, value in tags if key == RUN_NAME), "")
    if request.run_name and named and request.run_name != named:
        raise Unusual
    experiment = whole_number(request.experiment_id)
    if str(experiment) != request.experiment_id:  # MLflow's response repeats the request's ID, for example "01"
        raise Unusual
    run_id, name = uuid.uuid4().hex, request.run_name or named or name_utils._generate_random_name()
    if not named:
        tags.append((RUN_NAME, name))
    with store.cursor() as cursor:
        cursor.execute(EXPERIMENT, (experiment,))
        (location,) = only(cursor.fetchall())
        run = Found(
            run_id=run_id,
            name=name,
            experiment_id=experiment,
            user=request.user_id,
            status="RUNNING",
            started=request.start_time,
            ended=None,
            artifact_uri=uri.append_to_uri_path(location, run_id, store.ARTIFACTS_FOLDER_NAME),
            lifecycle_stage=LifecycleStage.ACTIVE,
            metrics=None,
            params=None,
            tags=json.dumps([{"key": key, "value": value} for key, value in tags]),
            has_datasets=False,
            models_made=None,
        )
        answer = members(run=members(info=info(run), data=members(tags=run.tags), inputs=NOTHING))
        keys, values = map(list, zip(*tags, strict=True))
        # This write is the last step, because MLflow creates the run after any exception.
        cursor.execute(CREATE_RUN, run._asdict() | {"keys": keys, "values": values})
    scope.get(PARSED, []).append({"run_uuid": run_id, "run_id": run_id, "run_name": name})
    return answer
