"""Benchmark: rows per second of a carry back, compared with `pg_dump | pg_restore` of the same data.

    .venv/bin/python -m tests.bench.carry_rate                 10,000 runs and 1,000,000 metric rows, from the
                                                               second-newest release to the third-newest, on a
                                                               temporary cluster
    .venv/bin/python -m tests.bench.carry_rate --runs 1000 --metrics 100000 --rounds 1

The carry back and `pg_dump | pg_restore` are timed alternately in each round. The machine may be busy, so trust the
ratio. `pg_dump | pg_restore` uses the custom format without compression, through a pipe into an empty database.
`step_seconds`, the time of the database step, includes MLflow's start, the older schema, verification and the flip.
`copy_seconds` is the time of the steps that `pg_dump | pg_restore` also performs: rows, indexes, constraints, foreign
keys. Prints JSON on stdout and progress on stderr.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_host.boot import database
from mlflow_host.postgres import ownership
from mlflow_host.postgres.cluster import Cluster, command, connection, create_empty, drop, rows, run
from mlflow_host.schema import state
from mlflow_host.schema.copying import carry
from mlflow_host.schema.release import ImageSchema, release
from tests.schema.environments import image, releases
from tests.schema.private_cluster import private_cluster

FILL = """
INSERT INTO runs (run_uuid, name, source_type, source_name, entry_point_name, user_id, status, start_time, end_time,
                  lifecycle_stage, artifact_uri, experiment_id)
SELECT md5('run' || n), 'run ' || n, 'LOCAL', 'train.py', '', 'someone', 'FINISHED', 1700000000000 + n,
       1700000001000 + n, 'active', 'mlflow-artifacts:/0/' || md5('run' || n) || '/artifacts', 0
FROM generate_series(1, %(runs)s) AS n;
INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan)
SELECT 'metric ' || (n / %(runs)s %% 5), random(), 1700000000000 + n, md5('run' || (1 + n %% %(runs)s)),
       n / %(runs)s, false
FROM generate_series(0, %(metrics)s - 1) AS n;
INSERT INTO latest_metrics (key, value, timestamp, step, is_nan, run_uuid)
SELECT DISTINCT ON (run_uuid, key) key, value, timestamp, step, is_nan, run_uuid FROM metrics
ORDER BY run_uuid, key, step DESC, timestamp DESC;
INSERT INTO params (key, value, run_uuid)
SELECT 'param ' || p, 'value ' || (n * p), md5('run' || n)
FROM generate_series(1, %(runs)s) AS n, generate_series(1, 5) AS p;
INSERT INTO tags (key, value, run_uuid)
SELECT 'tag ' || t, 'value ' || (n * t), md5('run' || n)
FROM generate_series(1, %(runs)s) AS n, generate_series(1, 3) AS t;
"""


@dataclass(frozen=True)
class Round:
    step_seconds: float
    copy_seconds: float
    dump_restore_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--metrics", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--newer", default=releases()[-2])
    parser.add_argument("--older", default=releases()[-3])
    print(json.dumps(measure(parser.parse_args()), indent=2))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    newer, older = image(arguments.newer), image(arguments.older)
    with private_cluster() as server, tempfile.TemporaryDirectory() as folder:
        cluster = server.cluster
        reports = Path(folder)
        say(f"filling a database of MLflow {arguments.newer}")
        database.bring(state.ChangeSettings(cluster, newer, reports, dump=None), say)
        total = fill(cluster, arguments.runs, arguments.metrics)
        command(cluster, "ALTER DATABASE {} RENAME TO {}", cluster.database, "filled")
        rounds = [one_round(cluster, newer, older, reports) for _ in range(arguments.rounds)]
    copy = statistics.median(entry.copy_seconds for entry in rounds)
    restore = statistics.median(entry.dump_restore_seconds for entry in rounds)
    return {
        "rows": total,
        "newer": arguments.newer,
        "older": arguments.older,
        "step_seconds": statistics.median(entry.step_seconds for entry in rounds),
        "copy_seconds": copy,
        "dump_restore_seconds": restore,
        "copy_rows_per_second": round(total / copy),
        "dump_restore_rows_per_second": round(total / restore),
        "ratio": round(statistics.median(entry.dump_restore_seconds / entry.copy_seconds for entry in rounds), 2),
        "rounds": [entry.__dict__ for entry in rounds],
    }


def fill(cluster: Cluster, runs: int, metrics: int) -> int:
    with connection(cluster, cluster.database) as opened:
        run(opened, FILL, {"runs": runs, "metrics": metrics})
    with connection(cluster, cluster.database, autocommit=True) as opened:
        run(opened, "VACUUM ANALYZE")
        tables = [name for (name,) in rows(opened, "SELECT relname FROM pg_stat_user_tables")]
        return sum(rows(opened, f'SELECT count(*) FROM "{table}"')[0][0] for table in tables)


def one_round(cluster: Cluster, newer: ImageSchema, older: ImageSchema, reports: Path) -> Round:
    with connection(cluster, autocommit=True) as opened:
        run(opened, "CHECKPOINT")
    restore = timed(lambda: dump_and_restore(cluster))
    say(f"pg_dump | pg_restore: {restore:.1f} s")
    with release(cluster, older) as mlflow:
        create_empty(cluster, "target")
        mlflow.create("target", older.head)
    copied = timed(lambda: carry(cluster, "filled", "target"))
    say(f"copy: {copied:.1f} s")
    drop(cluster, "target")
    whole = timed(lambda: whole_step(cluster, newer, older, reports))
    say(f"whole step: {whole:.1f} s")
    return Round(round(whole, 2), round(copied, 2), round(restore, 2))


def dump_and_restore(cluster: Cluster) -> None:
    create_empty(cluster, "restored")
    place = ["--host", cluster.host, "--port", str(cluster.port), "--username", cluster.user]
    dump = subprocess.Popen(
        [cluster.program("pg_dump"), "--format=custom", "--compress=0", *place, "filled"], stdout=subprocess.PIPE
    )
    subprocess.run([cluster.program("pg_restore"), *place, "--dbname=restored"], stdin=dump.stdout, check=True)
    assert dump.wait() == 0
    drop(cluster, "restored")


def whole_step(cluster: Cluster, newer: ImageSchema, older: ImageSchema, reports: Path) -> None:
    command(cluster, "ALTER DATABASE {} RENAME TO {}", "filled", cluster.database)
    with connection(cluster) as opened:
        ownership.write(
            opened, cluster.database, ownership.OwnershipRecord(newer.head, newer.count, newer.mlflow_version)
        )
    database.bring(state.ChangeSettings(cluster, older, reports, dump=None), say)
    drop(cluster, cluster.database)
    kept = next(name for (name,) in _names(cluster) if name.startswith(f"{cluster.database}_kept_"))
    command(cluster, "ALTER DATABASE {} RESET ALL", kept)
    command(cluster, "ALTER DATABASE {} RENAME TO {}", kept, "filled")


def _names(cluster: Cluster) -> list[tuple[Any, ...]]:
    with connection(cluster) as opened:
        return rows(opened, "SELECT datname FROM pg_database")


def timed(work: Any) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def say(message: str) -> None:
    print(f"carry_rate: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
