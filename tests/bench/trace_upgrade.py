"""Benchmark: migrate a database with many traces to MLflow 3.17, with this project's statements and with MLflow's
statements.

    .venv/bin/python -m tests.bench.trace_upgrade [--traces 10000] [--without-baseline]

Each trace has five spans, a name, a session, tokens and costs. The baseline is the same migration with MLflow's own
statements. The duration of the baseline grows with the square of the number of traces. Prints JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import sqlalchemy

from mlflow_host.postgres.cluster import connection, copy_database, create_empty, run
from mlflow_host.schema import release_worker
from scripts.interrupts import exit_with
from tests.schema.private_cluster import private_cluster

BEFORE, AFTER = "b7e2c1a4d9f3", "75868b020152"
"""AFTER is the migration that moves the analytics of traces to columns. BEFORE is the migration before AFTER."""

EXPERIMENT = """
INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage) VALUES (0, 'Default', 'x', 'active');
"""
FILL = """
INSERT INTO trace_info (request_id, experiment_id, timestamp_ms, execution_time_ms, status, request_preview)
SELECT 'tr-' || md5(n::text), 0, 1700000000000 + n, 100, 'OK', 'question ' || n FROM generate_series(1, {traces}) n;
INSERT INTO trace_tags (key, value, request_id)
SELECT k, 'predict', 'tr-' || md5(n::text)
FROM generate_series(1, {traces}) n, unnest(array['mlflow.traceName', 'mlflow.artifactLocation']) k;
INSERT INTO trace_request_metadata (key, value, request_id)
SELECT k, CASE k WHEN 'mlflow.trace.session' THEN 'session-' || n % 1000
    WHEN 'mlflow.trace.tokenUsage' THEN '{{"input_tokens": 10, "output_tokens": ' || n % 100 || '}}'
    ELSE '{{"input_cost": 0.01, "output_cost": 0.02, "total_cost": 0.03}}' END, 'tr-' || md5(n::text)
FROM generate_series(1, {traces}) n,
    unnest(array['mlflow.trace.session', 'mlflow.trace.tokenUsage', 'mlflow.trace.cost']) k;
INSERT INTO trace_metrics (request_id, key, value)
SELECT 'tr-' || md5(n::text), k, 10
FROM generate_series(1, {traces}) n, unnest(array['input_tokens', 'output_tokens', 'total_tokens']) k;
INSERT INTO spans (trace_id, experiment_id, span_id, name, type, status, start_time_unix_nano, end_time_unix_nano,
    content, dimension_attributes)
SELECT 'tr-' || md5(n::text), 0, lpad(to_hex(s), 16, '0'), 'span ' || s, 'LLM', 'OK', n, n + 5,
    repeat('{{"a": "content of a span ' || n || '"}}', 15),
    CASE WHEN s = 1 THEN '{{"mlflow.llm.model": "gpt-4o", "mlflow.llm.provider": "openai"}}'::json END
FROM generate_series(1, {traces}) n, generate_series(1, 5) s;
INSERT INTO span_metrics (trace_id, span_id, key, value)
SELECT 'tr-' || md5(n::text), lpad(to_hex(1), 16, '0'), k, 0.01
FROM generate_series(1, {traces}) n, unnest(array['input_cost', 'output_cost', 'total_cost']) k;
ANALYZE;
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=10_000)
    parser.add_argument("--without-baseline", action="store_true", help="measure ours only, for many traces")
    options = parser.parse_args()
    with private_cluster() as found:
        cluster = found.cluster
        say(f"writing {options.traces:,} traces with {5 * options.traces:,} spans")
        create_empty(cluster, "before")
        release_worker.create(cluster.uri("before"), BEFORE)
        with connection(cluster, "before") as opened:
            run(opened, EXPERIMENT + FILL.format(traces=options.traces))
        seconds = {}
        for name in ("ours",) if options.without_baseline else ("ours", "mlflow"):
            copy_database(cluster, "before", name)
            say(f"migrating with the statements of {'this project' if name == 'ours' else 'MLflow'}")
            begun = time.monotonic()
            if name == "ours":
                release_worker.upgrade(cluster.uri(name), AFTER)
            else:
                plain(cluster.uri(name))
            seconds[name] = round(time.monotonic() - begun, 1)
    ratio = {"ratio": round(seconds["mlflow"] / seconds["ours"], 1)} if "mlflow" in seconds else {}
    print(json.dumps({"traces": options.traces, "seconds": seconds, **ratio}))
    return 0


def plain(uri: str) -> None:
    """Run the migration like `mlflow db upgrade`."""
    from alembic import command
    from mlflow.store.db import utils

    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool)
    config = utils._get_alembic_config(uri)  # type: ignore[no-untyped-call]
    with engine.begin() as opened:
        config.attributes["connection"] = opened
        command.upgrade(config, AFTER)


def say(text: str) -> None:
    print(f"trace_upgrade: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_with(main, say)
