"""The floor: psycopg2 writes the same rows and boto3 transfers the same files, both without MLflow."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.load import Dataset, Measured
from tests.support.services import ObjectStore, PostgreSQL

INSERT_METRIC = "insert into metrics (key, value, timestamp, step, is_nan, run_uuid) values %s"
LATEST_METRIC = """
insert into latest_metrics (key, value, timestamp, step, is_nan, run_uuid) values %s
on conflict (key, run_uuid) do update
set value = excluded.value, timestamp = excluded.timestamp, step = excluded.step, is_nan = excluded.is_nan
"""
INSERT_RUN = """
insert into runs
(run_uuid, name, source_type, user_id, status, start_time, lifecycle_stage, artifact_uri, experiment_id)
values (%s, %s, 'UNKNOWN', 'ada', 'RUNNING', %s, 'active', %s, %s)
"""


def log_batch(count: int) -> Callable[[Any, Dataset, int, int], None]:
    def act(cursor: Any, data: Dataset, client: int, turn: int) -> None:
        from psycopg2.extras import execute_values

        run = data.runs[client % len(data.runs)]
        rows = [(f"m{n % 10}", n / 7, 1_700_000_000_000 + n, turn * count + n, False, run) for n in range(count)]
        execute_values(cursor, INSERT_METRIC, rows, page_size=1000)
        latest = {row[0]: row for row in rows}
        execute_values(cursor, LATEST_METRIC, [latest[key] for key in sorted(latest)])

    return act


def create_run(cursor: Any, data: Dataset, client: int, turn: int) -> None:
    run = f"{random.getrandbits(128):032x}"
    values = (
        run,
        f"run-{client}-{turn}",
        1_700_000_000_000 + turn,
        f"mlflow-artifacts:/bench/{run}",
        data.empty_experiment,
    )
    cursor.execute(INSERT_RUN, values)
    tags = "insert into tags (key, value, run_uuid) values ('mlflow.user', 'ada', %s), ('mlflow.source.name', 'x', %s)"
    cursor.execute(tags, (run, run))


OPERATIONS: dict[str, Callable[[Any, Dataset, int, int], None]] = {
    "log-batch, 1 metric": log_batch(1),
    "log-batch, 100 metrics": log_batch(100),
    "log-batch, 1,000 metrics": log_batch(1000),
    "log-metric": log_batch(1),
    "create run": create_run,
}


def run(cluster: PostgreSQL, operation: str, data: Dataset, clients: int, seconds: float) -> Measured:
    """Run one transaction per request, with one connection per client."""
    import psycopg2

    measured, deadline = Measured(seconds), time.monotonic() + seconds

    def client(number: int) -> None:
        connection = psycopg2.connect(host=str(cluster.sockets), port=cluster.port, user=cluster.user, dbname="mlflow")
        with connection.cursor() as cursor:
            for turn in itertools.count(random.randrange(10**9)):
                if (started := time.monotonic()) > deadline:
                    break
                OPERATIONS[operation](cursor, data, number, turn)
                connection.commit()
                measured.latencies.append(time.monotonic() - started)
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return measured


def transfer(store: ObjectStore, files: list[Path], folder: Path) -> tuple[float, float]:
    """Return the seconds to upload `files` to a new bucket, and the seconds to download them to `folder`."""
    bucket, client = f"floor-{random.getrandbits(32):08x}", store.client()
    client.create_bucket(Bucket=bucket)
    started = time.monotonic()
    for file in files:
        client.upload_file(str(file), bucket, file.name)
    uploaded = time.monotonic()
    os.sync()
    begun = time.monotonic()
    for file in files:
        client.download_file(bucket, file.name, str(folder / file.name))
    return uploaded - started, time.monotonic() - begun
