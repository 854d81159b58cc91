"""The store that writes its statements itself: when it stands in, and what it does when several write, or PostgreSQL
goes.

That it answers as MLflow's own does is compared in tests/schema/test_tracking.py."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Metric, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.server.handlers import TrackingStoreRegistryWrapper
from mlflow.store.tracking.dbmodels.models import SqlTag
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow_host import tracking
from mlflow_host.direct_answers import ANSWERS, answer_or_none
from mlflow_host.direct_store import DirectStore
from mlflow_host.sessions import through_plugin
from services import PostgreSQL

ROOT = "mlflow-artifacts:/"
TIME = 1_700_000_000_000


@pytest.fixture(scope="module")
def store(cluster: PostgreSQL) -> DirectStore:
    found = TrackingStoreRegistryWrapper().get_store(through_plugin(cluster.uri()), ROOT)
    assert type(found) is DirectStore, "MLflow finds it by the scheme of the database's URI"
    return found


@pytest.fixture
def run_id(store: DirectStore) -> str:
    run: str = store.create_run("0", "ada", TIME, [RunTag("team", "red")], "first").info.run_id
    return run


# When it stands in


def test_a_release_that_words_it_otherwise_is_served_by_mlflows_own(
    cluster: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracking.COMPARED, "sqlalchemy_store.get_run", ("another",))
    assert type(tracking.tracking_store(cluster.uri(), ROOT)) is SqlAlchemyStore


def test_workspaces_are_served_by_mlflows_own(cluster: PostgreSQL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_WORKSPACES", "true")
    found = tracking.tracking_store(cluster.uri(), ROOT)
    assert not isinstance(found, DirectStore) and found.supports_workspaces


def test_the_text_of_a_definition_ends_where_the_next_begins() -> None:
    lines = """
class One:
    @property
    def first(
        self,
    ) -> int:
        if self:

            return 1

        return 2

    # of the second
    def second(self): return 3


def first(): pass
""".splitlines()
    assert tracking.definition(lines, "first").endswith("return 2")
    assert tracking.definition(lines, "second") == "    def second(self): return 3"
    assert tracking.definition(lines, "third") == ""


def test_what_the_installed_mlflow_lacks_counts_as_another_wording(tmp_path: Path) -> None:
    lacking = tracking.not_compared(tmp_path)
    assert "sqlalchemy_store.get_run" in lacking and "sqlalchemy_store._log_metrics_once" not in lacking


def asked(store: DirectStore, path: str, fields: dict[str, Any]) -> Any:
    """What a client that writes this is answered; None where MLflow has to answer."""
    scope = {"headers": [(b"content-type", b"application/json")]}
    found = answer_or_none(ANSWERS["POST", f"/runs/{path}"], store, scope, json.dumps(fields).encode())
    assert found is None or found[0] == 200
    return found and json.loads(found[1])


# When several write


def test_writers_at_once_lose_nothing_and_the_last_value_stands(store: DirectStore, run_id: str) -> None:
    own = SqlAlchemyStore(store.db_uri, ROOT)

    def write(writer: int) -> None:
        for turn in range(15):
            steps = range(turn * 5, turn * 5 + 10)  # each step twice, in every writer's turn
            if writer % 4 > 1:
                metrics = [Metric(f"m{step % 3}", writer, TIME + step, step) for step in steps]
                (own if writer % 4 == 3 else store).log_batch(run_id, metrics, [], [])
            else:
                logged = [
                    {"key": f"m{step % 3}", "value": writer, "timestamp": TIME + step, "step": step} for step in steps
                ]
                assert asked(store, "log-batch", {"run_id": run_id, "metrics": logged}) == {}

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    for key in range(3):
        logged = {(one.step, one.value) for one in store.get_metric_history(run_id, f"m{key}")}
        assert logged == {(step, writer) for step in range(80) if step % 3 == key for writer in range(8)}
    latest = {one.key: (one.step, one.value) for one in store.get_run(run_id).data._metric_objs}
    assert latest == {"m0": (78, 7), "m1": (79, 7), "m2": (77, 7)}


def test_what_is_read_after_a_write_has_it(store: DirectStore, run_id: str) -> None:
    for step in range(20):
        fields = {"run_id": run_id, "key": "loss", "value": step, "timestamp": TIME, "step": step}
        assert asked(store, "log-metric", fields) == {}
        assert store.get_run(run_id).data.metrics == {"loss": step}
        (found,) = store.search_runs(["0"], f"metrics.loss = {step}", ViewType.ACTIVE_ONLY, 5)
        assert found.info.run_id == run_id


# When PostgreSQL goes


def test_connections_it_has_used_hold_transactions_again(store: DirectStore, run_id: str) -> None:
    store.get_run(run_id)
    with pytest.raises(MlflowException), store.ManagedSessionMaker(read_only=False) as session:
        session.add(SqlTag(run_uuid=run_id, key="half", value="done"))
        session.flush()
        raise MlflowException("and then it fails")
    assert "half" not in store.get_run(run_id).data.tags


def test_it_goes_on_when_postgresql_has_closed_its_connections(
    cluster: PostgreSQL, store: DirectStore, run_id: str
) -> None:
    for _ in range(3):
        cluster.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = 'mlflow'")
        store.log_metric(run_id, Metric("loss", 1.0, TIME, 1))
        assert store.get_run(run_id).data.metrics == {"loss": 1.0}
        assert store.create_run("0", "ada", TIME, [], "next").info.run_name == "next"
        cluster.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = 'mlflow'")
        assert asked(store, "log-metric", {"run_id": run_id, "key": "loss", "value": 2.0, "timestamp": TIME}) == {}
        assert store.get_run(run_id).data.metrics == {"loss": 1.0}
        made = asked(store, "create", {"experiment_id": "0", "user_id": "ada", "start_time": TIME, "run_name": "next"})
        assert made["run"]["info"]["run_name"] == "next"


def test_a_connection_that_ends_meanwhile_is_said_to_be_temporary(
    cluster: PostgreSQL, store: DirectStore, run_id: str
) -> None:
    with pytest.raises(MlflowException) as refused, store.cursor() as cursor:
        cluster.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = 'mlflow'")
        cursor.execute("select 1")
    assert refused.value.error_code == "TEMPORARILY_UNAVAILABLE"
    assert store.get_run(run_id).info.run_id == run_id


def test_a_statement_that_fails_has_changed_nothing(cluster: PostgreSQL, store: DirectStore) -> None:
    before = cluster.execute("select count(*) from runs", "mlflow")
    twice = [{"key": "twice", "value": value} for value in "12"]
    assert asked(store, "create", {"experiment_id": "0", "start_time": TIME, "tags": twice}) is None
    with pytest.raises(MlflowException, match="twice"):
        store.create_run("0", "ada", TIME, [RunTag(**tag) for tag in twice], "n")
    assert cluster.execute("select count(*) from runs", "mlflow") == before
