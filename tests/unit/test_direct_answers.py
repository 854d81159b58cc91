"""Answers that PostgreSQL writes: the checks they stand behind, what is handed on to MLflow, and how JSON is written.

That they say what MLflow would say is compared in tests/schema/test_tracking.py."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg2
import pytest
from mlflow.entities import Metric, Param, RunTag
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow_host import direct_reads
from mlflow_host.bridge import Application, Message, Receive, Scope, Send
from mlflow_host.direct_answers import answered_directly
from mlflow_host.direct_reads import statement
from mlflow_host.direct_store import DirectStore
from services import PostgreSQL

TIME = 1_700_000_000_000
HANDED_ON = b"handed on with "


@pytest.fixture(scope="module")
def store(cluster: PostgreSQL) -> DirectStore:
    return DirectStore(cluster.uri(), "mlflow-artifacts:/")


@pytest.fixture
def run_id(store: DirectStore) -> str:
    run: str = store.create_run("0", "ada", TIME, [RunTag("team", 'rød 🦊\\"\n\x1f')], "é").info.run_id
    return run


@pytest.fixture
def application(store: DirectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Application]:
    async def mlflow(scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": HANDED_ON + body})

    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "mlflow.test")
    monkeypatch.setenv("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS", "https://mlflow.test")
    with ThreadPoolExecutor(2) as executor:
        yield answered_directly(mlflow, store, executor)


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

    asyncio.run(application(scope, receive, send))
    status, answered = sent[0]["status"], dict(sent[0]["headers"])
    return status, answered, b"".join(message["body"] for message in sent[1:])


def test_a_run_is_answered_in_ascii_behind_mlflows_headers(application: Application, run_id: str) -> None:
    status, headers, body = ask(application, "GET", f"/api/2.0/mlflow/runs/get?run_id={run_id}")
    assert status == 200 and body.isascii()
    assert headers[b"content-type"] == b"application/json" and headers[b"x-content-type-options"] == b"nosniff"
    assert headers[b"x-frame-options"] == b"SAMEORIGIN" and int(headers[b"content-length"]) == len(body)
    run = json.loads(body)["run"]
    tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
    assert tags == {"team": 'rød 🦊\\"\n\x1f', "mlflow.runName": "é"} and run["info"]["run_name"] == "é"


def test_pages_of_the_server_may_search_and_pages_from_elsewhere_may_not(application: Application, run_id: str) -> None:
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
def test_what_mlflow_has_to_answer_reaches_it_whole(application: Application, body: bytes) -> None:
    parts = (body[:9], body[9:])
    assert ask(application, "POST", "/api/2.0/mlflow/runs/search", parts)[2] == HANDED_ON + body


def test_other_requests_go_on_untouched(application: Application) -> None:
    assert ask(application, "POST", "/api/2.0/mlflow/runs/delete", (b"{}",), host="any")[2] == HANDED_ON + b"{}"
    assert ask(application, "GET", "/api/2.0/mlflow/runs/search", (b"",), host="any")[2] == HANDED_ON


def test_a_page_from_elsewhere_logs_nothing(application: Application, store: DirectStore, run_id: str) -> None:
    body = logging_of(run_id)
    for headers in ({"origin": "https://evil.test"}, {"host": "evil.test"}):
        assert ask(application, "POST", "/ajax-api/2.0/mlflow/runs/log-metric", (body,), **headers)[0] == 403
    assert store.get_run(run_id).data.metrics == {}
    assert ask(application, "POST", "/ajax-api/2.0/mlflow/runs/log-metric", (body,))[0] == 200
    assert store.get_run(run_id).data.metrics == {"loss": 0.5}


def test_a_write_that_postgresql_leaves_unanswered_is_not_asked_of_mlflow_again(
    cluster: PostgreSQL, application: Application, run_id: str
) -> None:
    """It may have been done: whether to ask again is the client's to say."""
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


def test_mlflows_own_store_is_asked_by_mlflow(cluster: PostgreSQL, application: Application) -> None:
    own = SqlAlchemyStore(cluster.uri(), "mlflow-artifacts:/")
    with ThreadPoolExecutor(1) as executor:
        assert answered_directly(application, own, executor) is application


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
        (float, repr(value)) for value in NUMBERS
    ]


def test_numbers_that_json_lacks_are_words(
    application: Application, cluster: PostgreSQL, store: DirectStore, run_id: str
) -> None:
    store.log_metric(run_id, Metric("nan", float("nan"), TIME, 0))
    for value in ("Infinity", "-Infinity", "NaN"):  # nothing of MLflow's writes them, people with psql may
        cluster.execute(
            "insert into latest_metrics (run_uuid, key, value, timestamp, step, is_nan) "
            f"values ('{run_id}', '{value}', '{value}', 0, 0, false)",
            "mlflow",
        )
    _, _, body = ask(application, "GET", f"/api/2.0/mlflow/runs/get?run_id={run_id}")
    metrics = {metric["key"]: metric["value"] for metric in json.loads(body)["run"]["data"]["metrics"]}
    assert metrics == {"nan": "NaN", "Infinity": "Infinity", "-Infinity": "-Infinity", "NaN": "NaN"}


def test_a_metric_that_is_filtered_and_sorted_by_is_looked_up_once() -> None:
    once, _ = statement("metrics.loss > 0 and params.p = 'a'", 1, ("metrics.loss DESC", "params.p"))
    twice, _ = statement("metrics.loss > 0 and params.p = 'a'", 1, ("metrics.acc DESC", "params.q"))
    assert once.count("FROM latest_metrics") == 1 and once.count("FROM params") == 1
    assert twice.count("FROM latest_metrics") == 2 and twice.count("FROM params") == 2


def test_long_filters_are_not_kept(application: Application, store: DirectStore, run_id: str) -> None:
    store.log_batch(run_id, [], [Param("p", "x")], [])
    statement.cache_clear()

    def search(where: str) -> Any:
        body = json.dumps({"experiment_ids": ["0"], "filter": where}).encode()
        return json.loads(ask(application, "POST", "/api/2.0/mlflow/runs/search", (body,))[2])

    assert search("params.p = 'x'")["runs"][0]["info"]["run_id"] == run_id
    assert search(f"params.p != '{'y' * direct_reads.WORTH_KEEPING}'")["runs"][0]["info"]["run_id"] == run_id
    assert statement.cache_info().currsize == 1
