"""Worker process of `release.Release`: runs tasks with the MLflow of the interpreter that runs this file.

Reads one JSON request per line on stdin and writes one JSON reply per line on stdout, until stdin ends. Importing
MLflow takes seconds, so the step starts one worker early and sends it all tasks. This file imports nothing from
mlflow_host, because tests run it with the interpreters of other environments.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def head() -> str:
    utils: Any = import_module("mlflow.store.db.utils")
    return str(utils._get_latest_schema_revision())


def create(uri: str, revision: str) -> None:
    """Create the tables in an empty database as MLflow's store does: the initial tables, then all migrations."""
    first_tables: Any = import_module("mlflow.store.tracking.dbmodels.initial_models")
    engine = _engine(uri)
    first_tables.Base.metadata.create_all(engine)
    engine.dispose()
    upgrade(uri, revision)


def upgrade(uri: str, revision: str) -> None:
    from alembic import command

    utils: Any = import_module("mlflow.store.db.utils")
    engine = _engine(uri)
    config = utils._get_alembic_config(uri)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


def query_stores(uri: str, artifact_root: str) -> dict[str, int]:
    """Open the stores that the server opens and run queries; returns the number of results by kind. MLflow creates the
    default experiment of an empty database here, with its location below `artifact_root`."""
    everything: Any = import_module("mlflow.entities").ViewType.ALL
    tracking: Any = import_module("mlflow.store.tracking.sqlalchemy_store").SqlAlchemyStore(uri, artifact_root)
    registry: Any = import_module("mlflow.store.model_registry.sqlalchemy_store").SqlAlchemyStore(uri)
    experiments = list(tracking.search_experiments(view_type=everything, max_results=1000))
    names = [experiment.experiment_id for experiment in experiments]
    runs = list(tracking.search_runs(names, "", everything, max_results=20)) if names else []
    for run in runs:
        tracking.get_run(run.info.run_id)
    traces: list[Any] = tracking.search_traces(names[:10], max_results=20)[0] if names else []
    models = list(registry.search_registered_models(max_results=100))
    for model in models[:20]:
        registry.get_registered_model(model.name)
    return {"experiments": len(experiments), "runs": len(runs), "traces": len(traces), "models": len(models)}


def _engine(uri: str) -> Any:
    import sqlalchemy

    return sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool)


TASKS: dict[str, Callable[..., Any]] = {
    "head": head,
    "create": create,
    "upgrade": upgrade,
    "query_stores": query_stores,
}


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_module("mlflow.store.tracking.sqlalchemy_store")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply: dict[str, Any] = {"result": TASKS[request["task"]](**request["arguments"])}
        except Exception as error:
            print(f"{request['task']}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
