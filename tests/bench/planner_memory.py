"""Benchmark: memory of PostgreSQL's planner for MLflow's run search, by number of conditions and join_collapse_limit.

    .venv/bin/python -m tests.bench.planner_memory [--conditions 10 30 50] [--limits 4 8]

The measured value is the peak of the backend's private memory (RssAnon, MB) during MLflow's query on 1,000 runs.
PostgreSQL's default of join_collapse_limit is 8, and the image sets 4 (postgresql.conf.j2). Prints a table as JSON on
stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from pathlib import Path
from typing import Any

from mlflow_host.postgres.cluster import command, connection, create_empty, rows, run
from mlflow_host.schema import release_worker
from scripts.interrupts import exit_with
from tests.schema.private_cluster import private_cluster

FILL = """
INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (0, 'Default', 'active');
INSERT INTO runs (run_uuid, name, user_id, start_time, lifecycle_stage, artifact_uri, experiment_id, status)
SELECT lpad(n::text, 32, '0'), 'run', 'ada', n, 'active', 'x', 0, 'FINISHED' FROM generate_series(1, 1000) n;
INSERT INTO latest_metrics (run_uuid, key, value, timestamp, step, is_nan)
SELECT lpad(n::text, 32, '0'), 'm' || m, n * m / 7.0, n, m, false
FROM generate_series(1, 1000) n, generate_series(1, 60) m;
ANALYZE;
"""
BACKENDS = "SELECT pid FROM pg_stat_activity WHERE datname = 'mlflow' AND pid <> pg_backend_pid()"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conditions", type=int, nargs="+", default=[10, 30, 50])
    parser.add_argument("--limits", type=int, nargs="+", default=[4, 8])
    options = parser.parse_args()
    found: dict[str, dict[str, int]] = {}
    with private_cluster() as private:
        cluster = private.cluster
        create_empty(cluster, "mlflow")
        release_worker.create(cluster.uri("mlflow"), release_worker.head())
        with connection(cluster, "mlflow") as opened:
            run(opened, FILL)
        for limit in options.limits:
            command(cluster, f"ALTER DATABASE {{}} SET join_collapse_limit = {limit}", "mlflow")
            for conditions in options.conditions:
                peak = searched(cluster, conditions)
                found.setdefault(f"join_collapse_limit {limit}", {})[f"{conditions} conditions"] = peak
                say(f"limit {limit}, {conditions} conditions: {peak} MB")
    print(json.dumps(found))
    return 0


def searched(cluster: Any, conditions: int) -> int:
    """Return the peak memory of the PostgreSQL backend in MB during a search on a new connection."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store: Any = SqlAlchemyStore(cluster.uri("mlflow"), "x")  # type: ignore[no-untyped-call]
    store.engine.dispose()
    ended, peak = threading.Event(), 0

    def watch() -> None:
        nonlocal peak
        with connection(cluster, "mlflow", autocommit=True) as opened:
            while not ended.wait(0.02):
                peak = max([peak, *(own_memory(pid) for (pid,) in rows(opened, BACKENDS))])

    watcher = threading.Thread(target=watch)
    watcher.start()
    store.search_runs(["0"], " and ".join(f"metrics.m{n} > -{n}" for n in range(1, conditions + 1)), 1, 10)
    ended.set()
    watcher.join()
    store.engine.dispose()
    return peak


def own_memory(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("RssAnon")), 0)


def say(text: str) -> None:
    print(f"planner_memory: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_with(main, say)
