"""Run the unit mlflow-host-adopt@NAME as a process that uses the tests' cluster and object store.

python run_unit.py NAME CLUSTER BUCKET ENDPOINT REPORTS BLANK

CLUSTER is the text of `rds_like.to_argument`."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from mlflow_host.adopt import run
from mlflow_host.contract.adoption import AdoptionError
from mlflow_host.postgres.dump_file import Bucket
from mlflow_host.schema.release import ImageSchema
from mlflow_host.schema.revisions import known_revisions
from tests.schema.rds_like import from_argument


def this_image() -> ImageSchema:
    python = Path(sys.executable)
    chain = known_revisions(python)
    return ImageSchema(python, chain[-1], len(chain), metadata.version("mlflow"), "stand-in")


def main() -> None:
    name, cluster, bucket, endpoint, reports, blank = sys.argv[1:]
    where = Bucket(bucket, "eu-central-1", endpoint)
    settings = run.AdoptSettings(from_argument(cluster), this_image(), where, Path(reports), Path(blank))
    try:
        run.perform(settings, name)
    except AdoptionError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
