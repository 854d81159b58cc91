"""Test the fast path's store: which requests use the store, concurrent writes, and a lost connection to PostgreSQL.

tests/schema/test_tracking.py compares the responses of this store with those of MLflow's own store."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import asyncio
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

from mlflow_host.server.db_connections import through_plugin
from mlflow_host.server.fast_path import compatibility
from mlflow_host.server.fast_path.app import ANSWERS, answer_or_none, answered_directly
from mlflow_host.server.fast_path.store import DirectStore
from mlflow_host.server.request_threads import RequestThreads
from tests.support.services import PostgreSQL

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


# When it is used


SEARCH_SOURCE = "handlers._search_runs"
PARSING_SOURCE = "handlers._get_request_message"


def test_changed_source_switches_off_only_the_answer_that_rests_on_it(
    cluster: PostgreSQL, store: DirectStore, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(compatibility.COMPARED, SEARCH_SOURCE, ("another",))
    assert compatibility.switched_off(compatibility.installed_mlflow()) == {"/runs/search": [SEARCH_SOURCE]}
    assert type(compatibility.tracking_store(cluster.uri(), ROOT)) is DirectStore
    assert answered_by(store, "GET", "/api/2.0/mlflow/runs/get", f"run_id={run_id}") == "fast path"
    assert answered_by(store, "POST", "/api/2.0/mlflow/runs/search", "", b"{}") == "MLflow"


def test_changed_source_of_all_answers_leaves_mlflows_own_store(
    cluster: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(compatibility.COMPARED, PARSING_SOURCE, ("another",))
    off = compatibility.switched_off(compatibility.installed_mlflow())
    assert off == {shortcut: [PARSING_SOURCE] for shortcut in compatibility.SHORTCUTS}
    assert type(compatibility.tracking_store(cluster.uri(), ROOT)) is SqlAlchemyStore


def test_program_that_logs_to_the_database_gets_mlflows_own_store(cluster: PostgreSQL) -> None:
    store = compatibility.tracking_store(cluster.uri())
    assert type(store) is SqlAlchemyStore
    location = store.get_experiment(store.create_experiment("of a program")).artifact_location
    assert location.startswith("mlflow-artifacts:/")


def test_changed_source_of_logging_leaves_metrics_to_mlflows_own_method(
    cluster: PostgreSQL, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "sqlalchemy_store.SqlAlchemyStore._log_metrics_once"
    monkeypatch.setitem(compatibility.COMPARED, source, ("another",))
    store = compatibility.tracking_store(cluster.uri(), ROOT)
    monkeypatch.setattr(store, "write_metrics", lambda *_: pytest.fail("the fast path wrote"))
    store.log_metric(run_id, Metric("own", 1.0, TIME, 1))
    assert store.get_run(run_id).data.metrics == {"own": 1.0}


def test_every_named_source_is_compared_and_every_answer_rests_on_some() -> None:
    named = {name for sources in compatibility.ONLY.values() for name in sources}
    assert named <= compatibility.COMPARED.keys()
    assert {path for _, path in ANSWERS} == set(compatibility.SHORTCUTS) - {compatibility.STORE}
    assert set().union(*compatibility.RESTS_ON.values()) == compatibility.COMPARED.keys()


def answered_by(store: DirectStore, method: str, path: str, query: str, body: bytes = b"") -> str:
    """Return which part answers a request: the fast path, or the application to which the fast path passes the
    request."""
    reached: list[str] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(_: object) -> None:
        pass

    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query.encode(),
        "root_path": "", "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }  # fmt: skip

    async def ask() -> None:
        await answered_directly(application, store, RequestThreads(1, "request"))(scope, receive, send)

    asyncio.run(ask())
    return "MLflow" if reached else "fast path"


def test_workspaces_use_mlflows_store(cluster: PostgreSQL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_WORKSPACES", "true")
    found = compatibility.tracking_store(cluster.uri(), ROOT)
    assert not isinstance(found, DirectStore) and found.supports_workspaces


def test_definitions_have_their_decorators_and_qualified_names() -> None:
    found = compatibility.definitions(
        """
@first
@second(
    "of several lines",
)
def one(): pass

class A:
    @property
    def one(
        self,
    ) -> int:
        if self:

            return \'\'\'
a line without indentation\'\'\'

        return 2

    # of no definition

    class B:
        async def two(self): return 3

if one:
    def three(): pass
else:
    def three(): return 4
"""
    )
    assert found.keys() == {"one", "A", "A.one", "A.B", "A.B.two", "three"}
    assert found["one"].startswith("@first\n@second(") and found["one"].endswith("def one(): pass")
    assert found["A.one"].startswith("    @property\n") and found["A.one"].endswith("return 2")
    assert found["A.B.two"] == "        async def two(self): return 3"
    assert found["three"] == "    def three(): pass\n    def three(): return 4"


def test_changed_decorator_changes_the_digest(tmp_path: Path) -> None:
    handlers = tmp_path / "server/handlers.py"
    handlers.parent.mkdir()
    texts = []
    for decorator in ("", "@checked\n"):
        handlers.write_text(f"{decorator}def _get_run(): pass\n")
        compatibility.hashes.cache_clear()
        texts.append(compatibility.hashes(tmp_path)["handlers._get_run"])
    compatibility.hashes.cache_clear()
    assert texts[0] != texts[1]


def test_missing_definition_counts_as_changed(tmp_path: Path) -> None:
    lacking = compatibility.not_compared(tmp_path)
    assert "sqlalchemy_store.SqlAlchemyStore.get_run" in lacking
    assert "sqlalchemy_store.SqlAlchemyStore._log_metrics_once" not in lacking


def asked(store: DirectStore, path: str, fields: dict[str, Any]) -> Any:
    """Return the fast path's response to a POST with `fields`, or None if the fast path leaves the request to
    MLflow."""
    scope = {"headers": [(b"content-type", b"application/json")]}
    found = answer_or_none(ANSWERS["POST", f"/runs/{path}"], store, scope, json.dumps(fields).encode())
    assert found is None or found[0] == 200
    return found and json.loads(found[1])


# When several write


def test_writers_at_once_lose_nothing_and_the_last_value_stands(store: DirectStore, run_id: str) -> None:
    own = SqlAlchemyStore(store.db_uri, ROOT)

    def write(writer: int) -> None:
        for turn in range(15):
            steps = range(turn * 5, turn * 5 + 10)  # the ranges overlap, so a writer writes most steps twice
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


def test_read_after_write_returns_the_write(store: DirectStore, run_id: str) -> None:
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


def test_store_reconnects_after_closed_connections(cluster: PostgreSQL, store: DirectStore, run_id: str) -> None:
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


def test_lost_connection_is_a_temporary_error(cluster: PostgreSQL, store: DirectStore, run_id: str) -> None:
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
