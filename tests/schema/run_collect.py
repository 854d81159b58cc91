"""Run the garbage collection on a test database, with the MLflow release of the current interpreter.

The argument of run_collect.py is a JSON object with the keys cluster, artifacts, reports, grace_days, delete and
meanwhile. `cluster` is the text of `rds_like.to_argument`. `meanwhile` is a list of SQL statements that run between the
plan and the removal. The script prints the report as JSON.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from mlflow_host.garbage import collect, report
from mlflow_host.garbage.plan import OwnBuckets
from mlflow_host.postgres.cluster import connection, run
from tests.schema.rds_like import from_argument


def main(given: dict[str, Any]) -> None:
    cluster = from_argument(str(given["cluster"]))

    def meanwhile(database: str, key: str, metadata: dict[str, str]) -> str:
        for statement in given["meanwhile"]:
            with connection(cluster, database) as opened:
                run(opened, statement)
        return f"s3://backups/{key}"

    settings = collect.CollectSettings(
        cluster,
        {"MLFLOW_ARTIFACTS_DESTINATION": Path(str(given["artifacts"])).as_uri()},
        OwnBuckets(frozenset({"artifacts", "models"})),
        timedelta(days=float(str(given["grace_days"]))),
        Path(str(given["reports"])),
        meanwhile,
    )
    print(json.dumps(report.as_mapping(collect.collect(settings, delete=bool(given["delete"])))))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
