"""Removes one thing for good, by the functions of MLflow's store that `mlflow gc` uses, in one transaction with a last
look: the row is locked against a restore and the table of versions against a new one, the rows go, then the artifacts
through the same repository as the server's, and only then is it committed. What breaks off before leaves the thing
deleted as it was, for the next time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from mlflow_host.garbage import plan
from mlflow_host.garbage.plan import EXPERIMENT, MODEL, RUN, Found, Item
from mlflow_host.garbage.references import Version
from mlflow_host.schema.cluster import Cluster, rows, run

LOCK_SECONDS = 30
"""How long whoever holds a row or the table of versions is waited for."""

FUNCTIONS = {RUN: "_hard_delete_run", MODEL: "_hard_delete_logged_model", EXPERIMENT: "_hard_delete_experiment"}
"""Of MLflow's SqlAlchemyStore; private, so the bake looks for them."""

LOOKS: dict[str, Callable[..., list[Item]]] = {RUN: plan.runs, MODEL: plan.models, EXPERIMENT: plan.experiments}


class Refusal(Exception):
    """One sentence: why nothing can be removed, and what to do."""


@dataclass
class Remover:
    """MLflow's store on connections whose transactions are ours. `found` is renewed when somebody registers a version
    meanwhile."""

    engine: Any
    store: Any
    repository: Any
    found: Found
    waiting: list[Version]
    seen: tuple[Any, ...] | None = None

    def remove(self, item: Item) -> str:
        """Remove it unless a last look finds a reason to keep it, which is returned. Raises what S3 or PostgreSQL
        raise; then it is still there."""
        import sqlalchemy
        from mlflow.store.db.utils import _get_managed_session_maker

        with self.engine.connect() as connection, connection.begin():
            opened = connection.connection.driver_connection
            run(opened, f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'")
            run(opened, "LOCK TABLE model_versions IN SHARE MODE")
            self.look_again(opened)
            now = next(iter(LOOKS[item.kind](opened, self.found, only=item.id)), None)
            if now is None:
                return "it was restored meanwhile, or is gone already"
            if now.kept:
                return now.kept
            sessions = sqlalchemy.orm.sessionmaker(bind=connection, join_transaction_mode="create_savepoint")
            untyped: Any = _get_managed_session_maker
            self.store.ManagedSessionMaker = untyped(sessions, "postgresql")
            getattr(self.store, FUNCTIONS[item.kind])(item.id)
            for path in now.paths:
                self.repository.delete_artifacts(path)
        return ""

    def look_again(self, opened: Any) -> None:
        """Find out anew what versions stand on, if there is another version than at the last look."""
        (seen,) = rows(opened, "SELECT count(*), max(creation_time), max(last_updated_time) FROM model_versions")
        if seen != self.seen:
            self.found = plan.look(opened, self.found.places, self.found.cutoff, self.waiting)
            self.seen = seen


@contextmanager
def remover(cluster: Cluster, environment: dict[str, str], found: Found, waiting: list[Version]) -> Iterator[Remover]:
    """`environment` is what the server is told of the artifacts. Raises Refusal when MLflow does not fit."""
    from mlflow_host import server

    with mock.patch.dict(os.environ, environment):
        uri = cluster.uri(cluster.database)
        try:
            server.forbid_migrations()
            server.check_schema(uri)
            repository = server.artifact_repository(environment["MLFLOW_ARTIFACTS_DESTINATION"])
        except server.Refusal as refusal:
            raise Refusal(str(refusal)) from None
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        check_release()
        untyped: Any = SqlAlchemyStore
        store = untyped(uri, "mlflow-artifacts:/")
        try:
            yield Remover(store.engine, store, repository, found, waiting)
        finally:
            store.engine.dispose()


def check_release() -> None:
    """Raises Refusal unless the installed MLflow has what is used of it here; the bake asks, too."""
    import mlflow
    import mlflow.store.db.utils as utils
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    missing = [name for name in FUNCTIONS.values() if not hasattr(SqlAlchemyStore, name)]
    missing += [] if hasattr(utils, "_get_managed_session_maker") else ["_get_managed_session_maker"]
    if missing:
        raise Refusal(f"MLflow {mlflow.__version__} has no {', '.join(missing)}: mlflow_host.garbage has to follow")


def failed(item: Item, error: Exception) -> Item:
    said = " ".join(str(error).split()) or "no reason given"
    return replace(item, kept=f"{type(error).__name__}: {said[:300]}")
