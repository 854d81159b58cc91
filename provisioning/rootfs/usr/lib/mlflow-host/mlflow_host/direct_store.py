"""MLflow's tracking store for PostgreSQL, with the statements that clients wait for most written out.

MLflow's own makes an object that a session watches of every metric, parameter and tag it reads or writes, and asks for
them table by table; that is most of what such a request costs. `DirectStore` does the same with one statement or two.
It is MLflow's store in all else, and whatever is out of the ordinary is left to MLflow's own method: an id that is not
there, a run that was deleted, any refusal of PostgreSQL's. A statement that failed has changed nothing.

That it answers, refuses and keeps exactly what MLflow's own does is compared in tests/schema/test_tracking.py; with
which releases, `mlflow_host.tracking` says.
"""

# mypy: disable-error-code="no-untyped-call, no-any-return"

from __future__ import annotations

import contextlib
import math
import uuid
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import psycopg2
from mlflow.entities import (
    LifecycleStage,
    LoggedModelInput,
    LoggedModelOutput,
    Metric,
    Param,
    Run,
    RunData,
    RunInfo,
    RunInputs,
    RunOutputs,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from mlflow.protos.service_pb2 import Metric as ProtoMetric
from mlflow.protos.service_pb2 import Param as ProtoParam
from mlflow.protos.service_pb2 import Run as ProtoRun
from mlflow.protos.service_pb2 import RunData as ProtoRunData
from mlflow.protos.service_pb2 import RunTag as ProtoRunTag
from mlflow.store.entities.paged_list import PagedList
from mlflow.store.tracking import sqlalchemy_store
from mlflow.store.tracking.dbmodels import models
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME
from mlflow.utils.name_utils import _generate_random_name
from mlflow.utils.search_utils import SearchUtils
from mlflow.utils.uri import append_to_uri_path
from mlflow.utils.validation import (
    _validate_batch_log_limits,
    _validate_metric,
    _validate_run_id,
)
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

Row = tuple[Any, ...]

LARGEST = 1.7976931348623157e308
"""What MLflow stores for infinity."""


RUNS = """
select r.run_uuid, r.name, r.experiment_id, r.user_id, r.status, r.start_time, r.end_time, r.lifecycle_stage,
       r.artifact_uri, m.*, p.*, t.*, d.*, i.*, o.*
from runs r,
lateral (select array_agg(key), array_agg(value), array_agg(timestamp), array_agg(step), array_agg(is_nan)
         from latest_metrics where run_uuid = r.run_uuid) m,
lateral (select array_agg(key), array_agg(value) from params where run_uuid = r.run_uuid) p,
lateral (select array_agg(key), array_agg(value) from tags where run_uuid = r.run_uuid) t,
lateral (select exists (select from inputs where destination_type = 'RUN' and destination_id = r.run_uuid)) d,
lateral (select array_agg(destination_id) from inputs
         where source_type = 'RUN_INPUT' and source_id = r.run_uuid and destination_type = 'MODEL_INPUT') i,
lateral (select array_agg(destination_id), array_agg(step) from inputs
         where source_type = 'RUN_OUTPUT' and source_id = r.run_uuid and destination_type = 'MODEL_OUTPUT') o
where r.run_uuid = any(%s)
"""
"""Runs with all that is shown of them, a row each."""

HISTORY = """
select value, timestamp, step, is_nan from metrics where run_uuid = %s and key = %s
order by timestamp, step, value offset %s limit %s
"""

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
    def get_run(self, run_id: str) -> Run:
        try:
            with self.cursor() as cursor:
                cursor.execute(RUNS, ([run_id],))
                row = only(cursor.fetchall())
        except Unusual:
            return super().get_run(run_id)
        datasets = self.datasets([run_id] if has_datasets(row) else [])
        inputs = RunInputs(dataset_inputs=datasets.get(run_id, []), model_inputs=model_inputs(row))
        return FoundRun(row, inputs)

    def _search_runs(
        self,
        experiment_ids: Sequence[str],
        filter_string: str | None,
        run_view_type: int,
        max_results: int | None,
        order_by: list[str] | None,
        page_token: str | None,
    ) -> tuple[list[Run], str | None]:
        self._validate_max_results_param(max_results, allow_null=True)  # type: ignore[arg-type]
        start = SearchUtils.parse_start_offset_from_page_token(page_token)
        try:
            experiments = [whole_number(text) for text in experiment_ids]
            most = None if max_results is None else max_results + 1
            ids = self.found(experiments, filter_string, run_view_type, order_by, start, most)
            page = ids[:max_results]
            with self.cursor() as cursor:
                cursor.execute(RUNS, (page,))
                rows = {row[0]: row for row in cursor.fetchall()}
        except Unusual:
            return super()._search_runs(experiment_ids, filter_string, run_view_type, max_results, order_by, page_token)
        datasets = self.datasets([run_id for run_id, row in rows.items() if has_datasets(row)])
        runs: list[Run] = [
            FoundRun(rows[run_id], RunInputs(dataset_inputs=datasets.get(run_id, [])))
            for run_id in page
            if run_id in rows  # else it went between the two statements
        ]
        return runs, next_token(start, max_results, len(ids))

    def found(
        self,
        experiments: list[int],
        filter_string: str | None,
        run_view_type: int,
        order_by: list[str] | None,
        start: int,
        most: int | None,
    ) -> list[str]:
        """Ids of the runs that a search finds, in its order, by the clauses that MLflow makes. Raises Unusual."""
        stages = LifecycleStage.view_type_to_stages(run_view_type)
        filters = SearchUtils.parse_search_filter(filter_string)
        with self.ManagedSessionMaker() as session:
            columns, order, sorted_by = sqlalchemy_store._get_orderby_clauses(order_by, session)
            conditions, having, datasets = sqlalchemy_store._get_sqlalchemy_filter_clauses(
                filters, session, self._get_dialect()
            )
            wanted = select(models.SqlRun.run_uuid, *columns)
            for one in having:
                wanted = wanted.join(one)
            for one in sorted_by:
                wanted = wanted.outerjoin(one)
            in_scope = (models.SqlRun.experiment_id.in_(experiments), models.SqlRun.lifecycle_stage.in_(sorted(stages)))
            wanted = wanted.where(*in_scope, *conditions).order_by(*order).offset(start).limit(most)
            # Rows are as unique as what is joined: a metric, parameter or tag is there once by key, datasets are not.
            ids = [] if datasets else [row[0] for row in session.execute(wanted)]
        if datasets:
            raise Unusual
        return ids

    def datasets(self, run_ids: list[str]) -> dict[str, list[Any]]:
        """The dataset inputs of runs, in MLflow's own way."""
        if not run_ids:
            return {}
        with self.ManagedSessionMaker() as session:
            return dict(zip(run_ids, self._get_run_inputs(session, run_ids), strict=True))

    def get_metric_history(
        self, run_id: str, metric_key: str, max_results: int | None = None, page_token: str | None = None
    ) -> PagedList[Metric]:
        start = SearchUtils.parse_start_offset_from_page_token(page_token)
        try:
            with self.cursor() as cursor:
                cursor.execute(HISTORY, (run_id, metric_key, start, None if max_results is None else max_results + 1))
                rows = cursor.fetchall()
        except Unusual:
            return super().get_metric_history(run_id, metric_key, max_results, page_token)
        metrics: list[Metric] = [
            Reading(metric_key, math.nan if is_nan else value, time, step)
            for value, time, step, is_nan in rows[:max_results]
        ]
        return PagedList(metrics, next_token(start, max_results, len(rows)))

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
    """An experiment's id. Raises Unusual."""
    if not isinstance(text, str) or not (text.isascii() and text.isdecimal()):
        raise Unusual
    return int(text)


def next_token(start: int, most: int | None, found: int) -> str | None:
    """The token of the next page, where one more than `most` was found."""
    return SearchUtils.create_page_token(start + most) if most is not None and found > most else None


# Rows


def has_datasets(row: Row) -> bool:
    return bool(row[18])


def model_inputs(row: Row) -> list[LoggedModelInput]:
    return [LoggedModelInput(model_id=one) for one in row[19] or ()]


class FoundRun(Run):
    """A run as a row of `RUNS` tells it. On its way to a client nobody looks at its metrics one by one, so entities of
    them are made only for who does."""

    def __init__(self, row: Row, inputs: RunInputs) -> None:
        run_id, name, experiment, user, status, start, end, stage, uri = row[:9]
        self._metrics, self._params, self._tags = row[9:14], row[14:16], row[16:18]
        self._info = RunInfo(
            run_id=run_id,
            run_name=name or self._tagged(MLFLOW_RUN_NAME) or name,
            experiment_id=str(experiment),
            user_id=user,
            status=status,
            start_time=start,
            end_time=end,
            lifecycle_stage=stage,
            artifact_uri=uri,
        )
        outputs = columns(row[20:22])
        self._inputs: RunInputs = inputs
        self._outputs: RunOutputs = RunOutputs([LoggedModelOutput(model_id=one, step=step) for one, step in outputs])

    def _tagged(self, wanted: str) -> str | None:
        return next((value for key, value in columns(self._tags) if key == wanted), None)

    @cached_property
    def _data(self) -> RunData:  # type: ignore[override]
        return RunData(
            metrics=[Metric(key, value, time, step) for key, value, time, step in readings(self._metrics)],
            params=[Param(key, value) for key, value in columns(self._params)],
            tags=[RunTag(key, value) for key, value in columns(self._tags)],
        )

    def to_proto(self) -> ProtoRun:
        data = ProtoRunData(
            metrics=[
                ProtoMetric(key=key, value=value, timestamp=time, step=step)
                for key, value, time, step in readings(self._metrics)
            ],
            params=[ProtoParam(key=key, value=value) for key, value in columns(self._params)],
            tags=[ProtoRunTag(key=key, value=value) for key, value in columns(self._tags)],
        )
        inputs, outputs = self._inputs.to_proto(), self._outputs.to_proto()
        return ProtoRun(info=self._info.to_proto(), data=data, inputs=inputs, outputs=outputs)


class Reading(Metric):
    """A metric on its way to a client, by the thousand in a history."""

    def to_proto(self) -> ProtoMetric:
        return ProtoMetric(key=self._key, value=self._value, timestamp=self._timestamp, step=self._step)


def readings(arrays: Sequence[list[Any] | None]) -> Iterator[tuple[str, float, int, int]]:
    """Key, value, timestamp and step of each metric of a run."""
    for key, value, time, step, is_nan in columns(arrays):
        yield key, math.nan if is_nan else value, time, step


def columns(arrays: Sequence[list[Any] | None]) -> Iterable[Row]:
    """The rows that were aggregated; none is null."""
    return zip(*arrays, strict=True) if arrays[0] is not None else ()


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
