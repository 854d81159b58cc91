"""Permanently remove one deleted item in one transaction. `mlflow gc` calls the same functions of MLflow's store.

The transaction locks the item's row, so nobody can restore the item, and blocks changes of the table model_versions.
The transaction then checks the item again, deletes the rows and the artifacts, and commits. If the transaction fails,
the rows remain, the item stays marked as deleted, and the next garbage collection repeats the removal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from mlflow_host.garbage import plan
from mlflow_host.garbage.plan import EXPERIMENT, MODEL, RUN, Criteria, Item
from mlflow_host.garbage.references import ModelVersion
from mlflow_host.postgres.cluster import Cluster, password_file, rows, run
from mlflow_host.postgres.login import PasswordFile

LOCK_SECONDS = 30
"""Maximum time to wait for the lock of a row or of the table model_versions."""

FUNCTIONS = {RUN: "_hard_delete_run", MODEL: "_hard_delete_logged_model", EXPERIMENT: "_hard_delete_experiment"}
"""The methods of MLflow's SqlAlchemyStore that remove an item, by kind of item. These methods are private, so the bake
checks that they exist."""

READ_ITEMS: dict[str, Callable[..., list[Item]]] = {RUN: plan.runs, MODEL: plan.models, EXPERIMENT: plan.experiments}


class RemovalRefused(Exception):
    """No item can be removed. The message is one sentence with the reason and the remedy."""


@dataclass
class Remover:
    """Removes items with MLflow's store, but in transactions of this module. If a model version has changed, `criteria`
    is read again."""

    engine: Any
    store: Any
    repository: Any
    criteria: Criteria
    waiting: list[ModelVersion]
    login: PasswordFile
    seen: tuple[Any, ...] | None = None

    def remove(self, item: Item) -> str:
        """Check the item again, and remove it. Returns "" after the removal, or the reason to keep the item. After an
        exception of S3 or PostgreSQL, the item still exists in the database."""
        import sqlalchemy
        from mlflow.store.db.utils import _get_managed_session_maker

        self.login.renew()  # the engine may open a new connection
        with self.engine.connect() as connection, connection.begin():
            opened = connection.connection.driver_connection
            run(opened, f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'")
            run(opened, "LOCK TABLE model_versions IN SHARE MODE")
            self.update_criteria(opened)
            now = next(iter(READ_ITEMS[item.kind](opened, self.criteria, only=item.id)), None)
            if now is None:
                return "it was restored or removed in the meantime"
            if now.kept:
                return now.kept
            sessions = sqlalchemy.orm.sessionmaker(bind=connection, join_transaction_mode="create_savepoint")
            untyped: Any = _get_managed_session_maker
            self.store.ManagedSessionMaker = untyped(sessions, "postgresql")
            getattr(self.store, FUNCTIONS[item.kind])(item.id)
            for path in now.paths:
                self.repository.delete_artifacts(path)
        return ""

    def update_criteria(self, opened: Any) -> None:
        """Read `criteria` again if a model version was added or changed."""
        (seen,) = rows(opened, "SELECT count(*), max(creation_time), max(last_updated_time) FROM model_versions")
        if seen != self.seen:
            self.criteria = plan.read_criteria(opened, self.criteria.buckets, self.criteria.cutoff, self.waiting)
            self.seen = seen


@contextmanager
def remover(
    cluster: Cluster, environment: dict[str, str], criteria: Criteria, waiting: list[ModelVersion]
) -> Iterator[Remover]:
    """Open MLflow's store. `environment` has the server's environment variables for artifacts. Raises RemovalRefused if
    a check of the installed MLflow or of the database schema fails."""
    from mlflow_host.server import mlflow_checks
    from mlflow_host.server.environment import variables

    with variables(environment), password_file(cluster) as login:
        uri = cluster.uri(cluster.database, login.path)
        try:
            mlflow_checks.forbid_migrations()
            mlflow_checks.check_schema(uri)
            repository = mlflow_checks.repository_of(environment["MLFLOW_ARTIFACTS_DESTINATION"])
        except mlflow_checks.Refusal as refusal:
            raise RemovalRefused(str(refusal)) from None
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        check_release()
        untyped: Any = SqlAlchemyStore
        store = untyped(uri, "mlflow-artifacts:/")
        try:
            yield Remover(store.engine, store, repository, criteria, waiting, login)
        finally:
            store.engine.dispose()


def check_release() -> None:
    """Raises RemovalRefused if the installed MLflow lacks a private function that this module calls. The bake also
    calls `check_release`."""
    import mlflow
    import mlflow.store.db.utils as utils
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    missing = [name for name in FUNCTIONS.values() if not hasattr(SqlAlchemyStore, name)]
    missing += [] if hasattr(utils, "_get_managed_session_maker") else ["_get_managed_session_maker"]
    if missing:
        raise RemovalRefused(
            f"MLflow {mlflow.__version__} has no {', '.join(missing)}: adapt mlflow_host.garbage.removal"
        )


def failed(item: Item, error: Exception) -> Item:
    reason = " ".join(str(error).split()) or "no reason given"
    return replace(item, kept=f"{type(error).__name__}: {reason[:300]}")
