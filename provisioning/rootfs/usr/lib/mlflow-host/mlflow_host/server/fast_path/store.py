"""MLflow's tracking store for PostgreSQL, changed to write all metrics of a call with one SQL statement.

When MLflow's own store logs metrics, most of the time is spent on an ORM object for every metric, and on a separate
query for the latest value of each key. `DirectStore` writes all metrics of a batch with one statement, and inherits
MLflow's other methods. In unusual cases `DirectStore` calls MLflow's method: for an unknown ID, a deleted run, or an
error from PostgreSQL. MLflow's method can then write the metrics, because a failed statement changes nothing.

`fast_path.app` handles the most frequent requests without MLflow's handlers, over the connections of this store.
"""

# mypy: disable-error-code="no-untyped-call, no-any-return"

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import psycopg2
from mlflow.entities import LifecycleStage, Metric
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils import validation
from sqlalchemy.exc import SQLAlchemyError

from mlflow_host.server.fast_path import compatibility
from mlflow_host.server.refusals import invalid, too_dear
from mlflow_host.server.request_limits import POINTS

Row = tuple[Any, ...]

LARGEST = 1.7976931348623157e308
"""The largest double, which MLflow stores instead of infinity."""


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
"""The SQL statement for a batch in which some rows already exist. This statement runs only after LOG_METRICS has
failed, because checking for existing rows first would make every batch slower."""


class Unusual(Exception):
    """The database is unchanged, and MLflow's own method must handle the request."""


class Unreachable(MlflowException):
    """PostgreSQL does not respond, or ended a statement that exceeded a limit. MLflow must not repeat the request."""


class DirectStore(SqlAlchemyStore):
    def _log_metrics(self, run_id: str, metrics: list[Metric]) -> None:
        """Write metrics with one statement, or call MLflow's method. MLflow's `log_metric` and `log_batch` call this
        method."""
        try:
            if not self.writes_metrics:
                raise Unusual
            self.write_metrics(run_id, metrics)
        except Exception:
            super()._log_metrics(run_id, metrics)

    def get_metric_history(
        self, run_id: str, metric_key: str, max_results: int | None = None, page_token: str | None = None
    ) -> Any:
        """Return at most POINTS points from MLflow's method. Raises MlflowException (400) if the metric has more
        points."""
        if max_results is not None and max_results <= POINTS:
            return super().get_metric_history(run_id, metric_key, max_results=max_results, page_token=page_token)
        found = super().get_metric_history(run_id, metric_key, max_results=POINTS, page_token=page_token)
        if found.token:
            raise invalid(
                f"the history has more than {POINTS:,} points, the limit of one response: request pages like MLflow's "
                f"client, with max_results of at most {POINTS:,} and the page_token of the previous response"
            )
        return found

    @cached_property
    def writes_metrics(self) -> bool:
        """True if `write_metrics` was tested against the `_log_metrics` of the installed MLflow."""
        return compatibility.STORE not in compatibility.switched_off(compatibility.installed_mlflow())

    def write_metrics(self, run_id: str, metrics: Iterable[Any]) -> None:
        """Log metrics (MLflow's entities or messages) without duplicates, and update the latest value of each key.
        Invalid metrics raise an exception. After any exception except Unreachable, the database is unchanged."""
        rows = list(dict.fromkeys(map(stored, metrics)))
        last: dict[str, Row] = {}
        for row in rows:
            key, value, time, step, _ = row
            if key not in last or (step, time, value) > (last[key][3], last[key][2], last[key][1]):
                last[key] = row
        for key in last:
            validation._validate_metric(key, 0.0, 0, 0)
        if not last:
            raise Unusual
        values: dict[str, str] = {"run": run_id}
        for prefix, some in (("", rows), ("last_", last.values())):
            # The rows are sorted, so that all transactions lock rows in the same order.
            keys, *numbers = zip(*sorted(some), strict=True)
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
        """Yield a cursor of a pooled connection in autocommit mode. Raises Unusual if PostgreSQL rejects a statement.
        Raises Unreachable, a subclass of MlflowException, if PostgreSQL does not respond or ends a statement."""
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
            if sentence := too_dear(error):
                raise Unreachable(sentence, error_code=INVALID_PARAMETER_VALUE) from error
            raise Unreachable(str(error), error_code=TEMPORARILY_UNAVAILABLE) from error
        except (psycopg2.Error, ValueError):  # psycopg2 raises ValueError for a value that it cannot send
            raise Unusual from None
        finally:
            if connection.closed:
                pooled.invalidate()
            else:
                connection.autocommit = False
                pooled.close()


def only(rows: list[Row]) -> Row:
    """Return the only row. Raises Unusual if there is not exactly one row."""
    if len(rows) != 1:
        raise Unusual
    return rows[0]


def whole_number(text: str) -> int:
    """Convert a string of digits to a number. Raises Unusual for any other argument."""
    if not isinstance(text, str) or not (text.isascii() and text.isdecimal()):
        raise Unusual
    return int(text)


def stored(metric: Any) -> tuple[str, float, int, int, bool]:
    """Return key, value, timestamp, step and is_nan in MLflow's stored form. NaN and -0.0 become 0.0; infinity becomes
    the largest double. Raises Unusual for types and times that MLflow may reject. Raises OverflowError for an integer
    outside the range of doubles."""
    value, time, step = metric.value, metric.timestamp, metric.step
    if type(time) is not int or time < 0 or type(step) is not int or type(value) not in (float, int):
        raise Unusual
    value = value + 0.0
    if math.isfinite(value):
        return metric.key, value, time, step, False
    if math.isnan(value):
        return metric.key, 0.0, time, step, True
    return metric.key, math.copysign(LARGEST, value), time, step, False


def array(values: Iterable[object]) -> str:
    """Return numbers or booleans as a PostgreSQL array literal."""
    return "{" + ",".join(map(repr, values)) + "}"


def array_of_texts(texts: Iterable[str]) -> str:
    return "{" + ",".join(map(quoted, texts)) + "}"


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
