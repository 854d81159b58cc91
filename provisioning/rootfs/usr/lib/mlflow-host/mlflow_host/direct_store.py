"""MLflow's tracking store for PostgreSQL, with the statements that training waits for most written out.

MLflow's own makes an object that a session watches of every metric and tag it writes, and asks for them one by one;
that is most of what such a request costs. `DirectStore` does the same with one statement or two. It is MLflow's store
in all else, and whatever is out of the ordinary is left to MLflow's own method: an id that is not there, a run that was
deleted, any refusal of PostgreSQL's. A statement that failed has changed nothing.

What clients read most is answered in `mlflow_host.direct_answers`, by way of the same connections.

That it answers, refuses and keeps exactly what MLflow's own does is compared in tests/schema/test_tracking.py; with
which releases, `mlflow_host.tracking` says.
"""

# mypy: disable-error-code="no-untyped-call, no-any-return"

from __future__ import annotations

import contextlib
import math
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import psycopg2
from mlflow.entities import (
    LifecycleStage,
    Metric,
    Param,
    Run,
    RunData,
    RunInfo,
    RunInputs,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME
from mlflow.utils.name_utils import _generate_random_name
from mlflow.utils.uri import append_to_uri_path
from mlflow.utils.validation import (
    _validate_batch_log_limits,
    _validate_metric,
    _validate_run_id,
)
from sqlalchemy.exc import SQLAlchemyError

Row = tuple[Any, ...]

LARGEST = 1.7976931348623157e308
"""What MLflow stores for infinity."""


LOG_METRICS = """
with run as (select lifecycle_stage from runs where run_uuid = %(run)s),
logged as (
    insert into metrics (run_uuid, key, value, timestamp, step, is_nan)
    select %(run)s, m.*
    from run, unnest(%(keys)s::varchar[], %(values)s::float8[], %(times)s::bigint[],
                     %(steps)s::bigint[], %(nans)s::bool[]) m
    where lifecycle_stage = 'active' /* on conflict */
),
latest as (
    insert into latest_metrics as present (run_uuid, key, value, timestamp, step, is_nan)
    select %(run)s, m.*
    from run, unnest(%(last_keys)s::varchar[], %(last_values)s::float8[], %(last_times)s::bigint[],
                     %(last_steps)s::bigint[], %(last_nans)s::bool[]) m
    where lifecycle_stage = 'active'
    on conflict (key, run_uuid) do update
    set value = excluded.value, timestamp = excluded.timestamp, step = excluded.step, is_nan = excluded.is_nan
    where (excluded.step, excluded.timestamp, excluded.value) > (present.step, present.timestamp, present.value)
)
select lifecycle_stage from run
"""

LOG_NEW_METRICS = LOG_METRICS.replace("/* on conflict */", "on conflict do nothing")
"""The same where some are there already. To have PostgreSQL look for them first makes every batch dearer."""

EXPERIMENT = "select artifact_location from experiments where experiment_id = %s and lifecycle_stage = 'active'"

CREATE_RUN = """
with run as (
    insert into runs (run_uuid, name, source_type, source_name, entry_point_name, user_id, status, start_time,
                      source_version, lifecycle_stage, artifact_uri, experiment_id)
    values (%(run)s, %(name)s, 'UNKNOWN', '', '', %(user)s, 'RUNNING', %(start)s, '', 'active', %(uri)s, %(experiment)s)
)
insert into tags (run_uuid, key, value) select %(run)s, * from unnest(%(keys)s::varchar[], %(values)s::varchar[])
"""


class Unusual(Exception):
    """MLflow's own method has to answer; nothing was changed."""


class DirectStore(SqlAlchemyStore):
    def create_run(
        self, experiment_id: str, user_id: str, start_time: int, tags: list[RunTag] | None, run_name: str | None
    ) -> Run:
        own = list(tags or [])
        try:
            named = next((tag.value for tag in own if tag.key == MLFLOW_RUN_NAME), None)
            if (run_name and named and run_name != named) or not isinstance(start_time, int) or user_id is None:
                raise Unusual
            run_id, name = uuid.uuid4().hex, run_name or named or _generate_random_name()
            if not named:
                own.append(RunTag(MLFLOW_RUN_NAME, name))
            experiment = whole_number(experiment_id)
            with self.cursor() as cursor:
                cursor.execute(EXPERIMENT, (experiment,))
                (location,) = only(cursor.fetchall())
                uri = append_to_uri_path(location, run_id, self.ARTIFACTS_FOLDER_NAME)
                values = {
                    "run": run_id,
                    "name": name,
                    "user": user_id,
                    "start": start_time,
                    "uri": uri,
                    "experiment": experiment,
                    "keys": [tag.key for tag in own],
                    "values": [tag.value for tag in own],
                }
                cursor.execute(CREATE_RUN, values)
        except Unusual:
            return super().create_run(experiment_id, user_id, start_time, tags, run_name)
        info = RunInfo(
            run_id=run_id,
            run_name=name,
            experiment_id=experiment_id,
            user_id=user_id,
            status="RUNNING",
            start_time=start_time,
            end_time=None,
            lifecycle_stage=LifecycleStage.ACTIVE,
            artifact_uri=uri,
        )
        return Run(info, RunData(tags=own), RunInputs(dataset_inputs=[]))

    def log_batch(self, run_id: str, metrics: list[Metric], params: list[Param], tags: list[RunTag]) -> None:
        try:
            if params or tags or any(metric.model_id for metric in metrics):
                raise Unusual
            _validate_run_id(run_id)
            _validate_batch_log_limits(metrics, params, tags)
            self.write_metrics(run_id, metrics)
        except (Unusual, MlflowException):  # whose words are MLflow's own
            super().log_batch(run_id, metrics, params, tags)

    def _log_metrics(self, run_id: str, metrics: list[Metric]) -> None:
        """What `log_metric` calls, and a `log_batch` that has more than metrics."""
        try:
            self.write_metrics(run_id, metrics)
        except (Unusual, MlflowException):
            super()._log_metrics(run_id, metrics)

    def write_metrics(self, run_id: str, metrics: list[Metric]) -> None:
        """Log metrics, each once, and keep the last of every key. Raises Unusual or MlflowException, also for what is
        not valid."""
        rows = list(dict.fromkeys(map(stored, metrics)))
        last: dict[str, Row] = {}
        for row in rows:
            key, value, time, step, _ = row
            if key not in last or (step, time, value) > (last[key][3], last[key][2], last[key][1]):
                last[key] = row
        for key in last:
            _validate_metric(key, 0.0, 0, 0)
        if not last:
            raise Unusual
        values: dict[str, str] = {"run": run_id}
        for prefix, some in (("", rows), ("last_", last.values())):
            keys, *numbers = zip(*sorted(some), strict=True)  # one order of locks for all
            values |= {f"{prefix}keys": array_of_texts(keys)}
            for name, column in zip(("values", "times", "steps", "nans"), numbers, strict=True):
                values[prefix + name] = array(column)
        with self.cursor() as cursor:
            try:
                cursor.execute(LOG_METRICS, values)
            except psycopg2.errors.UniqueViolation:
                cursor.execute(LOG_NEW_METRICS, values)
            if only(cursor.fetchall()) != (LifecycleStage.ACTIVE,):
                raise Unusual

    @contextlib.contextmanager
    def cursor(self) -> Iterator[Any]:
        """A cursor of a pooled connection, each statement of which is a transaction. Raises Unusual when PostgreSQL
        refuses one, and MlflowException (as MLflow's sessions do) when it cannot be reached."""
        try:
            pooled = self.engine.raw_connection()
        except SQLAlchemyError:
            raise Unusual from None
        connection: Any = pooled.driver_connection
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                yield cursor
        except psycopg2.errors.DeadlockDetected:
            raise Unusual from None
        except psycopg2.OperationalError as error:
            raise MlflowException(str(error), error_code=TEMPORARILY_UNAVAILABLE) from error
        except (psycopg2.Error, ValueError):  # the latter for what cannot be told to it
            raise Unusual from None
        finally:
            if connection.closed:
                pooled.invalidate()
            else:
                connection.autocommit = False
                pooled.close()


def only(rows: list[Row]) -> Row:
    """The one row. Raises Unusual."""
    if len(rows) != 1:
        raise Unusual
    return rows[0]


def whole_number(text: str) -> int:
    """What plain digits say: an experiment's id, the size of a page. Raises Unusual."""
    if not isinstance(text, str) or not (text.isascii() and text.isdecimal()):
        raise Unusual
    return int(text)


def stored(metric: Metric) -> tuple[str, float, int, int, bool]:
    """Key, value, timestamp, step and is_nan as MLflow keeps them: PostgreSQL's double has no place for others.
    Raises Unusual for types and times that MLflow may refuse."""
    value, time, step = metric.value, metric.timestamp, metric.step
    if type(time) is not int or time < 0 or type(step) is not int or type(value) not in (float, int):
        raise Unusual
    try:
        value = float(value)
    except OverflowError:
        raise Unusual from None
    if math.isfinite(value):
        return metric.key, value, time, step, False
    if math.isnan(value):
        return metric.key, 0.0, time, step, True
    return metric.key, math.copysign(LARGEST, value), time, step, False


def array(values: Iterable[object]) -> str:
    """PostgreSQL's notation of an array of numbers or booleans."""
    return "{" + ",".join(map(repr, values)) + "}"


def array_of_texts(texts: Iterable[str]) -> str:
    return "{" + ",".join(map(quoted, texts)) + "}"


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
