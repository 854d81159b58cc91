"""Benchmark: the duration of an adoption by adopt.py. The first baseline is `pg_dump | pg_restore` of the same rows.
The second baseline copies the same objects from bucket to bucket, ten objects at a time, like `aws s3 cp`.

    .venv/bin/python -m tests.bench.adopt_rate      1,000,000 metric rows and 5,000 artifacts, into an empty server
    .venv/bin/python -m tests.bench.adopt_rate --runs 1000 --metrics 100000 --artifacts 500

PostgreSQL, the object store, the server and the adoption unit run on this machine, without Session Manager. `rows` is
the time of the adoption unit in seconds: two loads, the image's migrations, a dump of the database in service and the
merge. `all` is `rows` plus the time to read the source and to compare every value through the API. The machine may be
busy, so trust the ratios. Prints JSON on stdout and progress on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlflow_host.postgres.cluster import copy_database
from scripts import adopt
from scripts.interrupts import exit_with
from tests.adopt.stack import EMPTY, Stack, cluster_of_a_machine, empty_stack
from tests.bench.carry_rate import dump_and_restore, fill, timed
from tests.support.services import object_store

SOURCE, COPY = "filled", "plain"
"""SOURCE is the name of the source's database and bucket. COPY is the name of the bucket for the baseline's copies."""
COPIES = 10
"""The number of requests that `aws s3 cp` sends at the same time."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--metrics", type=int, default=1_000_000)
    parser.add_argument("--artifacts", type=int, default=5_000)
    options = parser.parse_args()
    with contextlib.ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="mlflow-bench-")))
        objects = opened.enter_context(object_store(folder / "objects"))
        os.environ.update(objects.environment)
        cluster = opened.enter_context(cluster_of_a_machine())
        stack = opened.enter_context(empty_stack(cluster, objects, folder / "stack"))
        print(json.dumps(measure(stack, options), indent=2))
    return 0


def measure(stack: Stack, options: argparse.Namespace) -> dict[str, Any]:
    s3 = stack.target.s3
    say(f"writing {options.metrics:,} metric rows and {options.artifacts:,} artifacts")
    copy_database(stack.cluster, EMPTY, SOURCE)
    rows = fill(dataclasses.replace(stack.cluster, database=SOURCE), options.runs, options.metrics)
    for bucket in (SOURCE, COPY):
        s3.create_bucket(Bucket=bucket)
    runs = stack.sql("SELECT json_agg(run_uuid) FROM runs", SOURCE)
    keys = [f"0/{runs[number % len(runs)]}/artifacts/{number}.bin" for number in range(options.artifacts)]
    each(keys, lambda key: s3.put_object(Bucket=SOURCE, Key=key, Body=key.encode() * 200))
    restored = timed(lambda: dump_and_restore(stack.cluster))
    say(f"pg_dump | pg_restore: {restored:.1f} s")
    copied = timed(lambda: each(keys, lambda key: s3.copy({"Bucket": SOURCE, "Key": key}, COPY, key)))
    say(f"copies of the objects: {copied:.1f} s")
    uri = f"postgresql://{stack.cluster.user}@/{SOURCE}?host={stack.cluster.host}&port={stack.cluster.port}"
    arguments = adopt.read_arguments([uri, "--artifacts", f"s3://{SOURCE}", "--json"])
    begun = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = adopt.adopt(arguments, SOURCE, stack.target)
    whole = time.monotonic() - begun
    if status:
        raise SystemExit(f"adopt.py ended with exit status {status}")
    seconds = json.loads(printed.getvalue())["seconds"]
    unit = seconds["prepare"] + seconds["load"]
    return {
        "rows": rows,
        "artifacts": len(keys),
        "seconds": {
            "pg_dump | pg_restore": round(restored, 1),
            "rows": round(unit, 1),
            "copies": round(copied, 1),
            "artifacts": seconds["artifacts"],
            "all": round(whole, 1),
        },
        "ratios": {
            "rows": round(unit / restored, 1),
            "artifacts": round(seconds["artifacts"] / copied, 1),
            "all": round(whole / (restored + copied), 1),
        },
    }


def each(keys: list[str], work: Any) -> None:
    with ThreadPoolExecutor(COPIES) as pool:
        list(pool.map(work, keys))


def say(text: str) -> None:
    print(f"adopt_rate: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_with(main, say)
