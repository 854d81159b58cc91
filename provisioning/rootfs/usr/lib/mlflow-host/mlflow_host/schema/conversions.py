"""Data that moved from one table to another between two releases, and how its older form is rebuilt from the newer.

MLflow's migrations know only the way forward; what is here is the way back. A conversion applies by the shape of the
two schemas, not by release numbers, so it also holds for pairs of releases that nobody tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlflow_host.schema.catalog import Catalog


@dataclass(frozen=True)
class Conversion:
    """`rows`: by target table, a SELECT on the source that yields further rows, each column named.
    `columns`: by (table, column) of the target, an expression over the source table's row.
    `carries`: (table, column) pairs of the source that this brings over, so that they do not count as left behind."""

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
"""Tables that MLflow computes from others and computes again where they are empty: neither lost nor to be put back,
since what they were computed from may have changed (mlflow/store/db/trace_rollups.py)."""

PASSING = frozenset({"scheduler_leases", "job_locks"})
"""Locks and leases of server processes that are long gone."""

RECOMPUTED = frozenset(
    {
        ("assessments", "experiment_id"),
        ("assessments", "trace_timestamp_ms"),
        ("assessments", "aggregate_value"),
        ("assessments", "is_numeric_value"),
    }
)
"""Columns that the migration to them fills from others (75868b020152)."""


def conversions(source: Catalog, target: Catalog) -> list[Conversion]:
    """Those that apply between two schemas."""
    moved = _has(source, "spans", "model_name") and not _has(source, "spans", "dimension_attributes")
    return [TRACE_ANALYTICS] if moved and _has(target, "spans", "dimension_attributes") else []


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


def _object(columns: tuple[str, ...]) -> str:
    """JSON text as Python writes it, in this order and with its spaces, of the numbers that are there; NULL where none
    is."""
    pairs = ", ".join(f"'\"{name}\": ' || {name}" for name in columns)
    return f"nullif('{{' || concat_ws(', ', {pairs}) || '}}', '{{}}')"


def _entry(key: str, value: str, table: str) -> str:
    """Rows (request_id, key, value) from trace_info, unless the table has that key already."""
    return (
        f"SELECT i.request_id, '{key}' AS key, {value} AS value FROM trace_info i WHERE {value} IS NOT NULL "
        f"AND NOT EXISTS (SELECT 1 FROM {table} t WHERE t.request_id = i.request_id AND t.key = '{key}')"
    )


TRACE_ANALYTICS = Conversion(
    name="names, sessions, tokens and costs of traces and spans (3.17) to tags, metadata and metrics (before)",
    rows={
        "trace_tags": _entry("mlflow.traceName", "trace_name", "trace_tags"),
        "trace_request_metadata": " UNION ALL ".join(
            (
                _entry("mlflow.trace.session", "session_id", "trace_request_metadata"),
                _entry("mlflow.trace.tokenUsage", _object(_TOKENS), "trace_request_metadata"),
                _entry("mlflow.trace.cost", _object(_COSTS), "trace_request_metadata"),
            )
        ),
        "trace_metrics": " UNION ALL ".join(
            _entry(column, f"{column}::double precision", "trace_metrics") for column in _TOKENS
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
        + [("spans", name) for name in ("model_name", "model_provider", *_COSTS)]
    ),
)
"""The reverse of MLflow's migration 75868b020152, whose downgrade() only the newer release has."""
