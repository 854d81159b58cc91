"""The initial data of every contender's database. SQL inserts this data in seconds; MLflow would need an hour."""

from __future__ import annotations

from tests.bench.load import Dataset
from tests.support.services import PostgreSQL

RUNS = {"empty_experiment": 0, "small_experiment": 1_000, "large_experiment": 20_000}
METRICS, PARAMS, TAGS = 8, 6, 4
HISTORY_STEPS = 10_000


def seed(cluster: PostgreSQL, database: str) -> Dataset:
    """Fill a database that has MLflow's tables. The data consists of three experiments, their runs, and one metric with
    a long history. The runs have metrics, params and tags like the runs of a training script."""

    def execute(statement: str) -> None:
        cluster.execute(statement, database)

    ids: dict[str, str] = {}
    for name, count in RUNS.items():
        (row,) = cluster.execute(
            "insert into experiments (name, artifact_location, lifecycle_stage, creation_time, last_update_time) "
            f"values ('{name}', 'mlflow-artifacts:/bench', 'active', 1700000000000, 1700000000000) "
            "returning experiment_id",
            database,
        )
        ids[name] = str(row[0])
        execute(
            "insert into runs (run_uuid, name, source_type, user_id, status, start_time, end_time, lifecycle_stage, "
            "artifact_uri, experiment_id) "
            f"select md5('{name}' || n), 'run-' || n, 'LOCAL', 'ada', 'FINISHED', 1700000000000 + n, "
            f"1700000100000 + n, 'active', 'mlflow-artifacts:/bench/' || md5('{name}' || n) || '/artifacts', "
            f"{ids[name]} from generate_series(1, {count}) n"
        )
        of_these = f"from runs r, generate_series(1, %s) k where r.experiment_id = {ids[name]}"
        execute(
            "insert into latest_metrics (key, value, timestamp, step, is_nan, run_uuid) "
            "select 'm' || k, random(), 1700000000000, 100, false, r.run_uuid " + of_these % METRICS
        )
        execute(
            "insert into metrics (key, value, timestamp, step, is_nan, run_uuid) "
            "select 'm' || k, random(), 1700000000000, 100, false, r.run_uuid " + of_these % METRICS
        )
        execute(
            "insert into params (key, value, run_uuid) select 'p' || k, 'value ' || k, r.run_uuid " + of_these % PARAMS
        )
        execute("insert into tags (key, value, run_uuid) select 't' || k, 'tag ' || k, r.run_uuid " + of_these % TAGS)
    runs = [
        str(row[0])
        for row in cluster.execute(
            f"select run_uuid from runs where experiment_id = {ids['small_experiment']}", database
        )
    ]
    execute(
        "insert into metrics (key, value, timestamp, step, is_nan, run_uuid) "
        f"select 'loss', random(), 1700000000000 + n, n, false, '{runs[0]}' from generate_series(1, {HISTORY_STEPS}) n"
    )
    execute("vacuum analyze")
    return Dataset(**ids, runs=tuple(runs[1:129]), history_run=runs[0])
