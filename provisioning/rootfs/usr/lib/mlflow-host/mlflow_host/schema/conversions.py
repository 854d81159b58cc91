"""A rollback uses this SQL for data that newer MLflow releases store in other tables or columns than older releases.

MLflow's migrations convert data only to a newer schema. The conversions in this module restore the older form of the
data. Whether a conversion applies depends only on the two schemas, so untested pairs of releases are supported too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mlflow_host.postgres.catalog import Catalog


@dataclass(frozen=True)
class Conversion:
    """`rows` maps a target table to a SELECT on the source, which returns additional rows with named columns.
    `columns` maps a (table, column) of the target to an expression that is evaluated on the source table's row.
    `carries` lists each (table, column) of the source that is converted and therefore does not count as left behind."""

    name: str
    rows: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[tuple[str, str], str] = field(default_factory=dict)
    carries: frozenset[tuple[str, str]] = frozenset()


DERIVED = frozenset(
    {
        "sql_trace_metric_daily_rollups",
        "sql_span_cost_daily_rollups",
        "sql_assessment_daily_rollups",
        "sql_trace_rollup_rebuild_queue",
    }
)
"""Tables that MLflow computes from other tables. MLflow fills these tables again if they are empty
(mlflow/store/db/trace_rollups.py). A merge ignores these tables, because their source tables may have changed."""

TRANSIENT = frozenset({"scheduler_leases", "job_locks"})
"""Tables with locks and leases of server processes. A merge ignores these tables, because the processes no longer
run."""


@dataclass(frozen=True)
class SoftReference:
    """A reference to a parent row that no foreign key enforces. Only rows of `table` for which `when` is true refer to
    a parent. When MLflow deletes a parent, it also deletes the rows that refer to the parent."""

    table: str
    column: str
    parent: str
    parent_column: str
    when: str


SOFT_REFERENCES = (
    SoftReference("review_queue_items", "item_id", "trace_info", "request_id", "item_type = 'trace'"),
    SoftReference("endpoint_bindings", "resource_id", "scorers", "scorer_id", "resource_type = 'scorer'"),
)

RECOMPUTED = frozenset(
    {
        ("assessments", "experiment_id"),
        ("assessments", "trace_timestamp_ms"),
        ("assessments", "aggregate_value"),
        ("assessments", "is_numeric_value"),
    }
)
"""Columns that MLflow's migration 75868b020152 computes from other columns."""


def conversions(source: Catalog, target: Catalog) -> list[Conversion]:
    """Return the conversions from the schema `source` to the schema `target`. A conversion uses only tables of the
    target. For example, MLflow up to 3.9 has tables for tags and metadata of traces, but none for metrics of spans."""
    found = []
    if _has(source, "trace_info", "trace_name") and not _has(target, "trace_info", "trace_name"):
        lacking = set() if _has(target, "spans", "dimension_attributes") else _DIMENSIONS
        lacking = lacking if "span_metrics" in target.tables else lacking | _SPAN_COSTS
        found.append(replace(TRACE_ANALYTICS, carries=TRACE_ANALYTICS.carries - lacking))
    for table, column, was in RENAMED:
        if _has(source, table, column) and _has(target, table, was) and not _has(target, table, column):
            name = f"{table}.{column} to its former name {table}.{was}"
            found.append(Conversion(name, {}, {(table, was): f'"{column}"'}, frozenset({(table, column)})))
    return found


RENAMED = (("jobs", "job_name", "function_fullname"),)  # 5d2d30f0abce
"""Each column that MLflow's migrations have renamed: the table, the new name, and the name in older releases."""


def _has(catalog: Catalog, table: str, column: str) -> bool:
    return column in catalog.tables.get(table, {})


_TOKENS = (
    "input_tokens",
    "output_tokens",
    "total_tokens",
    "cache_read_input_tokens",
    "cache_creation_input_tokens",
    "cache_creation_input_tokens_above_1hr",
)
_COSTS = ("input_cost", "output_cost", "total_cost")
_SPAN_COSTS = {("spans", name) for name in _COSTS}
_DIMENSIONS = {("spans", "model_name"), ("spans", "model_provider")}


def _json_object(columns: tuple[str, ...]) -> str:
    """Return SQL that makes a JSON object from all columns that are not NULL, in the format of json.dumps. If all
    columns are NULL, the result is NULL."""
    pairs = ", ".join(f"'\"{name}\": ' || {name}" for name in columns)
    return f"nullif('{{' || concat_ws(', ', {pairs}) || '}}', '{{}}')"


def _rows_without_key(key: str, value: str, table: str) -> str:
    """Return a SELECT of request_id, key and value from trace_info, for traces that lack this key in `table`."""
    return (
        f"SELECT i.request_id, '{key}' AS key, {value} AS value FROM trace_info i WHERE {value} IS NOT NULL "
        f"AND NOT EXISTS (SELECT 1 FROM {table} t WHERE t.request_id = i.request_id AND t.key = '{key}')"
    )


TRACE_ANALYTICS = Conversion(
    name="names, sessions, tokens and costs of traces and spans (3.17) to tags, metadata and metrics (before)",
    rows={
        "trace_tags": _rows_without_key("mlflow.traceName", "trace_name", "trace_tags"),
        "trace_request_metadata": " UNION ALL ".join(
            (
                _rows_without_key("mlflow.trace.session", "session_id", "trace_request_metadata"),
                _rows_without_key("mlflow.trace.tokenUsage", _json_object(_TOKENS), "trace_request_metadata"),
                _rows_without_key("mlflow.trace.cost", _json_object(_COSTS), "trace_request_metadata"),
            )
        ),
        "trace_metrics": " UNION ALL ".join(
            _rows_without_key(column, f"{column}::double precision", "trace_metrics") for column in _TOKENS
        ),
        "span_metrics": " UNION ALL ".join(
            f"SELECT s.trace_id, s.span_id, '{column}' AS key, s.{column} AS value FROM spans s "
            f"WHERE s.{column} IS NOT NULL AND NOT EXISTS (SELECT 1 FROM span_metrics m "
            f"WHERE m.trace_id = s.trace_id AND m.span_id = s.span_id AND m.key = '{column}')"
            for column in _COSTS
        ),
    },
    columns={
        ("spans", "dimension_attributes"): (
            "nullif(jsonb_strip_nulls(jsonb_build_object("
            "'mlflow.llm.model', model_name, 'mlflow.llm.provider', model_provider)), '{}')::json"
        )
    },
    carries=frozenset(
        [("trace_info", name) for name in ("trace_name", "session_id", *_TOKENS, *_COSTS)]
        + sorted(_DIMENSIONS | _SPAN_COSTS)
    ),
)
"""Reverses MLflow's migration 75868b020152, whose downgrade() does not exist in the older release."""
