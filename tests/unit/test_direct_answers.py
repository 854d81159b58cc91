"""Test the fast path's middleware: its checks, the requests that it passes to MLflow, and its JSON format.

tests/schema/test_tracking.py compares the responses of the middleware with MLflow's responses.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg2
import pytest
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.server import fastapi_security
from mlflow.server.fastapi_security import init_fastapi_security
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from starlette.applications import Starlette
from starlette.routing import Mount

from mlflow_host.server.fast_path import reads
from mlflow_host.server.fast_path import store as fast_path_store
from mlflow_host.server.fast_path.app import answered_directly, with_mlflows_checks
from mlflow_host.server.fast_path.reads import statement
from mlflow_host.server.fast_path.store import DirectStore
from mlflow_host.server.flask_shortcut import Application, Message, Receive, Scope, Send
from mlflow_host.server.request_threads import RequestThreads
from tests.support.services import PostgreSQL

pytestmark = pytest.mark.service

TIME = 1_700_000_000_000
HANDED_ON = b"handed on with "


@pytest.fixture(scope="module")
def store(cluster: PostgreSQL) -> DirectStore:
    return DirectStore(cluster.uri(), "mlflow-artifacts:/")


@pytest.fixture
def run_id(store: DirectStore) -> str:
    run: str = store.create_run("0", "ada", TIME, [RunTag("team", 'rød 🦊\\"\n\x1f')], "é").info.run_id
    return run


@pytest.mark.parametrize("most", [None, 10**9, 20, 9])
def test_a_history_of_too_many_points_is_refused_with_the_remedy(
    store: DirectStore, run_id: str, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.log_batch(run_id, [Metric("loss", number / 7, TIME, number) for number in range(20)], [], [])
    monkeypatch.setattr(fast_path_store, "POINTS", 19)
    if most == 9:
        page = store.get_metric_history(run_id, "loss", max_results=9)
        assert len(page) == 9 and page.token
        return
    with pytest.raises(MlflowException, match=r"more than 19 points, .*: request pages .* max_results") as refused:
        store.get_metric_history(run_id, "loss", max_results=most)
    assert refused.value.get_http_status_code() == 400
    monkeypatch.setattr(fast_path_store, "POINTS", 20)
    assert len(store.get_metric_history(run_id, "loss", max_results=most)) == 20


@pytest.fixture
def application(store: DirectStore, monkeypatch: pytest.MonkeyPatch) -> Application:
    async def mlflow(scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": HANDED_ON + body})

    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "mlflow.test")
    monkeypatch.setenv("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS", "https://mlflow.test")
    return answered_directly(mlflow, store, RequestThreads(2, "request"))


def ask(
    application: Application, method: str, target: str, parts: tuple[bytes, ...] = (b"",), **headers: str
) -> tuple[int, dict[bytes, bytes], bytes]:
    path, _, query = target.partition("?")
    given = {"host": "mlflow.test", "content-type": "application/json", **headers}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }
    incoming: list[Message] = [
        {"type": "http.request", "body": part, "more_body": number < len(parts)} for number, part in enumerate(parts, 1)
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        return incoming.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    async def play() -> None:
        await application(scope, receive, send)

    asyncio.run(play())
    status, answered = sent[0]["status"], dict(sent[0]["headers"])
    return status, answered, b"".join(message["body"] for message in sent[1:])


def test_run_is_returned_as_ascii_with_mlflows_headers(application: Application, run_id: str) -> None:
    status, headers, body = ask(application, "GET", f"/api/2.0/mlflow/runs/get?run_id={run_id}")
    assert status == 200 and body.isascii()
    assert headers[b"content-type"] == b"application/json" and headers[b"x-content-type-options"] == b"nosniff"
    assert headers[b"x-frame-options"] == b"SAMEORIGIN" and int(headers[b"content-length"]) == len(body)
    run = json.loads(body)["run"]
    tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
    assert tags == {"team": 'rød 🦊\\"\n\x1f', "mlflow.runName": "é"} and run["info"]["run_name"] == "é"


def test_search_from_another_origin_is_refused(application: Application, run_id: str) -> None:
    search = b'{"experiment_ids": ["0"], "max_results": 10}'
    path = "/ajax-api/2.0/mlflow/runs/search"
    status, _, body = ask(application, "POST", path, (search,), origin="https://mlflow.test")
    assert status == 200 and run_id in body.decode()
    status, _, body = ask(application, "POST", path, (search,), origin="https://evil.test")
    assert status == 403 and run_id not in body.decode()
    status, _, body = ask(application, "POST", path, (search,), host="evil.test")
    assert status == 403 and run_id not in body.decode()


@pytest.mark.parametrize(
    "body",
    [
        b'{"experiment_ids": ["0"], "filter": "datasets.name = \'corpus\'"}',
        b'{"experiment_ids": ["0"], "filter": "nonsense"}',
        b'{"experiment_ids": ["0"], "of_a_newer_client": 1}',
        b"nonsense",
    ],
)
def test_unhandled_requests_reach_mlflow_complete(application: Application, body: bytes) -> None:
    parts = (body[:9], body[9:])
    assert ask(application, "POST", "/api/2.0/mlflow/runs/search", parts)[2] == HANDED_ON + body


def test_other_requests_are_unchanged(application: Application) -> None:
    assert ask(application, "POST", "/api/2.0/mlflow/runs/delete", (b"{}",), host="any")[2] == HANDED_ON + b"{}"
    assert ask(application, "GET", "/api/2.0/mlflow/runs/search", (b"",), host="any")[2] == HANDED_ON


@pytest.mark.parametrize("origins", ["https://mlflow.test", "*"])
@pytest.mark.parametrize(
    "method, headers",
    [
        ("GET", {}),
        ("HEAD", {}),
        ("POST", {"host": "elsewhere.test"}),
        ("POST", {"origin": "https://elsewhere.test"}),
        ("POST", {"origin": "https://mlflow.test"}),
        ("POST", {"origin": "http://localhost:3000"}),
        ("OPTIONS", {"origin": "https://mlflow.test", "access-control-request-method": "POST"}),
        ("OPTIONS", {"origin": "https://elsewhere.test", "access-control-request-method": "POST"}),
    ],
)
def test_checks_without_starlettes_application_are_the_same(
    method: str, headers: dict[str, str], origins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def mlflow(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"answered"})

    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "mlflow.test")
    monkeypatch.setenv("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS", origins)
    whole: Any = Starlette(routes=[Mount("/", mlflow)])
    init_fastapi_security(whole)
    checked = with_mlflows_checks(mlflow)
    assert not isinstance(checked, Starlette)
    target = "/api/2.0/mlflow/runs/search"
    assert ask(checked, method, target, (b"",), **headers) == ask(whole, method, target, (b"",), **headers)


def test_release_that_adds_more_than_middleware_gets_a_starlette_application(monkeypatch: pytest.MonkeyPatch) -> None:
    async def mlflow(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError

    monkeypatch.setattr(fastapi_security, "init_fastapi_security", lambda app: app.exception_handlers.clear())
    assert isinstance(with_mlflows_checks(mlflow), Starlette)


def test_write_from_another_origin_is_refused(application: Application, store: DirectStore, run_id: str) -> None:
    body = logging_of(run_id)
    for headers in ({"origin": "https://evil.test"}, {"host": "evil.test"}):
        assert ask(application, "POST", "/ajax-api/2.0/mlflow/runs/log-metric", (body,), **headers)[0] == 403
    assert store.get_run(run_id).data.metrics == {}
    assert ask(application, "POST", "/ajax-api/2.0/mlflow/runs/log-metric", (body,))[0] == 200
    assert store.get_run(run_id).data.metrics == {"loss": 0.5}


def test_unanswered_write_is_not_repeated_by_mlflow(cluster: PostgreSQL, application: Application, run_id: str) -> None:
    """A write without a response may have happened, so MLflow must not repeat it; only the client may repeat it."""
    waiting = "select pid from pg_stat_activity where wait_event_type = 'Lock' and query like '%latest_metrics%'"
    with psycopg2.connect(cluster.uri().replace("+psycopg2", "")) as other, ThreadPoolExecutor(1) as pool:
        other.cursor().execute("lock table latest_metrics in access exclusive mode")
        asked = pool.submit(ask, application, "POST", "/api/2.0/mlflow/runs/log-metric", (logging_of(run_id),))
        ends = time.monotonic() + 20
        while not (found := cluster.execute(waiting)):
            assert time.monotonic() < ends, "nothing waits for the lock"
            time.sleep(0.01)
        cluster.execute(f"select pg_terminate_backend({found[0][0]})")
        status, _, body = asked.result(20)
    assert (status, json.loads(body)["error_code"]) == (503, "TEMPORARILY_UNAVAILABLE")


def logging_of(run_id: str) -> bytes:
    return json.dumps({"run_id": run_id, "key": "loss", "value": 0.5, "timestamp": TIME, "step": 1}).encode()


def test_requests_use_mlflows_own_store_if_configured(cluster: PostgreSQL, application: Application) -> None:
    own = SqlAlchemyStore(cluster.uri(), "mlflow-artifacts:/")
    assert answered_directly(application, own, RequestThreads(1, "request")) is application


NUMBERS = (
    *(0.0, -0.0, 1.0, -7.0, 0.1, -2.5, 1e-5, 1e-7, 5e-324, 1.7976931348623157e308),
    *(999999999999999.0, 999999999999999.9, 1e15, 1e16, 123456789012345680.0, 2.0**53 + 2, 1e22, -1e100, 1 / 3),
)


def test_numbers_are_written_as_python_writes_them(application: Application, store: DirectStore, run_id: str) -> None:
    store.log_batch(run_id, [Metric("m", value, TIME, step) for step, value in enumerate(NUMBERS)], [], [])
    target = f"/api/2.0/mlflow/metrics/get-history?run_id={run_id}&metric_key=m&max_results=25000"
    _, _, body = ask(application, "GET", target)
    read = {metric["step"]: metric["value"] for metric in json.loads(body)["metrics"]}
    assert [(type(read[step]), repr(read[step])) for step in range(len(NUMBERS))] == [
        (float, repr(value + 0.0))
        for value in NUMBERS  # MLflow stores -0.0 as 0.0
    ]


def test_nan_and_infinities_are_strings(
    application: Application, cluster: PostgreSQL, store: DirectStore, run_id: str
) -> None:
    store.log_metric(run_id, Metric("nan", float("nan"), TIME, 0))
    for value in ("Infinity", "-Infinity", "NaN"):  # MLflow never stores these values, but a user of psql may
        cluster.execute(
            "insert into latest_metrics (run_uuid, key, value, timestamp, step, is_nan) "
            f"values ('{run_id}', '{value}', '{value}', 0, 0, false)",
            "mlflow",
        )
    _, _, body = ask(application, "GET", f"/api/2.0/mlflow/runs/get?run_id={run_id}")
    metrics = {metric["key"]: metric["value"] for metric in json.loads(body)["run"]["data"]["metrics"]}
    assert metrics == {"nan": "NaN", "Infinity": "Infinity", "-Infinity": "-Infinity", "NaN": "NaN"}


def test_metric_in_filter_and_order_is_joined_once() -> None:
    once, _ = statement("metrics.loss > 0 and params.p = 'a'", 1, ("metrics.loss DESC", "params.p"))
    twice, _ = statement("metrics.loss > 0 and params.p = 'a'", 1, ("metrics.acc DESC", "params.q"))
    assert once.count("FROM latest_metrics") == 1 and once.count("FROM params") == 1
    assert twice.count("FROM latest_metrics") == 2 and twice.count("FROM params") == 2


def test_long_filters_are_not_cached(application: Application, store: DirectStore, run_id: str) -> None:
    store.log_batch(run_id, [], [Param("p", "x")], [])
    statement.cache_clear()

    def search(where: str) -> Any:
        body = json.dumps({"experiment_ids": ["0"], "filter": where}).encode()
        return json.loads(ask(application, "POST", "/api/2.0/mlflow/runs/search", (body,))[2])

    assert search("params.p = 'x'")["runs"][0]["info"]["run_id"] == run_id
    assert search(f"params.p != '{'y' * reads.WORTH_KEEPING}'")["runs"][0]["info"]["run_id"] == run_id
    assert statement.cache_info().currsize == 1
