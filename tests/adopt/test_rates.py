"""How long an adoption of 1,000,000 metric rows and 5,000 artifacts takes, as ratios of `pg_dump | pg_restore` and of
copying the objects from bucket to bucket. The two sides are measured on the same machine; trust the ratios only."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mlflow_host.postgres.cluster import copy_database, drop
from tests.adopt.conftest import EMPTY, Stack
from tests.adopt.test_adopt import Reported, reported  # noqa: F401
from tests.bench.carry_rate import dump_and_restore, fill, timed

pytestmark = [pytest.mark.service, pytest.mark.slow]
RUNS, METRICS, ARTIFACTS = 10_000, 1_000_000, 5_000
REQUESTS = 10
"""Objects that `aws s3 cp` copies at the same time."""
MOST_FOR_ROWS, MOST_FOR_ARTIFACTS = 30, 4
"""The ratios may vary with the machine; these bounds catch a step that has become many times slower."""


@pytest.fixture
def filled(stack: Stack) -> Iterator[str]:
    """The bucket with the artifacts of the database `filled`."""
    copy_database(stack.cluster, EMPTY, "filled")
    fill(dataclasses.replace(stack.cluster, database="filled"), RUNS, METRICS)
    bucket, s3 = "filled", stack.target.s3
    s3.create_bucket(Bucket=bucket)
    names = stack.sql("SELECT json_agg(run_uuid) FROM (SELECT run_uuid FROM runs LIMIT 1000) r", "filled")
    keys = [f"0/{run}/artifacts/{number}.bin" for run in names for number in range(ARTIFACTS // len(names))]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: s3.put_object(Bucket=bucket, Key=key, Body=key.encode() * 200), keys))
    yield bucket
    drop(stack.cluster, "filled")


def copy_plainly(s3: Any, source: str, target: str) -> None:
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=source)
    keys = [each["Key"] for page in pages for each in page["Contents"]]
    assert len(keys) == ARTIFACTS
    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(lambda key: s3.copy({"Bucket": source, "Key": key}, target, key), keys))


def test_rates_of_rows_and_artifacts(stack: Stack, reported: Reported, filled: str) -> None:  # noqa: F811
    s3 = stack.target.s3
    s3.create_bucket(Bucket="plain")
    restored = timed(lambda: dump_and_restore(stack.cluster))
    copied = timed(lambda: copy_plainly(s3, filled, "plain"))
    source = f"postgresql://{stack.cluster.user}@/filled?host={stack.cluster.host}&port={stack.cluster.port}"
    begun = time.monotonic()
    status, report = reported(source, "--artifacts", f"s3://{filled}")
    whole = time.monotonic() - begun
    assert (report["lost"], status) == (0, 0)
    seconds = report["seconds"]
    rows = seconds["prepare"] + seconds["load"]
    result = {
        "pg_dump | pg_restore": restored,
        "rows": rows,
        "rows, ratio": rows / restored,
        "bucket to bucket": copied,
        "artifacts": seconds["artifacts"],
        "artifacts, ratio": seconds["artifacts"] / copied,
        "all, with reading everything back": whole,
        "all, ratio": whole / (restored + copied),
    }
    print(json.dumps({name: round(value, 1) for name, value in result.items()}, indent=2), file=sys.stderr)
    assert rows < MOST_FOR_ROWS * restored
    assert seconds["artifacts"] < MOST_FOR_ARTIFACTS * copied
