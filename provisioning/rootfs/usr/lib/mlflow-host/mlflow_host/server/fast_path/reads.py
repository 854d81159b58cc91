"""The read requests of the fast path: get run, search runs and metric histories.

MLflow spends most of the time of a read request on creating an object, a message, a dictionary and indented JSON for
every metric, parameter and tag. In this module an SQL statement builds the JSON.
"""

# mypy: disable-error-code="no-untyped-call, no-any-return"

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from itertools import starmap
from typing import Any, NamedTuple

from mlflow.entities import LifecycleStage, LoggedModelInput, LoggedModelOutput, RunInputs, RunOutputs, ViewType
from mlflow.protos.service_pb2 import GetMetricHistory, GetRun, SearchRuns
from mlflow.store.tracking import sqlalchemy_store
from mlflow.store.tracking.dbmodels import models
from mlflow.utils.proto_json_utils import message_to_json
from mlflow.utils.search_utils import SearchUtils
from sqlalchemy import ARRAY, BigInteger, any_, bindparam, select
from sqlalchemy.dialects.postgresql import psycopg2
from sqlalchemy.orm import Session
from sqlalchemy.sql import visitors

from mlflow_host.server import request_limits
from mlflow_host.server.fast_path.requests import in_body, in_query
from mlflow_host.server.fast_path.store import DirectStore, Unusual, only, whole_number
from mlflow_host.server.flask_shortcut import Scope

NUMBER = """
case when is_nan or value = 'NaN' then '"NaN"' when value = 'Infinity' then '"Infinity"'
     when value = '-Infinity' then '"-Infinity"'
     when value = floor(value) and abs(value) < 1e15 then value || '.0' else value::text end
"""
"""SQL for a metric's value in Python's JSON format. PostgreSQL writes whole numbers below 1e15 without a decimal point.
"""

RUNS = f"""
select r.run_uuid, coalesce(nullif(r.name, ''), (
           select nullif(value, '') from tags where run_uuid = r.run_uuid and key = 'mlflow.runName'
       ), r.name), r.experiment_id, r.user_id, r.status, r.start_time, r.end_time, r.artifact_uri, r.lifecycle_stage,
       (select '[' || string_agg('{{"key": ' || to_json(key) || ', "value": ' || {NUMBER}
                                 || ', "timestamp": ' || timestamp || ', "step": ' || step || '}}', ', ') || ']'
        from latest_metrics where run_uuid = r.run_uuid),
       (select '[' || string_agg('{{"key": ' || to_json(key) || ', "value": ' || to_json(value) || '}}', ', ') || ']'
        from params where run_uuid = r.run_uuid),
       (select '[' || string_agg('{{"key": ' || to_json(key)
                                 || coalesce(', "value": ' || to_json(value), '') || '}}', ', ') || ']'
        from tags where run_uuid = r.run_uuid),
       exists (select from inputs where destination_type = 'RUN' and destination_id = r.run_uuid),
       (select array_agg(destination_id || ' ' || step) from inputs
        where source_type = 'RUN_OUTPUT' and source_id = r.run_uuid and destination_type = 'MODEL_OUTPUT')
from runs r where r.run_uuid = any(%s)
"""
"""SQL that returns one row per run. The columns are the fields of `Found`."""

MODELS_PUT_IN = """
select destination_id from inputs
where source_type = 'RUN_INPUT' and source_id = %s and destination_type = 'MODEL_INPUT'
"""
"""SQL that returns the models that a run used. Only the response to "get run" contains these models."""

HISTORY = f"""
select count(*), '[' || string_agg(%s || {NUMBER} || ', "timestamp": ' || timestamp
                                   || ', "step": ' || step || '}}', ', ') || ']'
from (select * from metrics where run_uuid = %s and key = %s order by timestamp, step, value offset %s limit %s) logged
"""

GOES_ON = "select from metrics where run_uuid = %s and key = %s offset %s limit 1"

MOST_RUNS = 50_000
"""MLflow's maximum number of runs in one response to a search."""

WORTH_KEEPING = 4000
"""A search's SQL statement is cached if the filter and the order together have fewer characters than this number."""

POSTGRES = "postgresql"
DIALECT = psycopg2.dialect()


class Found(NamedTuple):
    """A run. `metrics`, `params` and `tags` are JSON; each is None if the run has no such item."""

    run_id: str
    name: str | None
    experiment_id: int
    user: str | None
    status: str
    started: int | None
    ended: int | None
    artifact_uri: str | None
    lifecycle_stage: str
    metrics: str | None
    params: str | None
    tags: str | None
    has_datasets: bool
    models_made: list[str] | None
    """One string for each model that the run created: the model's ID, a space, and the step."""


# The functions below build responses. Each response has its fields in protobuf's order.


def run(store: DirectStore, scope: Scope, _: bytes) -> str:
    request = in_query(scope, GetRun)
    run_id = request.run_id
    if not run_id:  # MLflow accepts a run_uuid without a run_id, but rejects a run_uuid with an empty run_id
        raise Unusual
    with store.cursor() as cursor:
        cursor.execute(RUNS, ([run_id],))
        found = Found(*only(cursor.fetchall()))
        cursor.execute(MODELS_PUT_IN, (run_id,))
        models_put_in = [LoggedModelInput(model_id=model_id) for (model_id,) in cursor.fetchall()]
    return f'{{"run": {written(found, datasets(store, [found]), models_put_in)}}}'


def search(store: DirectStore, scope: Scope, body: bytes) -> str:
    request = in_body(scope, body, SearchRuns)
    most = request.max_results
    if not 0 < most <= MOST_RUNS:
        raise Unusual
    view = ViewType.from_proto(request.run_view_type) if request.HasField("run_view_type") else ViewType.ACTIVE_ONLY
    start = offset(request.page_token)
    experiments = [whole_number(text) for text in request.experiment_ids]
    order_by = tuple(request.order_by)
    if request_limits.problem([("filter", request.filter), ("order_by", list(order_by))]):
        raise Unusual
    short = len(request.filter) + sum(map(len, order_by)) < WORTH_KEEPING
    made, told = (statement if short else statement.__wrapped__)(request.filter, view, order_by)
    with store.cursor() as cursor:
        cursor.execute(made, told | {"experiments": experiments, "start": start, "most": most + 1})
        ids = [run_id for run_id, *_ in cursor.fetchall()]
        cursor.execute(RUNS, (ids[:most],))
        found = {one.run_id: one for one in starmap(Found, cursor.fetchall())}
    inputs = datasets(store, found.values())
    # A run may have been deleted between the two SQL statements.
    runs = ", ".join(written(found[run_id], inputs) for run_id in ids[:most] if run_id in found)
    return members(runs=f"[{runs}]" if runs else "", next_page_token=next_token(start, most, len(ids) > most))


def history(store: DirectStore, scope: Scope, _: bytes) -> str:
    request = in_query(scope, GetMetricHistory)
    run_id, key, most = request.run_id, request.metric_key, request.max_results
    if not (run_id and key and 0 < most <= request_limits.POINTS):
        raise Unusual
    start = offset(request.page_token)
    before_value = f'{{"key": {json.dumps(key)}, "value": '
    with store.cursor() as cursor:
        cursor.execute(HISTORY, (before_value, run_id, key, start, most))
        count, metrics = only(cursor.fetchall())
        goes_on = False
        if count == most:
            cursor.execute(GOES_ON, (run_id, key, start + most))
            goes_on = cursor.rowcount > 0
    return members(metrics=metrics, next_page_token=next_token(start, most, goes_on))


def offset(page_token: str) -> int:
    """Return the number of the first row of a page."""
    return SearchUtils.parse_start_offset_from_page_token(page_token or None)


# Runs


@lru_cache(maxsize=256)
def statement(where: str, view: int, order_by: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """Return a search's SQL statement and its parameters. The statement consists of MLflow's clauses for the filter and
    the order, and returns the ordered IDs of runs. The caller adds the parameters `experiments`, `start` and `most`, so
    all pages of a search use the same statement. Raises Unusual for a filter on datasets, and MlflowException for an
    invalid filter."""
    session = Session()
    columns, order, sorted_by = sqlalchemy_store._get_orderby_clauses(list(order_by), session)
    filters = SearchUtils.parse_search_filter(where)
    conditions, having, of_datasets = sqlalchemy_store._get_sqlalchemy_filter_clauses(filters, session, POSTGRES)
    if of_datasets:  # a filter on datasets may return a run twice; metrics, parameters and tags are unique by key
        raise Unusual
    same = joined_already(having, sorted_by)
    wanted = select(models.SqlRun.run_uuid, *(in_terms_of(same, column) for column in columns))
    for one in having:
        wanted = wanted.join(one)
    for one in sorted_by:
        if one not in same:
            wanted = wanted.outerjoin(one)
    wanted = wanted.where(
        models.SqlRun.experiment_id == any_(bindparam("experiments", type_=ARRAY(BigInteger), required=False)),
        models.SqlRun.lifecycle_stage.in_(sorted(LifecycleStage.view_type_to_stages(view))),
        *conditions,
    )
    wanted = wanted.order_by(*(in_terms_of(same, one) for one in order))
    wanted = wanted.offset(bindparam("start", 0, BigInteger)).limit(bindparam("most", 0, BigInteger))
    compiled = wanted.compile(dialect=DIALECT, compile_kwargs={"render_postcompile": True})
    return str(compiled), dict(compiled.params)


def joined_already(having: list[Any], sorted_by: list[Any]) -> dict[Any, Any]:
    """If the filter and the order join the same metric, parameter or tag, map the order's join to the filter's join."""
    made = {keyed(one): one for one in having}
    return {one: made[keyed(one)] for one in sorted_by if keyed(one) in made}


def keyed(joined: Any) -> tuple[Any, Any]:
    """Return the table and the key of one of MLflow's joins."""
    where = joined.element.whereclause
    first = next(iter(getattr(where, "clauses", [where])))
    return first.left.table, first.right.value


def in_terms_of(same: dict[Any, Any], clause: Any) -> Any:
    """In `clause`, replace the columns of the order's joins with the columns of the filter's joins (`same`)."""

    def replaced(part: Any, **_: Any) -> Any:
        joined = same.get(getattr(part, "table", None))
        return None if joined is None else joined.c[part.key]

    if not same or isinstance(clause, str):  # the column's name
        return clause
    return visitors.replacement_traverse(clause, {}, replaced)  # type: ignore[call-overload]


def datasets(store: DirectStore, runs: Iterable[Found]) -> dict[str, list[Any]]:
    """Return the dataset inputs of each run that has datasets. MLflow's own code reads the dataset inputs."""
    run_ids = [one.run_id for one in runs if one.has_datasets]
    if not run_ids:
        return {}
    with store.ManagedSessionMaker() as session:
        return dict(zip(run_ids, store._get_run_inputs(session, run_ids), strict=True))


def written(found: Found, datasets: dict[str, list[Any]], put_in: list[LoggedModelInput] | None = None) -> str:
    """Return the JSON of a run. Raises Unusual for a run that MLflow cannot return."""
    inputs = outputs = "{}"
    if found.has_datasets or put_in:
        inputs = message_to_json(RunInputs(datasets.get(found.run_id, []), put_in).to_proto())
    if found.models_made:
        made = (one.rsplit(" ", 1) for one in found.models_made)
        came_out = [LoggedModelOutput(model_id, int(step)) for model_id, step in made]
        outputs = message_to_json(RunOutputs(came_out).to_proto())
    data = members(metrics=found.metrics, params=found.params, tags=found.tags)
    return members(info=info(found), data=data, inputs=inputs, outputs=outputs)


def info(found: Found) -> str:
    """Return the JSON of a run's `info`. Raises Unusual if the run has no user or no start time."""
    if found.user is None or found.started is None:
        raise Unusual
    told = {
        "run_uuid": found.run_id,
        "experiment_id": str(found.experiment_id),
        "run_name": found.name,
        "user_id": found.user,
        "status": found.status,
        "start_time": found.started,
        "end_time": found.ended or None,
        "artifact_uri": found.artifact_uri or None,
        "lifecycle_stage": found.lifecycle_stage,
        "run_id": found.run_id,
    }
    return json.dumps({name: value for name, value in told.items() if value is not None})


def members(**named: str | None) -> str:
    """Return a JSON object. Each argument is the JSON of one member. Empty arguments are omitted."""
    return "{" + ", ".join(f'"{name}": {value}' for name, value in named.items() if value) + "}"


def next_token(start: int, most: int, goes_on: bool) -> str:
    """Return the token of the next page as JSON, or "" if this page is the last one."""
    return json.dumps(SearchUtils.create_page_token(start + most).decode()) if goes_on else ""
