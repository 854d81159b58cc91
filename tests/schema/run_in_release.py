"""Run Python statements with one release of MLflow. The statements can use MLflow's stores as `tracking` and
`registry`, which read and write the database in service."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

from mlflow_host.postgres.cluster import Cluster
from mlflow_host.schema.release import ImageSchema
from scripts.drilling.worker_client import without_mlflow
from tests.schema.rds_like import uri

BEGIN = """
import json, os, sys
os.environ.update(
    MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_CRYPTO_KEK_PASSPHRASE="a passphrase for tests only", PYTHONWARNINGS="ignore"
)
import mlflow
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Registry
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as Tracking
uri, result = sys.argv[1], None
mlflow.set_tracking_uri(uri)
tracking, registry = Tracking(uri, "mlflow-artifacts:/"), Registry(uri)
def jobs():
    from mlflow.store.jobs.sqlalchemy_store import SqlAlchemyJobStore
    return SqlAlchemyJobStore(uri)
"""
END = "\nprint(json.dumps(result))\n"


def in_release(image: ImageSchema, cluster: Cluster, statements: str) -> Any:
    """Return the value that the statements assign to `result`, converted to JSON and back."""
    command = [str(image.python), "-W", "ignore", "-c", BEGIN + statements + END, uri(cluster)]
    ended = subprocess.run(command, capture_output=True, text=True, env=without_mlflow(os.environ))
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])
