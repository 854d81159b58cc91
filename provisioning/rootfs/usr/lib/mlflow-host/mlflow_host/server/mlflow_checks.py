"""Checks at the start of a server process, and a hook that prevents MLflow from creating tables."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Layer = TypeVar("Layer")


class Refusal(Exception):
    """A check failed. The message is one sentence with the fault, the value and the remedy."""


WITHOUT = "mlflow-server: without "
"""The start of a log line with a feature that the installed MLflow does not support, and with the reason. The bake
reads these log lines."""


def report_without(what: str, why: object) -> None:
    print(f"{WITHOUT}{what} ({' '.join(str(why).split())})", file=sys.stderr, flush=True)


def optional(what: str, make: Callable[[], Layer], instead: Layer) -> Layer:
    """Return the result of `make()`. If the installed MLflow lacks a name that `make` uses, write a log line and return
    `instead`."""
    try:
        return make()
    except (ImportError, AttributeError, TypeError) as error:
        report_without(what, f"{type(error).__name__}: {error}")
        return instead


def forbid_migrations() -> None:
    """Prevent MLflow from creating tables in this process. MLflow creates its tables if one of them is missing."""
    import sqlalchemy

    @sqlalchemy.event.listens_for(sqlalchemy.MetaData, "before_create")
    def refuse(*_: object, **__: object) -> None:
        raise Refusal("this process does not create tables: the database step does (mlflow-host-database)")


def check_schema(uri: str) -> None:
    """Raises Refusal if the database's migration is not exactly the migration that the installed MLflow needs."""
    import mlflow.store
    import sqlalchemy
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    expected = ScriptDirectory(str(Path(mlflow.store.__file__).parent / "db_migrations")).get_current_head()
    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool)
    try:
        with engine.connect() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
    except sqlalchemy.exc.OperationalError as error:
        reason = str(error.orig).strip().splitlines()[0]
        raise Refusal(f"the database does not answer ({reason}): see the journal of mlflow-host-postgresql") from None
    if found != expected:
        raise Refusal(
            f"the database is at migration {found}, but MLflow {mlflow.__version__} needs {expected}: "
            "restart mlflow-host-database, which changes the schema"
        )


def repository_of(uri: str) -> Any:
    """Return MLflow's artifact repository for the artifacts destination `uri`. Raises Refusal if MLflow finds no
    repository. MLflow itself would detect this error only at the first upload."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        return get_artifact_repository(uri)
    except MlflowException as error:
        raise Refusal(
            f"artifacts cannot be stored at {uri} ({error}): the mlflow_host package is not installed as a plug-in"
        ) from None
