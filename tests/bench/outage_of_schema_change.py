"""Benchmark: the outage of a rollback and of an upgrade with a large database.

    .venv/bin/python -m tests.bench.outage_of_schema_change
        newest release to 3.12.0 and back, 10,000 runs and 1,000,000 metric rows, on machines of the local cloud
    .venv/bin/python -m tests.bench.outage_of_schema_change --newer ami-… --older ami-… --runs 1000 --metrics 100000
    .venv/bin/python -m tests.bench.outage_of_schema_change --traces 200000
        also with traces of five spans, for MLflow 3.17 and newer
    .venv/bin/python -m tests.bench.outage_of_schema_change --traces 200000 --upgrade-only
        from 3.12.0 to the newest release

The outage lasts from the old machine's last response with status 200 to the new machine's first response with status
200. The script sends ten authenticated HTTPS requests per second. The baseline is `pg_dump | pg_restore` of the same
database, in custom format without compression, through a pipe into an empty database. The baseline is timed on the
first machine. Rates are in rows per second, and count the rows of the tables in `COUNTED`. The
script prints JSON on stdout and progress on stderr. At the end, it removes the server and its data, and keeps the baked
images.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from typing import Any

from scripts import (
    drill,
    lock,
)
from scripts.interrupts import exit_with
from scripts.local_cloud import LocalCloud, LocalCloudError
from scripts.rehearsal import stack
from scripts.rehearsal.errors import RehearsalError
from tests.bench import trace_upgrade
from tests.bench.carry_rate import FILL

AS_POSTGRES = ("runuser", "-u", "postgres", "--")
PSQL = (*AS_POSTGRES, "psql", "--host=/run/postgresql", "--no-psqlrc", "--quiet", "--tuples-only", "--no-align")
COUNTED = ("runs", "metrics", "latest_metrics", "params", "tags", "trace_info", "spans")
FILL_TRACES = """
INSERT INTO trace_info (request_id, experiment_id, timestamp_ms, execution_time_ms, status, request_preview,
    trace_name, session_id, input_tokens, output_tokens, total_tokens, input_cost, output_cost, total_cost)
SELECT 'tr-' || md5(n::text), 0, 1700000000000 + n, 100, 'OK', 'question ' || n, 'predict', 'session-' || n %% 1000,
    10, n %% 100, 10 + n %% 100, 0.01, 0.02, 0.03
FROM generate_series(1, %(traces)s) n;
INSERT INTO trace_tags (key, value, request_id)
SELECT 'mlflow.artifactLocation', 'mlflow-artifacts:/0/traces/' || n, 'tr-' || md5(n::text)
FROM generate_series(1, %(traces)s) n;
INSERT INTO spans (trace_id, experiment_id, span_id, name, type, status, start_time_unix_nano, end_time_unix_nano,
    content, model_name, model_provider, input_cost, output_cost, total_cost)
SELECT 'tr-' || md5(n::text), 0, lpad(to_hex(s), 16, '0'), 'span ' || s, 'LLM', 'OK', n, n + 5,
    repeat('{"a": "content of a span ' || n || '"}', 15), CASE s WHEN 1 THEN 'gpt-4o' END,
    CASE s WHEN 1 THEN 'openai' END, CASE s WHEN 1 THEN 0.01 END, CASE s WHEN 1 THEN 0.02 END,
    CASE s WHEN 1 THEN 0.03 END
FROM generate_series(1, %(traces)s) n, generate_series(1, 5) s;
"""
"""SQL that writes traces with five spans each. One of the five spans has a model and costs."""
DUMP_AND_RESTORE = (
    "set -eo pipefail; cd /; as='runuser -u postgres --'; at=--host=/run/postgresql; "
    "$as createdb $at restored; "
    "$as pg_dump $at --format=custom --compress=0 mlflow | $as pg_restore $at --dbname=restored; "
    "$as dropdb $at restored"
)


def main() -> int:
    options = arguments()
    os.environ[stack.NAMED_BY] = drill.STACK
    try:
        with drill.alone(), drill.local_cloud(keep=False) as cloud:
            newer, older = (drill.find_image(each, options.base) for each in (options.newer, options.older))
            print(json.dumps(measure(cloud, newer, older, options), indent=2))
    except drill.DrillFailed as failed:
        drill.say(str(failed))
        return failed.status
    return 0


def measure(cloud: LocalCloud, newer: str, older: str, options: argparse.Namespace) -> dict[str, Any]:
    server, _ = drill.launch(older if options.upgrade_only else newer, {})
    instance = server["instance_id"]
    drill.say(f"writing {options.runs:,} runs, {options.metrics:,} metric rows and {options.traces:,} traces")
    fill = FILL % {"runs": options.runs, "metrics": options.metrics}
    if options.traces and options.upgrade_only:
        fill += trace_upgrade.FILL.format(traces=options.traces)
    elif options.traces:
        fill += FILL_TRACES % {"traces": options.traces}
    query(cloud, instance, f"{fill}; VACUUM ANALYZE; CHECKPOINT")
    before = counts(cloud, instance)
    started = time.monotonic()
    run(cloud, instance, ["bash", "-c", DUMP_AND_RESTORE])
    baseline = time.monotonic() - started
    query(cloud, instance, "CHECKPOINT")
    drill.say(f"pg_dump | pg_restore: {baseline:.1f} s")
    moves = []
    for ami in (newer,) if options.upgrade_only else (older, newer):
        server, outage = drill.launch(ami, server)
        instance = server["instance_id"]
        after = counts(cloud, instance)
        if after != before:
            raise drill.DrillFailed(f"rows before {before}, after {after}: some were lost")
        moves.append(
            {
                "to": server["mlflow_version"],
                "outage_seconds": outage,
                "database": drill.database_step_message(cloud, instance),
                "step_seconds": step_seconds(cloud, instance),
            }
        )
        drill.say(f"{moves[-1]['database']}: outage of {outage} s")
    rows = sum(before.values())
    return {
        "rows": rows,
        "dump_restore_seconds": round(baseline, 1),
        "dump_restore_rows_per_second": round(rows / baseline),
        "moves": moves,
        "rate_ratio_of_first_move": round(baseline / moves[0]["step_seconds"], 2),
    }


def counts(cloud: LocalCloud, instance: str) -> dict[str, int]:
    columns = ", ".join(f"(SELECT count(*) FROM {table})" for table in COUNTED)
    found = query(cloud, instance, f"SELECT {columns}").strip().split("|")
    return dict(zip(COUNTED, map(int, found), strict=True))


def step_seconds(cloud: LocalCloud, instance: str) -> float:
    """Return the duration of the database step in seconds. The step includes the start of MLflow, the schema, the copy,
    the verification and the flip."""
    shown = ["systemctl", "show", "mlflow-host-database", "--property=ExecMainStartTimestampMonotonic"]
    began = int(run(cloud, instance, shown).strip().split("=")[1])
    shown[-1] = "--property=ExecMainExitTimestampMonotonic"
    ended = int(run(cloud, instance, shown).strip().split("=")[1])
    return round((ended - began) / 1e6, 1)


def query(cloud: LocalCloud, instance: str, text: str) -> str:
    return run(cloud, instance, [*PSQL, "--set=ON_ERROR_STOP=1", "--dbname=mlflow"], input=text)


def run(cloud: LocalCloud, instance: str, command: Sequence[str], input: str | None = None) -> str:
    done = cloud.exec(instance, command, input=input, timeout=600)
    if done.returncode:
        raise drill.DrillFailed(f"{command[0]} failed on the machine: {done.stderr.strip()}")
    return str(done.stdout)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.outage_of_schema_change",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    newest = lock.locked_version(drill.LOCKED, "mlflow")
    parser.add_argument("--newer", type=drill.image_argument, default=newest, help="an image or a release (newest)")
    parser.add_argument("--older", type=drill.image_argument, default="3.12.0", help="an image or a release (3.12.0)")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--metrics", type=int, default=1_000_000)
    parser.add_argument("--traces", type=int, default=0)
    parser.add_argument("--upgrade-only", action="store_true", help="launch and fill the older image, and upgrade once")
    parser.add_argument("--base", default="debian12", help="source image of baked images (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    exit_with(main, drill.say, (RehearsalError, LocalCloudError))
