"""The database step as a process of its own, on the tests' cluster, for tests that kill it.

    python step.py HOST USER REPORTS VERSION

Says on stdout what it is doing, one line each, as the status page would; exit status 2 with a sentence on stderr when
the step fails."""

from __future__ import annotations

import sys
from pathlib import Path

from mlflow_host import database
from mlflow_host.schema.cluster import Cluster
from mlflow_host.status import StepFailed
from schema.environments import image
from schema.private_cluster import programs


def main() -> None:
    host, user, reports, version = sys.argv[1:]
    cluster = Cluster(host=host, user=user, programs=programs())
    settings = database.Settings(cluster, image(version), Path(reports), dump=None)
    try:
        print(database.bring(settings, lambda message: print(message, flush=True)), flush=True)
    except StepFailed as failure:
        print(failure, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
