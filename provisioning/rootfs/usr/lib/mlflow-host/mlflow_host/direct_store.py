"""MLflow's tracking store for PostgreSQL, with the one statement written out that training waits for most.

MLflow's own makes an object that a session watches of every metric it writes, and asks for the last of each key one by
one; that is most of what logging costs. `DirectStore` does the same with one statement, also for what is logged beside
parameters and tags. It is MLflow's store in all else, and whatever is out of the ordinary is left to MLflow's own
method: an id that is not there, a run that was deleted, any refusal of PostgreSQL's. A statement that failed has
changed nothing.

What clients ask most does not come here: `mlflow_host.direct_answers` answers it, by way of the same connections.
"""

# mypy: disable-error-code="no-untyped-call, no-any-return"

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import psycopg2
from mlflow.entities import LifecycleStage, Metric
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils.validation import _validate_metric
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


class Unusual(Exception):
    """MLflow's own method has to answer; nothing was changed."""


class Unreachable(MlflowException):
    """PostgreSQL went away, or took too long; what was asked of it may have been done."""


class DirectStore(SqlAlchemyStore):
    def _log_metrics(self, run_id: str, metrics: list[Metric]) -> None:
        """What `log_metric` calls, and a `log_batch` that has more than metrics."""
        try:
            self.write_metrics(run_id, metrics)
        except (Unusual, MlflowException):
            super()._log_metrics(run_id, metrics)

    def write_metrics(self, run_id: str, metrics: Iterable[Any]) -> None:
        """Log metrics (MLflow's entities or messages), each once, and keep the last of every key. Raises Unusual or
        MlflowException, also for what is not valid."""
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
        refuses one, and Unreachable (an MlflowException, as of MLflow's sessions) when it cannot be asked."""
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
            raise Unreachable(str(error), error_code=TEMPORARILY_UNAVAILABLE) from error
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


def stored(metric: Any) -> tuple[str, float, int, int, bool]:
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
