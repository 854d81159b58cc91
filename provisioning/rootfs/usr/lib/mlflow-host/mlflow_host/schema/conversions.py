"""Data that a release moved from one table to another, and the SQL that rebuilds its older form from the newer.

MLflow's migrations only go forward; these conversions go back. A conversion applies by the tables and columns of the
two schemas, not by release numbers, so it also works for untested pairs of releases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mlflow_host.postgres.catalog import Catalog


@dataclass(frozen=True)
class Conversion:
    """`rows`: by target table, a SELECT on the source that returns additional rows, all columns named.
    `columns`: by (table, column) of the target, an expression over the source table's row.
    `carries`: (table, column) pairs of the source that this converts, so they do not count as left behind."""

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
"""Tables that MLflow computes from other tables, again when they are empty (mlflow/store/db/trace_rollups.py). They
are neither carried nor merged back, as their sources may have changed."""

TRANSIENT = frozenset({"scheduler_leases", "job_locks"})
"""Locks and leases of server processes that no longer run."""


@dataclass(frozen=True)
class SoftReference:
    """A reference that MLflow keeps without a foreign key: the rows of `table` where `when` holds. MLflow deletes them
    with their parent."""

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
    """The conversions that apply between two schemas. Each place of the target gets what it can hold: releases up to
    3.9 have the tags and metadata of traces, but no metrics of spans."""
    found = []
    if _has(source, "trace_info", "trace_name") and not _has(target, "trace_info", "trace_name"):
        lacking = set() if _has(target, "spans", "dimension_attributes") else _DIMENSIONS
        lacking = lacking if "span_metrics" in target.tables else lacking | _SPAN_COSTS
        found.append(replace(TRACE_ANALYTICS, carries=TRACE_ANALYTICS.carries - lacking))
    for table, column, was in RENAMED:
        if _has(source, table, column) and _has(target, table, was) and not _has(target, table, column):
            name = f"{table}.{column} to {table}.{was}, its name before"
            found.append(Conversion(name, {}, {(table, was): f'"{column}"'}, frozenset({(table, column)})))
    return found


RENAMED = (("jobs", "job_name", "function_fullname"),)  # 5d2d30f0abce
"""(table, column, its name in older releases) of each column that MLflow's migrations have renamed."""


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
    """SQL for JSON text of the columns that are not NULL, formatted like Python's json.dumps; NULL if all are NULL."""
    pairs = ", ".join(f"'\"{name}\": ' || {name}" for name in columns)
    return f"nullif('{{' || concat_ws(', ', {pairs}) || '}}', '{{}}')"


def _rows_without_key(key: str, value: str, table: str) -> str:
    """SELECT of (request_id, key, value) from trace_info for the traces without that key in `table`."""
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
"""The reverse of MLflow's migration 75868b020152. Its downgrade() exists in the newer release only."""
