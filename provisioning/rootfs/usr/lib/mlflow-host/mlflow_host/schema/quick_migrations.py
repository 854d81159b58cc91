"""Faster statements for MLflow's migrations of large tables. The result is the same as that of MLflow's statements.

`release_worker.upgrade` uses this module. The replaced functions are known by the SHA-256 of their syntax trees, so a
function that MLflow changes is not replaced. tests/schema/test_quick_migrations.py compares the rows.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

PAGE_ROWS = 2000
"""Number of rows per batch of a migration in `KNOWN_FUNCTIONS`; MLflow's own number is 250."""


def compare_keys_as_rows(connection: Any, statement: Any, *rest: Any) -> Any:
    """SQLAlchemy hook: replace `a > x OR a = x AND b > y` in a statement with the equivalent `(a, b) > (x, y)`.

    MLflow's migrations read large tables in pages, and use the form with OR to start a page after a given row. With OR,
    PostgreSQL reads all earlier pages too. With `(a, b) > (x, y)`, PostgreSQL finds a page's first row by an index.
    """
    sqlalchemy: Any = import_module("sqlalchemy")
    operators, elements = import_module("operator"), sqlalchemy.sql.elements

    def is_(expression: Any, operator: str) -> bool:
        return getattr(expression, "operator", None) is getattr(operators, operator)

    def replaced(element: Any, **_: Any) -> Any:
        if not (isinstance(element, elements.BooleanClauseList) and is_(element, "or_") and len(element.clauses) == 2):
            return None
        above, tie = (each.element if isinstance(each, elements.Grouping) else each for each in element.clauses)
        if not (isinstance(tie, elements.BooleanClauseList) and is_(tie, "and_") and len(tie.clauses) == 2):
            return None
        same, after = tie.clauses
        if not (is_(above, "gt") and is_(same, "eq") and is_(after, "gt") and above.left is same.left):
            return None
        if not all(isinstance(each.right, elements.BindParameter) for each in (above, same)):
            return None
        if above.right.effective_value != same.right.effective_value:
            return None
        return sqlalchemy.tuple_(above.left, after.left) > sqlalchemy.tuple_(above.right, after.right)

    if isinstance(statement, sqlalchemy.sql.Select) and statement.whereclause is not None:
        visitors = sqlalchemy.sql.visitors
        if any(replaced(each) is not None for each in visitors.iterate(statement.whereclause)):
            statement = visitors.replacement_traverse(statement, {}, replaced)
    return statement, *rest[:2]


def quicken(script: Any) -> None:
    """Replace the functions in `KNOWN_FUNCTIONS`. If MLflow has changed a function, that function is not replaced, and
    its migration keeps MLflow's batch size."""
    for revision, functions in KNOWN_FUNCTIONS.items():
        try:
            migration = script.get_revision(revision).module
        except Exception:  # this release of MLflow does not have the migration
            continue
        known = [name for name, known in functions.items() if digest(migration, name, *known.rests_on) in known.digests]
        for name in known:
            setattr(migration, name, partial(functions[name].replacement, migration, getattr(migration, name)))
        if known == list(functions):
            migration._BATCH_SIZE = PAGE_ROWS


def digest(migration: Any, *names: str) -> str:
    """Return the SHA-256 of the syntax trees of functions and of the values of constants. Return "" if a name is absent
    or a function has no Python source code."""
    found = []
    for name in names:
        value = getattr(migration, name, None)
        try:
            found.append(ast.unparse(ast.parse(inspect.getsource(value))) if callable(value) else repr(value))
        except (OSError, TypeError, SyntaxError):
            return ""
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def _delete_keys(migration: Any, _: Any, table: Any, keys: list[str] | None = None) -> None:
    """Delete the rows of `table` whose key is in `keys`. If `keys` is None, delete the rows with costs, because the
    migration has moved the costs to columns."""
    migration.op.get_bind().execute(table.delete().where(table.c.key.in_(keys or list(migration._COST_COLUMNS))))


@contextmanager
def _only_unusual(migration: Any, column: str, keys: tuple[str, ...]) -> Iterator[None]:
    """During the block, MLflow's query that selects `column` reads only rows that the table `backfill` contains and
    does not mark as usual."""
    sqlalchemy: Any = import_module("sqlalchemy")
    rows = sqlalchemy.table("backfill", *map(sqlalchemy.column, (*keys, "usual")))

    def restrict(_: Any, statement: Any, *rest: Any) -> Any:
        columns = getattr(statement, "selected_columns", {})
        if column in columns:
            wanted = sqlalchemy.select(*(rows.c[key] for key in keys)).where(rows.c.usual.is_(False))
            statement = statement.where(sqlalchemy.tuple_(*(columns[key] for key in keys)).in_(wanted))
        return statement, *rest[:2]

    bind = migration.op.get_bind()
    sqlalchemy.event.listen(bind, "before_execute", restrict, retval=True)
    try:
        yield
    finally:
        sqlalchemy.event.remove(bind, "before_execute", restrict)


def _fill_first(
    statements: tuple[str, str], column: str, keys: tuple[str, ...], migration: Any, backfill: Callable[[], None]
) -> None:
    """Fill the new columns of the rows with usual values by two statements, and call MLflow's backfill for the other
    rows. If PostgreSQL refuses a statement, call MLflow's backfill for all rows.

    The first statement creates the temporary table `backfill`, which has a row for each row that the migration may
    change: its keys, its values, and the column `usual`. The second statement updates the rows that are usual."""
    sqlalchemy: Any = import_module("sqlalchemy")
    bind = migration.op.get_bind()
    try:
        with bind.begin_nested():
            for statement in (*statements, "ANALYZE backfill"):
                bind.exec_driver_sql(statement)
    except sqlalchemy.exc.DBAPIError as error:
        print(f"MLflow fills all rows itself: {error.orig}", file=sys.stderr, flush=True)
        return backfill()
    with _only_unusual(migration, column, keys):
        backfill()
    bind.exec_driver_sql("DROP TABLE backfill")


def _join_keys(migration: Any, _: Any, span_metrics: Any, keys: list[Any], dialect: str) -> Any:
    """Return a query for the costs of the spans in `keys`. MLflow's own query uses IN with a list of pairs, for which
    PostgreSQL plans one index scan per pair."""
    query = """
        SELECT trace_id, span_id, key, value FROM span_metrics
        JOIN unnest(CAST(:traces AS text[]), CAST(:spans AS text[])) AS page (trace_id, span_id)
        USING (trace_id, span_id) WHERE key = ANY (:costs)
    """
    traces, spans = zip(*keys, strict=True)
    given = {"traces": [*traces], "spans": [*spans], "costs": [*migration._COST_COLUMNS]}
    return import_module("sqlalchemy").text(query).bindparams(**given)


def _update_at_once(_: Any, __: Any, bind: Any, statement: Any, updates: list[dict[str, Any]], kind: str) -> None:
    """Update all rows with one statement, UPDATE … FROM (VALUES …). MLflow executes `statement` once per row. In
    `statement`, a parameter of the WHERE clause has a name of its own; any other parameter has its column's name."""
    extras: Any = import_module("psycopg2.extras")
    quote, text = bind.dialect.identifier_preparer.quote, import_module("sqlalchemy").String
    where, table = statement.whereclause, quote(statement.table.name)
    keys = {each.right.key: each.left for each in getattr(where, "clauses", [where])}
    columns = [keys[name] if name in keys else statement.table.c[name] for name in updates[0]]
    # Text columns have no cast, because a cast to VARCHAR(n) would cut long values. NULL in other columns needs a cast.
    casts = ["%s" if isinstance(c.type, text) else f"CAST(%s AS {c.type.compile(bind.dialect)})" for c in columns]
    assigned = [f"{quote(name)} = given.{quote(name)}" for name in updates[0] if name not in keys]
    found = [f"{table}.{quote(c.name)} = given.{quote(c.name)}" for c in keys.values()]
    given = f"(VALUES %s) AS given ({', '.join(quote(c.name) for c in columns)})"
    sql = f"UPDATE {table} SET {', '.join(assigned)} FROM {given} WHERE {' AND '.join(found)}"
    rows = [[update[name] for name in updates[0]] for update in updates]
    with bind.connection.cursor() as cursor:
        extras.execute_values(cursor, sql, rows, f"({', '.join(casts)})", page_size=len(rows))
        if cursor.rowcount != len(rows):
            raise RuntimeError(f"Trace analytics {kind} backfill updated {cursor.rowcount} of {len(rows)} rows")


TOKENS = ("input_tokens", "output_tokens", "total_tokens", "cache_read_input_tokens", "cache_creation_input_tokens",
          "cache_creation_input_tokens_above_1hr")  # fmt: skip
COSTS = ("input_cost", "output_cost", "total_cost")
NUMBER = r"(0|[1-9][0-9]{0,14})"
TOKENS_JSON = rf'^\{{("[a-z0-9_]+": ?{NUMBER}(, ?"[a-z0-9_]+": ?{NUMBER})*)?\}}$'
COST = rf'"[a-z_]+": ?{NUMBER}(\.[0-9]{{1,20}})?([eE][+-]?[0-9]{{1,2}})?'
COSTS_JSON = rf"^\{{({COST}(, ?{COST})*)?\}}$"
DIMENSION = r'"mlflow\.llm\.(model|provider)": ?("[^"\\]*"|null)'
DIMENSIONS_JSON = rf"^\{{({DIMENSION}(, ?{DIMENSION})*)?\}}$"
"""Regular expressions of PostgreSQL for the JSON of usual values. PostgreSQL and Python parse this JSON alike, because
it has no escapes, no negative numbers, and only integers that a double stores exactly."""


def _each(pattern: str, names: Iterable[str]) -> str:
    return ", ".join(pattern.replace("?", name) for name in names)


TRACE_COLUMNS = ("trace_name", "session_id", *TOKENS, *COSTS)
SPAN_COLUMNS = (*COSTS, "model_name", "model_provider")
FILL_TRACES = (
    rf"""
    CREATE TEMPORARY TABLE backfill AS
    WITH grouped AS (
        SELECT request_id, max(value) FILTER (WHERE key = 'mlflow.trace.session') AS session_id,
            max(value) FILTER (WHERE key = 'mlflow.trace.tokenUsage') AS tokens,
            max(value) FILTER (WHERE key = 'mlflow.trace.cost') AS costs
        FROM trace_request_metadata
        WHERE key IN ('mlflow.trace.session', 'mlflow.trace.tokenUsage', 'mlflow.trace.cost') GROUP BY request_id
    ), stored AS MATERIALIZED (
        SELECT *, coalesce(tokens ~ '{TOKENS_JSON}', true) AS usual_tokens,
            coalesce(costs ~ '{COSTS_JSON}', true) AS usual_costs
        FROM grouped
    ), counted AS (
        SELECT request_id, bool_and(coalesce(value = trunc(value) AND abs(value) < 1e15, false)) AS whole,
            {_each("max(value) FILTER (WHERE key = '?') AS ?", TOKENS)}
        FROM trace_metrics WHERE key IN ({_each("'?'", TOKENS)}) GROUP BY request_id
    ), joined AS MATERIALIZED (
        SELECT t.request_id, n.value AS trace_name, s.session_id, {_each("c.? AS ?", TOKENS)},
            CASE WHEN s.usual_tokens THEN CAST(s.tokens AS jsonb) END AS tokens,
            CASE WHEN s.usual_costs THEN CAST(s.costs AS jsonb) END AS costs,
            coalesce(c.whole, true) AND coalesce(s.usual_tokens AND s.usual_costs, true)
                AND coalesce(char_length(n.value), 0) <= 4096 AND coalesce(char_length(s.session_id), 0) <= 250
                AND num_nonnulls({_each("t.?", TRACE_COLUMNS)}) = 0 AS usual
        FROM trace_info t
        LEFT JOIN trace_tags n ON n.request_id = t.request_id AND n.key = 'mlflow.traceName'
        LEFT JOIN stored s ON s.request_id = t.request_id LEFT JOIN counted c ON c.request_id = t.request_id
    )
    SELECT request_id, usual, trace_name, session_id,
        {_each("CASE WHEN usual THEN coalesce(CAST(? AS bigint), CAST(tokens->>'?' AS bigint)) END AS ?", TOKENS)},
        {_each("CAST(costs->>'?' AS double precision) AS ?", COSTS)}
    FROM joined
    """,
    f"""
    UPDATE trace_info SET {_each("? = backfill.?", TRACE_COLUMNS)} FROM backfill
    WHERE backfill.request_id = trace_info.request_id AND usual
        AND num_nonnulls({_each("backfill.?", TRACE_COLUMNS)}) > 0
    """,
)
FILL_SPANS = (
    rf"""
    CREATE TEMPORARY TABLE backfill AS
    WITH costs AS (
        SELECT trace_id, span_id, {_each("max(value) FILTER (WHERE key = '?') AS ?", COSTS)}
        FROM span_metrics WHERE key IN ({_each("'?'", COSTS)}) GROUP BY trace_id, span_id
    ), joined AS MATERIALIZED (
        SELECT s.trace_id, s.span_id, {_each("c.? AS ?", COSTS)}, s.dimension_attributes,
            coalesce(CAST(s.dimension_attributes AS text) ~ '{DIMENSIONS_JSON}', true) AS usual_dimensions,
            num_nonnulls({_each("s.?", SPAN_COLUMNS)}) = 0 AS empty
        FROM spans s LEFT JOIN costs c ON c.trace_id = s.trace_id AND c.span_id = s.span_id
        WHERE s.dimension_attributes IS NOT NULL OR c.trace_id IS NOT NULL
            OR num_nonnulls({_each("s.?", SPAN_COLUMNS)}) > 0
    ), parsed AS MATERIALIZED (
        SELECT *, CASE WHEN usual_dimensions THEN CAST(dimension_attributes AS jsonb) END AS dimensions FROM joined
    ), converted AS MATERIALIZED (
        SELECT trace_id, span_id, {_each("CASE WHEN abs(?) < 'Infinity' THEN ? + 0 END AS ?", COSTS)},
            dimensions->>'mlflow.llm.model' AS model_name, dimensions->>'mlflow.llm.provider' AS model_provider,
            usual_dimensions AND empty AS usual
        FROM parsed
    )
    SELECT trace_id, span_id, {_each("?", SPAN_COLUMNS)}, usual AND coalesce(char_length(model_name), 0) <= 500
        AND coalesce(char_length(model_provider), 0) <= 500 AS usual
    FROM converted
    """,
    f"""
    UPDATE spans SET {_each("? = backfill.?", SPAN_COLUMNS)} FROM backfill
    WHERE backfill.trace_id = spans.trace_id AND backfill.span_id = spans.span_id AND usual
        AND num_nonnulls({_each("backfill.?", SPAN_COLUMNS)}) > 0
    """,
)


@dataclass(frozen=True)
class Known:
    """A slow function of a migration. Each of the `digests` covers one release's source code of the function, and of
    the names that the replacement `rests_on`."""

    digests: tuple[str, ...]
    replacement: Callable[..., None]
    rests_on: tuple[str, ...] = ()


CONVERSIONS = ("trace_analytics_values", "_json_object", "_finite_float_or_none", "_token_count_or_none",
               "_bounded_string_or_none", "_TOKEN_COLUMNS", "_COST_COLUMNS")  # fmt: skip
KNOWN_FUNCTIONS: dict[str, dict[str, Known]] = {
    "75868b020152": {
        "_delete_trace_rows": Known(
            (
                "2db101a6b84bf1a56574e8da8335b880f08e460bf835956b26d292f8572491a4",
                "86bc19dd16474a5579a7901207675e667abf6bc200717a47c7fe849db72581a8",
            ),
            _delete_keys,
        ),
        "_delete_span_metric_rows": Known(
            (
                "c811548869bdf5c49dacd07a3458238eacf286524e2abf795d4f9a9ecb62503a",
                "25269a2f59ad14800d247d7798f38a96d08c05403423139fa8b2ebc492f225ed",
            ),
            _delete_keys,
        ),
        "_backfill_trace_analytics": Known(
            ("80e763082d48ade7e958f2fed2141f468281a6a95178d8bec85bbeadd85faabf",),
            partial(_fill_first, FILL_TRACES, "trace_name", ("request_id",)),
            (*CONVERSIONS, "TRACE_NAME_MAX_LENGTH", "SESSION_ID_MAX_LENGTH"),
        ),
        "_backfill_span_analytics": Known(
            (
                "60413b6dcaed8925661633eb81d53177da8f863a6974328fd07f9f5adc4b0f8f",
                "c517d41adcd5ca9bda4aba03e374ae3113f2806a82cb4776c57b7dadd8775459",
            ),
            partial(_fill_first, FILL_SPANS, "dimension_attributes", ("trace_id", "span_id")),
            (*CONVERSIONS, "_validated_dimension_attributes", "MODEL_DIMENSION_MAX_LENGTH"),
        ),
        "_span_metrics_for_keys_query": Known(
            ("45c2ff0244d0c0145c31307058cce353ae7b588418cd5112e5f178adf0b1e228",), _join_keys
        ),
        "_execute_backfill_updates": Known(
            ("aa4b2dfaa00d4d7bb0e54f0df0837225fcd814520cc96848e934e81856405e9f",), _update_at_once
        ),
    }
}
"""The slow functions by revision and name. MLflow's delete functions work in batches, and each batch reads again all
rows that earlier batches deleted. MLflow's backfills read all rows, convert each one in Python, and update one row per
statement."""
