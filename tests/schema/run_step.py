"""Run the database step as a separate process on the tests' cluster, so that a test can kill the process.

    python run_step.py CLUSTER REPORTS VERSION [--without-space-check]

CLUSTER is the text of `rds_like.to_argument`. The script prints one line of progress per action on stdout. If the step
fails, the exit status is 2 and one sentence is printed on stderr."""

from __future__ import annotations

import sys
from pathlib import Path

from mlflow_host.boot import database
from mlflow_host.machine.status import StepFailed
from mlflow_host.schema import change, state
from tests.schema.environments import image
from tests.schema.rds_like import from_argument


def main() -> None:
    cluster, reports, version, *options = sys.argv[1:]
    if options == ["--without-space-check"]:
        change.MARGIN, change.SPARE = 0, 0
    settings = state.ChangeSettings(from_argument(cluster), image(version), Path(reports), dump=None)
    try:
        print(database.bring(settings, lambda message: print(message, flush=True)), flush=True)
    except StepFailed as failure:
        print(failure, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
