"""Metrics logged and runs made, by a statement or two each.

MLflow makes a message, an object and a row that a session watches of every metric, and asks for several things one by
one; that is most of what such a request costs. What has more in it than metrics, or than a run's beginning, is
MLflow's to write.
"""

# mypy: disable-error-code="no-untyped-call, no-any-return"

from __future__ import annotations

import json
import uuid
from typing import Any

from mlflow.entities import LifecycleStage
from mlflow.protos.service_pb2 import CreateRun, LogBatch, LogMetric
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME
from mlflow.utils.name_utils import _generate_random_name
from mlflow.utils.uri import append_to_uri_path
from mlflow.utils.validation import _validate_batch_log_limits, _validate_run_id

from mlflow_host.bridge import Scope
from mlflow_host.direct_reads import Found, info, members
from mlflow_host.direct_requests import in_body
from mlflow_host.direct_store import DirectStore, Unusual, only, whole_number

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
    _validate_run_id(request.run_id)
    _validate_batch_log_limits(request.metrics, [], [])
    store.write_metrics(request.run_id, request.metrics)
    return NOTHING


def is_plain(metric: Any) -> bool:
    """Whether a metric says all that it must, and nothing of models or datasets."""
    return all(map(metric.HasField, REQUIRED)) and not any(map(metric.HasField, LINKS))


def create_run(store: DirectStore, scope: Scope, body: bytes) -> str:
    request = in_body(scope, body, CreateRun)
    tags = [(tag.key, tag.value) for tag in request.tags]
    named = next((value for key, value in tags if key == MLFLOW_RUN_NAME), "")
    if request.run_name and named and request.run_name != named:
        raise Unusual
    experiment = whole_number(request.experiment_id)
    if str(experiment) != request.experiment_id:  # MLflow tells it as it was asked for
        raise Unusual
    run_id, name = uuid.uuid4().hex, request.run_name or named or _generate_random_name()
    if not named:
        tags.append((MLFLOW_RUN_NAME, name))
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
            artifact_uri=append_to_uri_path(location, run_id, store.ARTIFACTS_FOLDER_NAME),
            lifecycle_stage=LifecycleStage.ACTIVE,
            metrics=None,
            params=None,
            tags=json.dumps([{"key": key, "value": value} for key, value in tags]),
            has_datasets=False,
            models_made=None,
        )
        keys, values = map(list, zip(*tags, strict=True))
        cursor.execute(CREATE_RUN, run._asdict() | {"keys": keys, "values": values})
    return members(run=members(info=info(run), data=members(tags=run.tags), inputs=NOTHING))
