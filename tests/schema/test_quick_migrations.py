"""For MLflow's migrations of large tables, our faster statements give the same rows as MLflow's own statements."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2.extras
import pytest
import sqlalchemy as sa

from mlflow_host.postgres.cluster import Cluster, connection, copy_database, create_empty, rows, run
from mlflow_host.schema import quick_migrations, release_worker
from scripts import drill, lock
from tests.schema import environments
from tests.schema.private_cluster import private_cluster

pytestmark = pytest.mark.service

BEFORE, AFTER = "b7e2c1a4d9f3", "75868b020152"
"""Revision AFTER moves MLflow's analytics data about traces to new columns. BEFORE is the revision that precedes
AFTER."""

FILL = """
INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage) VALUES (0, 'Default', 'x', 'active');
INSERT INTO trace_info (request_id, experiment_id, timestamp_ms, execution_time_ms, status)
SELECT 'tr-' || md5(n::text), 0, n, 100, 'OK' FROM generate_series(1, 700) n;
INSERT INTO trace_tags (key, value, request_id)
SELECT k, repeat(k || ' of ' || n, n % 3 * 8), 'tr-' || md5(n::text)
FROM generate_series(1, 700) n, unnest(array['mlflow.traceName', 'mlflow.artifactLocation']) k WHERE n % 7 > 0;
INSERT INTO trace_request_metadata (key, value, request_id)
SELECT k, CASE k WHEN 'mlflow.trace.session' THEN repeat('s' || n, n % 100)
    WHEN 'mlflow.trace.tokenUsage' THEN CASE n % 11 WHEN 0 THEN '{"input_tokens": ' || n || ', "output_tokens": 7}'
        WHEN 1 THEN '{"total_tokens": 12.5}' WHEN 2 THEN 'no JSON' WHEN 3 THEN '[]' WHEN 4 THEN '{"total_tokens": 007}'
        WHEN 5 THEN '{"output_tokens": 1,"output_tokens": 2}' WHEN 6 THEN '{"cache_read_input_tokens": 3, "other": 4}'
        WHEN 7 THEN '{"total_tokens": 9007199254740993}' WHEN 8 THEN '{"total_tokens": "8"}' WHEN 9 THEN '{}'
        ELSE '{"input_tokens": 123456789012345, "total_tokens":0}' END
    WHEN 'mlflow.trace.cost' THEN CASE n % 9 WHEN 0 THEN '{"total_cost": 0.25}' WHEN 1 THEN '{"total_cost": "x"}'
        WHEN 2 THEN '{"input_cost": NaN}' WHEN 3 THEN '{"input_cost": 3, "output_cost": 0.1,"total_cost":1e-05}'
        WHEN 4 THEN '{"total_cost": -0.0}' WHEN 5 THEN '{"total_cost": 12345678901234567890}'
        WHEN 6 THEN '{"total_cost": 0.30000000000000004}' WHEN 7 THEN '{"total_cost": 2.5E+22, "input_cost": 1e400}'
        ELSE '{"output_cost": 0.12345678901234567}' END ELSE 'x' END, 'tr-' || md5(n::text)
FROM generate_series(1, 700) n, unnest(array['mlflow.trace.session', 'mlflow.trace.tokenUsage', 'mlflow.trace.cost',
    'mlflow.gateway.endpointId']) k WHERE (n + length(k)) % 5 > 0;
INSERT INTO trace_metrics (request_id, key, value)
SELECT 'tr-' || md5(n::text), k,
    CASE n % 13 WHEN 0 THEN n + 0.5 WHEN 1 THEN 'NaN' WHEN 2 THEN 1e18 WHEN 3 THEN -9223372036854775808 ELSE n END
FROM generate_series(1, 700) n, unnest(array['input_tokens', 'mine']) k WHERE n % 2 > 0;
INSERT INTO spans (trace_id, experiment_id, span_id, name, type, status, start_time_unix_nano, end_time_unix_nano,
    content, dimension_attributes)
SELECT 'tr-' || md5(n::text), 0, lpad(to_hex(s), 16, '0'), 'span', 'LLM', 'OK', n, n + s, '{}',
    CASE s WHEN 1 THEN (array['{"mlflow.llm.model": "gpt", "mlflow.llm.provider": null}', '{"mlflow.llm.model":""}',
        '{"mlflow.llm.model": "a\\u0062\\"", "mlflow.llm.provider": "µ"}', '{ }', 'null'])[1 + n % 5]::json
        WHEN 2 THEN ('{"mlflow.llm.model": "' || repeat('m', 600) || '"}')::json END
FROM generate_series(1, 700) n, generate_series(1, 3) s;
INSERT INTO span_metrics (trace_id, span_id, key, value)
SELECT 'tr-' || md5(n::text), lpad(to_hex(s), 16, '0'), k, n / 7.0
FROM generate_series(1, 700) n, generate_series(1, 2) s, unnest(array['input_cost', 'total_cost', 'mine']) k
WHERE s < 2 OR n % 2 = 0
UNION ALL SELECT 'tr-' || md5(n::text), lpad(to_hex(2), 16, '0'), 'output_cost',
    (array['NaN', '-Infinity', -0.0])[1 + n % 3]
FROM generate_series(1, 300) n
UNION ALL SELECT 'tr-' || md5(n::text), lpad(to_hex(3), 16, '0'), k, n
FROM generate_series(1, 300) n, unnest(array['output_cost', 'mine']) k WHERE k = 'mine' OR n < 200;
INSERT INTO assessments (assessment_id, trace_id, name, assessment_type, value, created_timestamp,
    last_updated_timestamp, source_type, valid)
SELECT 'a-' || n, 'tr-' || md5(n::text), 'correct', 'feedback',
    (array['true', '0.5', '"yes"', '"other"', 'null'])[1 + n % 5], n, n, 'HUMAN', true FROM generate_series(1, 700) n;
"""

FIRST_TRACE = f"tr-{hashlib.md5(b'1', usedforsecurity=False).hexdigest()}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with private_cluster() as found:
        create_empty(found.cluster, "before")
        release_worker.create(found.cluster.uri("before"), BEFORE)
        with connection(found.cluster, "before") as opened:
            run(opened, FILL)
        yield found.cluster


def content(cluster: Cluster, database: str) -> dict[str, list[str]]:
    """Return the rows of each table as sorted text."""
    with connection(cluster, database) as opened:
        tables = [name for (name,) in rows(opened, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
        return {name: sorted(text for (text,) in rows(opened, f'SELECT t::text FROM "{name}" t')) for name in tables}


PREPOPULATED = """
UPDATE spans SET model_name = 'wrong', total_cost = 1 WHERE start_time_unix_nano % 2 = 0;
UPDATE spans SET output_cost = end_time_unix_nano WHERE end_time_unix_nano % 3 = 0;
"""
"""Fill the new columns before the migration, as MLflow's own utility does, but with wrong values."""


def upgraded(cluster: Cluster, name: str, filled_before: bool) -> dict[str, list[str]]:
    from mlflow.store.db.trace_analytics_schema_75868b020152 import analytics_columns_by_table

    copy_database(cluster, "before", name)
    if filled_before:
        dialect = sa.create_engine(cluster.uri(name)).dialect
        with connection(cluster, name) as opened:
            for column in analytics_columns_by_table()["spans"]:
                run(opened, f"ALTER TABLE spans ADD COLUMN {column.name} {column.type.compile(dialect)}")
            run(opened, PREPOPULATED)
    release_worker.upgrade(cluster.uri(name), AFTER)
    return content(cluster, name)


@pytest.mark.parametrize("filled_before", [False, True])
def test_the_result_is_that_of_mlflows_own_statements(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, filled_before: bool
) -> None:
    statements: list[str] = []
    seen: list[str] = []
    pages: list[int] = []
    trace_pages: list[int] = []
    joins: list[bool] = []

    def rewritten(connection: Any, statement: Any, *rest: Any) -> Any:
        found, *more = original(connection, statement, *rest)
        if found is not statement:
            statements.append(str(found))
        if isinstance(found, sa.Delete):
            seen.append(str(found.table))
        return found, *more

    def count(_: Any, cursor: Any, statement: str, *__: Any) -> None:
        if "spans.dimension_attributes, spans.input_cost" in statement:
            pages.append(cursor.rowcount)
        if "SELECT trace_info.request_id, trace_info.trace_name" in statement:
            trace_pages.append(cursor.rowcount)
        if "value" in statement and "FROM span_metrics" in statement and "TEMPORARY" not in statement:
            joins.append("JOIN unnest(" in statement)

    def update(cursor: Any, sql: str, *rest: Any, **options: Any) -> None:
        updated.append(sql.split()[1])
        execute_values(cursor, sql, *rest, **options)

    updated: list[str] = []
    execute_values = psycopg2.extras.execute_values
    original = quick_migrations.compare_keys_as_rows
    with monkeypatch.context() as patched:
        patched.setattr(psycopg2.extras, "execute_values", update)
        patched.setattr(quick_migrations, "PAGE_ROWS", 300)
        patched.setattr(quick_migrations, "compare_keys_as_rows", rewritten)
        sa.event.listen(sa.Engine, "after_cursor_execute", count)
        quick = upgraded(cluster, f"quick_{filled_before}", filled_before)
        sa.event.remove(sa.Engine, "after_cursor_execute", count)
    assert statements and all("(spans.trace_id, spans.span_id) > (" in each for each in statements)
    assert joins and all(joins)
    assert set(updated) == {"trace_info", "spans", "assessments"} and len(updated) > 6
    assert sorted(seen) == ["span_metrics", "trace_metrics", "trace_request_metadata", "trace_tags"]
    monkeypatch.setattr(quick_migrations, "compare_keys_as_rows", lambda connection, *given: given[:3])
    monkeypatch.setattr(quick_migrations, "quicken", lambda script: None)
    monkeypatch.setattr(release_worker, "_engine", lambda uri: sa.create_engine(uri, poolclass=sa.NullPool))
    plain = upgraded(cluster, f"plain_{filled_before}", filled_before)
    assert quick.keys() == plain.keys()
    assert [name for name in plain if plain[name] != quick[name]] == []
    assert len(plain["spans"]) == 2100
    assert 100 < sum(trace_pages) < 600, "the other traces have usual values, and one statement fills them"
    assert 700 < sum(pages) < (2100 if filled_before else 1700), "the other spans have usual values or no values"


UPGRADE = """
import sys
sys.path.insert(0, sys.argv[1])
import release_worker
quick = release_worker._quick_migrations()
if sys.argv[2] == "plain":
    quick.quicken = lambda script: None
    quick.compare_keys_as_rows = lambda connection, *given: given[:3]
quick.PAGE_ROWS = 300
release_worker.upgrade(*sys.argv[3:])
versions = release_worker.import_module("alembic.script").ScriptDirectory.from_config(
    release_worker.import_module("mlflow.store.db.utils")._get_alembic_config(sys.argv[3])
)
known = quick.KNOWN_FUNCTIONS[sys.argv[4]]
migration = versions.get_revision(sys.argv[4]).module
print([name for name in known if quick.digest(migration, name, *known[name].rests_on) not in known[name].digests])
"""


def test_the_image_s_release_has_known_functions_and_gives_the_same_rows(cluster: Cluster) -> None:
    python = environments.environment(lock.locked_version(drill.LOCKED, "mlflow"))
    found = {}
    for way in ("quick", "plain"):
        copy_database(cluster, "before", f"newest_{way}")
        folder = Path(release_worker.__file__).parent
        command = [str(python), "-W", "ignore", "-c", UPGRADE, str(folder), way, cluster.uri(f"newest_{way}"), AFTER]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]", "compare this release's functions, and add their digests"
        found[way] = content(cluster, f"newest_{way}")
    assert [name for name, rows in found["plain"].items() if rows != found["quick"][name]] == []


A: Any = sa.column("a")
B: Any = sa.column("b")
C: Any = sa.column("c")


@pytest.mark.parametrize(
    ("condition", "replaced"),
    [
        (sa.or_(A > 1, sa.and_(A == 1, B > 2)), True),
        (sa.or_(A > 1, sa.and_(A == 2, B > 2)), False),
        (sa.or_(A > 1, sa.and_(B == 1, A > 2)), False),
        (sa.or_(A > 1, sa.and_(A == 1, B < 2)), False),
        (sa.or_(A >= 1, sa.and_(A == 1, B > 2)), False),
        (sa.and_(A > 1, sa.or_(A == 1, B > 2)), False),
        (sa.or_(A > 1, sa.and_(A == 1, B > 2), B == 3), False),
        (sa.or_(A > 1, B > 2), False),
        (sa.or_(A > C, sa.and_(A == C, B > 2)), False),
    ],
)
def test_only_pages_by_a_key_of_two_columns_are_worded_differently(condition: Any, replaced: bool) -> None:
    statement = sa.select(A, B).where(condition)
    found, _, _ = quick_migrations.compare_keys_as_rows(None, statement, (), {}, {})
    text = str(found.compile(compile_kwargs={"literal_binds": True}))
    assert ("(a, b) > (1, 2)" in text) is replaced
    if not replaced:
        assert found.compare(statement)


def test_an_update_that_misses_a_row_raises_the_error_of_mlflow(cluster: Cluster) -> None:
    traces = sa.table("trace_info", sa.column("request_id", sa.String), sa.column("status", sa.String))
    statement = traces.update().where(traces.c.request_id == sa.bindparam("id")).values(status=sa.bindparam("status"))
    there, missing = ({"id": each, "status": "ERROR"} for each in (FIRST_TRACE, "tr-missing"))
    engine = sa.create_engine(cluster.uri("before"), poolclass=sa.NullPool)
    with engine.connect() as opened:
        quick_migrations._update_at_once(None, None, opened, statement, [there], "trace")
        with pytest.raises(RuntimeError, match="trace backfill updated 1 of 2 rows"):
            quick_migrations._update_at_once(None, None, opened, statement, [there, missing], "trace")
        opened.rollback()


def test_mlflow_fills_all_rows_if_postgresql_refuses_a_statement(cluster: Cluster) -> None:
    engine = sa.create_engine(cluster.uri("before"), poolclass=sa.NullPool)
    counted: list[Any] = []
    with engine.connect() as opened:
        migration = type("Migration", (), {"op": type("Op", (), {"get_bind": staticmethod(lambda: opened)})})
        spans: Any = sa.select(sa.column("status"), sa.column("request_id")).select_from(sa.table("trace_info"))

        def backfill() -> None:
            counted.append(len(opened.execute(spans).all()))

        usual = "CREATE TEMPORARY TABLE backfill AS SELECT request_id, status = 'OK' AS usual FROM trace_info"
        for first in ("SELECT 1 / 0", usual):
            quick_migrations._fill_first((first, "SELECT 1"), "status", ("request_id",), migration, backfill)
        opened.rollback()
    assert counted == [700, 0]


def test_a_function_that_mlflow_changed_stays() -> None:
    class Migration:
        _BATCH_SIZE = 250

        @staticmethod
        def _delete_trace_rows(table: Any, keys: list[str]) -> None:
            """Another one."""

    class Script:
        @staticmethod
        def get_revision(revision: str) -> Any:
            return type("Revision", (), {"module": Migration})

    before = Migration._delete_trace_rows
    quick_migrations.quicken(Script)
    assert Migration._delete_trace_rows is before and Migration._BATCH_SIZE == 250
