"""A request gets a 4xx status with a sentence if its body is too long or too deeply nested, or if its search has too
many conditions. The process keeps running."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fastapi
import pytest
import requests

from mlflow_host.server import db_connections, health, refusals, request_limits
from mlflow_host.server.flask_shortcut import Message, Receive, Scope, Send, whole
from tests.support.services import HOST_PACKAGE, create_schema, on_loopback, postgresql, server_processes

pytestmark = pytest.mark.service

MANY = " and ".join(f"metrics.m{n} > {n}" for n in range(200))


@pytest.mark.parametrize(
    ("request_line", "taken"),
    [
        ("POST /api/2.0/mlflow/runs/search", 2**20),
        ("POST /ajax-api/3.0/mlflow/traces/search", 2**20),
        ("POST /graphql", 2**17),
        ("POST /api/2.0/mlflow/runs/log-batch", 2**24),
        ("POST /v1/traces", 2**26),
        ("PUT /api/2.0/mlflow-artifacts/artifacts/1/search", None),
        ("GET /api/2.0/mlflow-artifacts/artifacts/1/x", 2**20),
        ("GET /get-artifact", 2**20),
        ("POST /api/2.0/mlflow-artifacts/mpu/create/1/x", 2**24),
        ("POST /ajax-api/2.0/mlflow/upload-artifact", 2**24),
        ("PUT /ajax-api/2.0/mlflow/logged-models/m-1/artifacts/x", 2**24),
    ],
)
def test_bytes_of_a_body_are_bounded_by_what_the_route_needs(request_line: str, taken: int | None) -> None:
    assert request_limits.limit_of(*request_line.split()) == taken


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/2.0/mlflow-artifacts/mpu/create/1/x"),
        ("POST", "/ajax-api/2.0/mlflow/upload-artifact?run_uuid=x&path=x"),
        ("PUT", "/ajax-api/2.0/mlflow/logged-models/m-1/artifacts/x"),
        ("GET", "/get-artifact?run_uuid=x&path=x"),
    ],
)
def test_a_body_of_unknown_length_is_read_up_to_its_limit_only(url: str, method: str, path: str) -> None:
    """nginx does not buffer bodies on routes of artifacts, so the process would read a whole body into memory."""
    refused = requests.request(method, url + path, data=(bytes(2**16) for _ in range(2**9)), timeout=60)
    assert refused.status_code == 413, refused.text
    assert "send it in parts" in refused.json()["message"]
    assert requests.request(method, url + path, data=(b"{}" for _ in range(1)), timeout=60).status_code < 413


@pytest.mark.parametrize("path", ["/api/2.0/mlflow/runs/log-batch", "/api/2.0/mlflow-artifacts/mpu/create/1/x"])
@pytest.mark.parametrize("item", [b'{"a":1},', b"[],"])
def test_json_of_many_objects_is_refused_before_it_is_parsed(url: str, path: str, item: bytes) -> None:
    """15 MiB of empty lists would take 400 MB of memory."""
    body = b'{"x": [' + item * 800_000 + b"{}]}"
    refused = requests.post(url + path, data=body, headers={"Content-Type": "application/json"}, timeout=60)
    assert refused.status_code == 413 and "more than 500,000 objects and lists: send it" in refused.json()["message"]
    fewer = b'{"x": [' + item * 400_000 + b"{}]}"
    taken = requests.post(url + path, data=fewer, headers={"Content-Type": "application/json"}, timeout=60)
    assert taken.status_code in (400, 404, 501), taken.text


def test_a_file_of_many_braces_is_no_json(url: str) -> None:
    sent = requests.put(f"{url}/api/2.0/mlflow-artifacts/artifacts/1/x", data=b"{" * 3_000_000, timeout=60)
    assert sent.status_code != 413, sent.text


@pytest.mark.parametrize(
    ("text", "conditions"),
    [
        ("", 1),
        ("metrics.a > 1", 1),
        ("metrics.a > 1 AND params.b = 'x' and tags.c = 'd'", 3),
        ("tags.note = 'this and that and those'", 1),
        ('tags.`and` = "and" and metrics.sand > 1', 2),
        (MANY, 200),
    ],
)
def test_conditions_are_counted_outside_of_quotes(text: str, conditions: int) -> None:
    assert request_limits.conditions_of(text) == conditions


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("limits")
    (folder / "tmp").mkdir()
    create_schema(f"sqlite:///{folder}/mlflow.db")
    return {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_ARTIFACTS_DESTINATION": "mlflow-host://artifacts/models",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ALLOWED_HOSTS": "localhost,127.0.0.1:*",
        "TMPDIR": str(folder / "tmp"),
    }


@pytest.fixture(scope="module")
def url(variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("process")
    with server_processes(folder, variables) as (process,), on_loopback(process.socket) as address:
        yield address


def test_a_request_that_needs_too_much_memory_fails_alone(variables: dict[str, str], tmp_path: Path) -> None:
    """Half a million JSON objects take 120 MB. After a MemoryError the process ends, and systemd restarts it."""
    body = b'{"run_id": "x", "metrics": [' + b'{"a":1},' * 480_000 + b"{}]}"
    limited = variables | {"MLFLOW_HOST_PROCESS_MEMORY_MB": "380"}
    with (
        server_processes(tmp_path / "limited", limited) as (process,),
        on_loopback(process.socket) as url,
        requests.Session() as other,
    ):
        assert other.get(f"{url}/version", timeout=60).status_code == 200
        refused = requests.post(
            f"{url}/api/2.0/mlflow/runs/log-batch",
            data=body,
            headers={"Content-Type": "application/json"},
            timeout=120,
        )
        assert (refused.status_code, refused.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE"), refused.text
        assert "needs more memory than there is" in refused.json()["message"]
        deadline = time.monotonic() + 60
        while Path(f"/proc/{process.pid}/stat").read_text().split()[2] != "Z":
            assert time.monotonic() < deadline, "the process does not end"
            time.sleep(0.2)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list of signals that the process would send to itself, because os.kill is replaced."""
    sent: list[int] = []
    monkeypatch.setattr("mlflow_host.server.request_limits.os.kill", lambda pid, number: sent.append(number))
    return sent


def test_a_small_request_beside_it_can_be_repeated(ended: list[int]) -> None:
    assert request_limits.out_of_memory("POST", "/api/2.0/mlflow/runs/log-batch", 900)[0] == 503
    assert request_limits.out_of_memory("POST", "/api/2.0/mlflow/runs/search", 900)[0] == 400
    assert ended == [signal.SIGTERM] * 2


LEAVE_CYCLES = """
import gc
from mlflow_host.server import request_limits
def data(): return int(request_limits.STATM.read_text().split()[5])
gc.disable()
def leave():
    for _ in range(250):
        block = [bytearray(2**20)]
        block.append(block)
leave(); assert not request_limits.uses_much_memory()
request_limits.bound_memory(1000); assert not request_limits.uses_much_memory()
request_limits.bound_memory(400); assert request_limits.uses_much_memory()
before = data(); request_limits.return_memory(); assert data() < before / 2
leave(); assert not request_limits.uses_much_memory(), "not twice within five seconds"
"""


def test_garbage_is_collected_when_half_of_the_memory_is_used() -> None:
    environment = {**os.environ, "PYTHONPATH": str(HOST_PACKAGE)}
    subprocess.run([sys.executable, "-c", LEAVE_CYCLES], env=environment, check=True)


@pytest.mark.parametrize(
    ("error", "status"), [(MemoryError(), 400), (ValueError("of another kind"), 500), (AssertionError(), 500)]
)
def test_memory_error_in_a_session_of_mlflow_is_one_of_the_request(
    error: Exception, status: int, ended: list[int], tmp_path: Path
) -> None:
    """MLflow's database session converts every exception to an internal error."""
    import flask
    import sqlalchemy
    from mlflow.server.handlers import catch_mlflow_exception
    from mlflow.store.db.utils import _get_managed_session_maker

    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/empty.db")
    session_maker = _get_managed_session_maker(sqlalchemy.orm.sessionmaker(engine), "sqlite")
    application: Any = flask.Flask("test")
    request_limits.refuse_dear_requests(application)
    raised: list[Exception] = [error]

    @application.post("/api/2.0/mlflow/runs/search")  # type: ignore[untyped-decorator]
    @catch_mlflow_exception  # type: ignore[untyped-decorator]
    def search() -> str:
        with session_maker() as session:
            session.execute(sqlalchemy.text("select 1"))
            if raised:
                raise raised.pop()
        return "found"

    db_connections.notice_memory_errors()
    try:
        client = application.test_client()
        answer = client.post("/api/2.0/mlflow/runs/search", json={})
        assert (answer.status_code, ended) == (status, [signal.SIGTERM] if status == 400 else [])
        assert client.post("/api/2.0/mlflow/runs/search", json={}).text == "found"
        assert request_limits.THIS_THREAD.until is None, "the thread's next request may have no budget"
    finally:
        sqlalchemy.event.remove(sqlalchemy.orm.Session, "after_soft_rollback", request_limits.note_memory_error)


def test_histories_of_many_runs_are_bounded(url: str) -> None:
    def ask(runs: int, **more: int) -> requests.Response:
        query: Any = {"metric_key": "loss", "run_ids": ["0" * 32] * runs, **more}
        path = "ajax-api/2.0/mlflow/metrics/get-history-bulk-interval"
        return requests.get(f"{url}/{path}", params=query, timeout=60)

    assert "100 runs with 2500 points each are more than" in ask(100).json()["message"]
    assert "50 runs with 2001 points each" in ask(50, max_results=2001).json()["message"]
    for answer in (ask(100, max_results=320), ask(40), ask(1, max_results=2500)):
        assert "points each" not in answer.text


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread"), RuntimeError("other")])
@pytest.mark.parametrize("begun", [False, True])
def test_memory_error_outside_of_flask_is_answered(begun: bool, error: Exception, ended: list[int]) -> None:
    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise error

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    scope = {"type": "http", "method": "POST", "path": "/ajax-api/3.0/mlflow/traces/search", "headers": []}
    served = request_limits.within_memory(application)
    if begun or str(error) == "other":
        with pytest.raises(type(error)):
            asyncio.run(served(scope, receive, send))
        assert [message["status"] for message in sent] == [200] * begun
        assert ended == ([] if str(error) == "other" else [signal.SIGTERM])
    else:
        asyncio.run(served(scope, receive, send))
        assert sent[0]["status"] == 400 and ended == [signal.SIGTERM]


@pytest.mark.parametrize(
    ("route", "body", "sentence"),
    [
        ("runs/search", {"experiment_ids": ["0"], "filter": MANY}, "the filter has 200 conditions"),
        (
            "runs/search",
            {"experiment_ids": ["0"], "order_by": [f"metrics.m{n}" for n in range(300)]},
            "the search has 300 columns to order by",
        ),
        ("experiments/search", {"max_results": 5, "filter": MANY}, "the filter has 200 conditions"),
        ("logged-models/search", {"experiment_ids": ["0"], "filter": MANY}, "the filter has 200 conditions"),
    ],
)
def test_expensive_search_is_refused_with_the_remedy(url: str, route: str, body: Any, sentence: str) -> None:
    refused = requests.post(f"{url}/api/2.0/mlflow/{route}", json=body, timeout=60)
    assert (refused.status_code, refused.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE"), refused.text
    assert sentence in refused.json()["message"]


def test_a_search_by_get_is_bounded_too(url: str) -> None:
    query = {"filter": MANY}
    refused = requests.get(f"{url}/api/2.0/mlflow/registered-models/search", params=query, timeout=60)
    assert refused.status_code == 400
    assert "the filter has 200 conditions" in refused.json()["message"]


ORDERS = [f"metrics.m{n}" for n in range(300)]
GRAPHQL = "query q($input: MlflowSearchRunsInput) { mlflowSearchRuns(input: $input) { runs { info { runId } } } }"
LITERAL = f'{{ mlflowSearchRuns(input: {{experimentIds: ["0"], filter: "{MANY}"}}) {{ runs {{ info {{ runId }} }} }} }}'


def test_a_graphql_request_returns_a_bounded_number_of_runs(url: str) -> None:
    made = [
        requests.post(f"{url}/api/2.0/mlflow/runs/create", json={"experiment_id": "0"}, timeout=60) for _ in range(2)
    ]
    assert {answer.status_code for answer in made} == {200}

    def ask(**fields: Any) -> Any:
        body: Any = {"query": GRAPHQL, "variables": {"input": {"experimentIds": ["0"], **fields}}}
        return requests.post(f"{url}/graphql", json=body, timeout=60).json()

    assert len(ask()["data"]["mlflowSearchRuns"]["runs"]) >= 2
    assert len(ask(maxResults=100)["data"]["mlflowSearchRuns"]["runs"]) >= 2
    assert "at most 100 runs" in ask(maxResults=101)["errors"][0]


def test_searches_of_one_graphql_request_share_the_number_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from mlflow.exceptions import MlflowException
    from mlflow.protos.service_pb2 import SearchRuns

    search = request_limits.bounded(lambda message: SimpleNamespace(runs=[None] * min(60, message.max_results)))
    monkeypatch.setattr(request_limits.THIS_THREAD, "runs", request_limits.GRAPHQL_RUNS)
    assert [len(search(SearchRuns()).runs) for _ in range(2)] == [60, 40]
    with pytest.raises(MlflowException, match="at most 100 runs"):
        search(SearchRuns())
    monkeypatch.setattr(request_limits.THIS_THREAD, "runs", None)
    search(SearchRuns(max_results=50_000))


@pytest.mark.parametrize(
    ("method", "route", "sent"),
    [
        ("POST", "2.0/mlflow/runs/search", {"experimentIds": ["0"], "orderBy": ORDERS}),
        ("POST", "2.0/mlflow/runs/search", json.dumps({"experiment_ids": ["0"], "filter": MANY})),
        ("POST", "2.0/mlflow/runs/search", json.dumps({"experiment_ids": ["0"], "orderBy": ORDERS})),
        ("GET", "2.0/mlflow/registered-models/search", {"filter": MANY}),
        ("GET", "2.0/mlflow/traces?experiment_ids=0", MANY),
        ("POST", "3.0/mlflow/traces/calculate-filter-correlation", {"filterString1": MANY}),
        ("POST", "3.0/mlflow/traces/metrics", {"filters": [f"trace.tag.t{n} = 'x'" for n in range(60)]}),
        ("POST", "graphql", {"query": GRAPHQL, "variables": {"input": {"experimentIds": ["0"], "filter": MANY}}}),
        ("POST", "graphql", {"query": GRAPHQL, "variables": {"input": {"experimentIds": ["0"], "orderBy": ORDERS}}}),
        ("POST", "graphql", {"query": LITERAL}),
    ],
)
def test_a_search_is_bounded_however_it_is_spelled(url: str, method: str, route: str, sent: Any) -> None:
    """MLflow accepts a search with protobuf's camel-case names, as JSON in a string, as the body of a GET, and by
    GraphQL."""
    how: dict[str, Any] = {"params": {"filter": sent}} if "?" in route else {"json": sent}
    target = f"{url}/{route}" if route == "graphql" else f"{url}/api/{route}"
    answer = requests.request(method, target, timeout=60, **how)
    said = answer.json()
    if route == "graphql":
        assert said["data"] == {"mlflowSearchRuns": None}
        assert "limit is" in said["errors"][0]
    else:
        assert (answer.status_code, said["error_code"]) == (400, "INVALID_PARAMETER_VALUE"), answer.text
        assert "limit is" in said["message"]


def test_searches_within_the_bounds_are_answered(url: str) -> None:
    several = " and ".join(f"metrics.m{n} > {n}" for n in range(10))
    body = {"experiment_ids": ["0"], "filter": several, "order_by": ["metrics.m1", "start_time DESC"]}
    assert requests.post(f"{url}/api/2.0/mlflow/runs/search", json=body, timeout=60).status_code == 200


def test_too_long_body_is_refused_before_parsing(url: str) -> None:
    content = b'{"experiment_ids": [' + b'"0",' * 300_000 + b'"0"]}'
    refused = requests.post(f"{url}/api/2.0/mlflow/runs/search", data=content, timeout=60)
    assert refused.status_code == 413
    assert f"{len(content):,} bytes" in refused.json()["message"]


@pytest.mark.parametrize(
    "route", ["runs/create", "runs/search", "experiments/set-experiment-tag", "experiments/create"]
)
def test_json_that_nests_too_deeply_is_a_bad_request(url: str, route: str) -> None:
    content = b'{"experiment_ids": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    headers = {"Content-Type": "application/json"}
    refused = requests.post(f"{url}/api/2.0/mlflow/{route}", data=content, headers=headers, timeout=60)
    assert refused.status_code == 400, refused.text
    assert "nests too deeply" in refused.json()["message"]


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("/api/2.0/mlflow/metrics/get-history?run_id=x&metric_key=%00", "NUL character"),
        ("/ajax-api/2.0/mlflow/metrics/get-history-bulk-interval?run_ids=x&metric_key=a%00b&max_results=5", "NUL"),
        ("/get-artifact?run_uuid=x&path=..%5cx", "Invalid path"),
        ("/api/2.0/mlflow-artifacts/artifacts/..%5cx", "Invalid path"),
        ("/api/2.0/mlflow-artifacts/artifacts?path=..%5cx", "Invalid path"),
        ("/graphql", "GraphQL"),
        ("/graphql?operationName=x", "GraphQL"),
        ("/graphql?query={__typename}", "GraphQL"),
    ],
)
def test_get_that_cannot_be_answered_is_a_bad_request(url: str, path: str, sentence: str) -> None:
    refused = requests.get(url + path, timeout=60)
    assert (refused.status_code, refused.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE"), refused.text
    assert sentence in refused.json()["message"]


@pytest.mark.parametrize("body", [{}, {"query": None}, {"query": 5}, [], {"variables": {}}])
def test_graphql_without_its_text_is_a_bad_request(url: str, body: Any) -> None:
    refused = requests.post(f"{url}/graphql", json=body, timeout=60)
    assert refused.status_code == 400, refused.text
    assert requests.post(f"{url}/graphql", json={"query": "{ __typename }"}, timeout=60).status_code == 200


LOCATIONS = [{"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": "0"}}]
TOKENS = ["eyJvZmZzZXQiOiAxZTk5OX0=", "MWU5OTk=", "W10=", "e30=", "bnVsbA==", "//8=", "é", "eyJvZmZzZXQiOiBOYU59"]
"""Malformed page tokens. The seventh is the letter é itself. The others are base64 of {"offset": 1e999}, 1e999, [], {},
null, two bytes that are not UTF-8, and {"offset": NaN}."""


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize(
    ("method", "route", "body"),
    [
        ("POST", "2.0/mlflow/runs/search", {"experiment_ids": ["0"]}),
        ("POST", "2.0/mlflow/experiments/search", {"max_results": 5}),
        ("POST", "2.0/mlflow/logged-models/search", {"experiment_ids": ["0"]}),
        (
            "POST",
            "3.0/mlflow/traces/search",
            {"locations": LOCATIONS},
        ),
        ("GET", "2.0/mlflow/registered-models/search", {}),
        ("GET", "2.0/mlflow/model-versions/search", {}),
    ],
)
def test_a_page_token_that_is_none_is_a_bad_request(
    url: str, method: str, route: str, body: dict[str, Any], token: str
) -> None:
    sent: Any = {"params" if method == "GET" else "json": {**body, "page_token": token}}
    refused = requests.request(method, f"{url}/api/{route}", timeout=60, **sent)
    assert refused.status_code == 400, refused.text


@pytest.mark.parametrize("seconds", [3601, "86400", 10**9, -1])
def test_a_presigned_address_holds_for_an_hour_at_most(url: str, seconds: Any) -> None:
    for way in ("upload", "download"):
        body = {"run_id": "x", "path": "x", "expiration": seconds}
        refused = requests.post(f"{url}/api/2.0/mlflow/artifacts/presigned-{way}-url", json=body, timeout=60)
        assert refused.status_code == 400
        assert f"expiration is {seconds} seconds" in refused.json()["message"]
    within: dict[str, Any] = {"run_id": "x", "path": "x", "expiration": 3600}
    answer = requests.post(f"{url}/api/2.0/mlflow/artifacts/presigned-upload-url", json=within, timeout=60)
    assert "expiration" not in answer.text, "MLflow answers it"
    within["expiration"] = 3601
    target = f"{url}/api/2.0/mlflow/artifacts/presigned-upload-url"
    assert "expiration is 3601" in requests.post(target, json=json.dumps(within), timeout=60).text


def test_compressed_traces_are_limited_by_their_decompressed_size(url: str) -> None:
    bomb = gzip.compress(bytes(request_limits.DECOMPRESSED_BYTES + 1))
    headers = {"Content-Type": "application/x-protobuf", "Content-Encoding": "gzip", "x-mlflow-experiment-id": "0"}
    refused = requests.post(f"{url}/v1/traces", data=bomb, headers=headers, timeout=60)
    assert refused.status_code == 413 and f"{request_limits.DECOMPRESSED_BYTES:,}" in refused.text
    damaged = requests.post(f"{url}/v1/traces", data=bomb[:-9], headers=headers, timeout=60)
    assert damaged.status_code in (400, 413)


def test_mlflow_gets_compressed_traces_decompressed_whatever_it_calls_its_own_function() -> None:
    got: list[tuple[dict[bytes, bytes], bytes | None]] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        got.append((dict(scope["headers"]), await whole(receive)))

    async def receive() -> Message:
        return {"type": "http.request", "body": gzip.compress(b"spans"), "more_body": False}

    headers = [(b"content-encoding", b"GZIP"), (b"content-length", b"25"), (b"x-mlflow-experiment-id", b"0")]

    async def ask(path: str) -> None:
        scope = {"type": "http", "path": path, "headers": headers}
        await request_limits.inflating(application)(scope, receive, unsent)

    asyncio.run(ask("/v1/traces"))
    assert got == [({b"content-length": b"5", b"x-mlflow-experiment-id": b"0"}, b"spans")]
    asyncio.run(ask("/api/2.0/mlflow/runs/search"))
    assert got[1] == (dict(headers), gzip.compress(b"spans"))


def test_decompression_within_the_bound_is_mlflows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_limits, "DECOMPRESSED_BYTES", 1000)
    content = bytes(range(250)) * 4
    raw = zlib.compressobj(wbits=-15)
    for encoding, body in (
        ("gzip", gzip.compress(content)),
        ("gzip", gzip.compress(content[:500]) + gzip.compress(content[500:]) + b"\0" * 8),
        ("deflate", zlib.compress(content)),
        ("deflate", raw.compress(content) + raw.flush()),
    ):
        assert request_limits.decompressed(body, encoding) == content
    for encoding, body, status in (
        ("gzip", gzip.compress(content + b"!"), 413),
        ("gzip", gzip.compress(content) + gzip.compress(b"!"), 413),
        ("deflate", zlib.compress(content + b"!"), 413),
        ("gzip", gzip.compress(content)[:-1], 400),
        ("gzip", b"plain", 400),
        ("gzip", b"", 400),
        ("deflate", b"plain", 400),
        ("br", content, 400),
    ):
        with pytest.raises(fastapi.HTTPException) as refused:
            request_limits.decompressed(body, encoding)
        assert refused.value.status_code == status


SHORT = {b"content-length": b"2"}


def scope(
    user: bytes, path: str = "/api/2.0/mlflow/runs/search", headers: dict[bytes, bytes] = SHORT
) -> dict[str, Any]:
    known = {request_limits.USER: user} if user else {}
    return {"type": "http", "method": "POST", "path": path, "headers": list((known | headers).items())}


async def unread() -> Message:
    pytest.fail("the application reads the request's body")


async def unsent(message: Message) -> None:
    pytest.fail(f"the application sends {message}")


def test_a_request_that_waits_too_long_for_its_turn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_limits, "WAIT_SECONDS", 0.2)
    ended = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await ended.wait()

    async def run() -> tuple[list[Message], list[Message]]:
        application = request_limits.shared(slow, 1)
        user = [(request_limits.USER, b"ada")]
        scope = {"type": "http", "method": "POST", "path": "/graphql", "headers": user}
        sent: tuple[list[Message], list[Message]] = ([], [])

        async def ask(number: int) -> None:
            async def keep(message: Message) -> None:
                sent[number].append(message)

            await application(scope, lambda: asyncio.sleep(0), keep)  # type: ignore[arg-type,return-value]

        first = asyncio.create_task(ask(0))
        await asyncio.sleep(0)
        await asyncio.wait_for(ask(1), timeout=10)
        ended.set()
        await first
        await ask(0)
        return sent

    first, second = asyncio.run(run())
    assert first == [] and second[0]["status"] == 429 and b"send fewer at once" in second[1]["body"]


@pytest.mark.parametrize(("error", "status"), [(MemoryError(), 400), (ValueError(request_limits.NO_THREAD), 500)])
def test_a_500_that_starlette_sent_for_a_lack_of_memory_is_replaced(
    error: Exception, status: int, ended: list[int]
) -> None:
    from starlette.applications import Starlette
    from starlette.routing import Route

    async def raised(_: Any) -> Any:
        raise error

    application = request_limits.within_memory(Starlette(routes=[Route("/graphql", raised, methods=["POST"])]))
    sent: list[Message] = []

    async def run() -> None:
        async def keep(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/graphql", "headers": [], "query_string": b""}
        try:
            await application(scope, lambda: asyncio.sleep(0), keep)  # type: ignore[arg-type,return-value]
        except ValueError:
            assert status == 500

    asyncio.run(run())
    assert sent[0]["status"] == status and len([each for each in sent if "status" in each]) == 1


def test_one_user_leaves_a_thread_to_the_others() -> None:
    """Ten requests of the user ada run two at a time. A request of the user bob and a request for an artifact do not
    wait for ada's requests."""
    running: list[bytes] = []
    most = 0

    async def slow(given: Any, receive: Any, send: Any) -> None:
        nonlocal most
        user = dict(given["headers"]).get(request_limits.USER, b"")
        running.append(user)
        most = max(most, running.count(b"ada"))
        await (asyncio.sleep(0.05) if user == b"ada" else asyncio.sleep(0))
        running.remove(user)

    async def play() -> None:
        application = request_limits.shared(slow, 2)
        everyone = [asyncio.ensure_future(application(scope(b"ada"), unread, unsent)) for _ in range(10)]
        await asyncio.sleep(0)
        for other in (scope(b"bob"), scope(b""), scope(b"bob", "/get-artifact")):
            await asyncio.wait_for(application(other, unread, unsent), 0.04)
        await asyncio.gather(*everyone)

    asyncio.run(play())
    assert most == 2


class Counted:
    """An application that counts its concurrent requests for each user."""

    def __init__(self) -> None:
        self.running: list[tuple[bytes, str]] = []
        self.most: dict[tuple[bytes, str], int] = {}

    async def __call__(self, given: Any, receive: Any, send: Any) -> None:
        one = given["headers"][0][1], given["path"]
        self.running.append(one)
        self.most[one] = max(self.most.get(one, 0), self.running.count(one))
        await asyncio.sleep(0.01)
        self.running.remove(one)


def test_dear_requests_and_large_bodies_take_fewer_turns_than_others() -> None:
    seen = Counted()
    large = {b"content-length": b"3000000"}
    kinds = [
        scope(b"ada"),
        scope(b"ada", "/api/2.0/mlflow/runs/log-batch"),
        scope(b"ada", "/v1/traces"),
        scope(b"ada", "/graphql"),
        scope(b"ada", "/ajax-api/2.0/mlflow/metrics/get-history-bulk-interval"),
        scope(b"ada", "/api/3.0/mlflow/datasets/d/records", large),
        scope(b"bob", "/api/3.0/mlflow/datasets/d/records", large),
        scope(b"bob", "/api/2.0/mlflow-artifacts/mpu/create/x", large),
        scope(b"eve", "/api/2.0/mlflow-artifacts/mpu/create/x", {}),
        scope(b"eve", "/api/2.0/mlflow-artifacts/mpu/create/y"),
    ]

    async def play() -> None:
        application = request_limits.shared(seen, 6)
        await asyncio.gather(*(application(each, unread, unsent) for each in kinds * 10))

    asyncio.run(play())
    assert [seen.most[one["headers"][0][1], one["path"]] for one in kinds] == [
        request_limits.DEAR_AT_ONCE, 6, 1, 1, 1, 1, 1, 1, 1, 10,
    ]  # fmt: skip


def export(count: int) -> bytes:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    sent = ExportTraceServiceRequest()
    scope_spans = sent.resource_spans.add().scope_spans.add()
    for number in range(1, count + 1):
        times = {"start_time_unix_nano": number, "end_time_unix_nano": number + 1}
        scope_spans.spans.add(name="s", trace_id=number.to_bytes(16, "big"), span_id=number.to_bytes(8, "big"), **times)
    return bytes(sent.SerializeToString())


OTLP = {"Content-Type": "application/x-protobuf", "x-mlflow-experiment-id": "0"}


@pytest.mark.parametrize("kind", ["protobuf", "gzip", "JSON"])
def test_spans_of_one_export_are_bounded(url: str, kind: str) -> None:
    body, headers = export(request_limits.SPANS + 1), OTLP
    if kind == "gzip":
        body, headers = gzip.compress(body), OTLP | {"Content-Encoding": "gzip"}
    if kind == "JSON":
        spans = [{"traceId": "0" * 31 + "1", "spanId": f"{number:016x}"} for number in range(request_limits.SPANS + 1)]
        body = json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]}).encode()
        headers = OTLP | {"Content-Type": "application/json"}
    refused = requests.post(f"{url}/v1/traces", data=body, headers=headers, timeout=60)
    assert refused.status_code == 413 and f"more than {request_limits.SPANS:,} spans" in refused.text
    assert requests.post(f"{url}/v1/traces", data=export(3), headers=OTLP, timeout=60).status_code == 200


def test_an_export_of_spans_holds_up_no_other_request(url: str) -> None:
    """MLflow converts the spans in the event loop, where a long conversion could delay other requests."""
    slowest = 0.0
    with ThreadPoolExecutor(1) as beside:
        sent = beside.submit(requests.post, f"{url}/v1/traces", data=export(2000), headers=OTLP, timeout=300)
        asked = 0
        while not sent.done():
            begun = time.monotonic()
            assert requests.get(f"{url}/version", timeout=60).status_code == 200
            slowest, asked = max(slowest, time.monotonic() - begun), asked + 1
    assert sent.result().status_code == 200
    assert asked > 5 and slowest < sent.result().elapsed.total_seconds() / 2


@pytest.mark.parametrize("route", ["mlflow/v1/chat/completions", "anthropic/v1/messages", "openai/v1/embeddings"])
@pytest.mark.parametrize("body", [b"[]", b"5"])
def test_the_gateway_refuses_json_that_is_no_object(url: str, route: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    refused = requests.post(f"{url}/gateway/{route}", data=body, headers=headers, timeout=60)
    assert refused.status_code == 400 and "must be an object" in refused.json()["message"]
    assert requests.post(f"{url}/gateway/{route}", json={"model": "none"}, timeout=60).status_code in (400, 404, 422)


def test_queries_of_a_dear_request_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException

    request_limits.check_time()
    monkeypatch.setattr(request_limits.THIS_THREAD, "until", time.monotonic() + 60)
    request_limits.check_time()
    monkeypatch.setattr(request_limits.THIS_THREAD, "until", time.monotonic() - 1)
    with pytest.raises(MlflowException, match="took longer than 60 seconds") as refused:
        request_limits.check_time()
    assert refused.value.get_http_status_code() == 400


@pytest.mark.parametrize(
    ("request_line", "dear"),
    [
        ("POST /api/2.0/mlflow/runs/search", True),
        ("GET /ajax-api/2.0/mlflow/metrics/get-history-bulk-interval", True),
        ("GET /api/2.0/mlflow/metrics/get-history", True),
        ("POST /graphql", True),
        ("POST /ajax-api/3.0/mlflow/traces/metrics", True),
        ("GET /api/2.0/mlflow/traces", True),
        ("POST /api/3.0/mlflow/traces", False),
        ("POST /api/2.0/mlflow/runs/log-batch", False),
        ("GET /api/2.0/mlflow/runs/get", False),
    ],
)
def test_searches_histories_and_traces_are_dear(request_line: str, dear: bool) -> None:
    assert request_limits.is_dear(*request_line.split()) is dear


def test_health_distinguishes_a_busy_process_from_a_lost_database(url: str, tmp_path: Path) -> None:
    assert requests.get(url + health.PATH, timeout=10).status_code == 200
    said: list[int] = []

    async def busy(given: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        said.append(message.get("status", 0))

    async def play(uri: str) -> int:
        application = health.with_health(busy, uri)
        long = [asyncio.ensure_future(application(scope(b"ada"), unread, unsent)) for _ in range(50)]
        await asyncio.sleep(0)
        await application(scope(b"", health.PATH), unread, send)
        for each in long:
            each.cancel()
        return said[-2]

    create_schema(f"sqlite:///{tmp_path}/mlflow.db")
    assert asyncio.run(play(f"sqlite:///{tmp_path}/mlflow.db")) == 200
    assert asyncio.run(play(f"sqlite:///{tmp_path}/none/mlflow.db")) == 503


def test_health_waits_for_a_database_that_hangs_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        application = health.with_health(lambda *_: asyncio.sleep(0), f"postgresql+psycopg2://x@127.0.0.1:{port}/x")
        said: list[Any] = []

        async def send(message: Any) -> None:
            said.append(message)

        async def play() -> None:
            await application(scope(b"", health.PATH), unread, send)

        async def with_end() -> None:
            await asyncio.wait_for(play(), 2)
            silent.close()

        asyncio.run(with_end())
        assert said[0]["status"] == 503


@pytest.mark.parametrize("code", ["57014", "53200", "54001"])
def test_a_statement_that_was_ended_for_its_cost_is_said_so(code: str) -> None:
    class Ended(Exception):
        pgcode = code

    sentence = refusals.too_dear(Ended())
    assert sentence and sentence.endswith("use a narrower filter, or request fewer results at once.")
    assert refusals.too_dear(ValueError()) is None


def test_a_statement_that_postgresql_ended_is_a_bad_request(tmp_path_factory: pytest.TempPathFactory) -> None:
    """If PostgreSQL ends a statement, plain MLflow answers 503, and clients repeat the request seven times."""
    import sqlalchemy
    from mlflow.exceptions import MlflowException
    from mlflow.store.db.utils import create_sqlalchemy_engine

    with postgresql(tmp_path_factory.mktemp("ended") / "cluster") as cluster:
        limit = "&options=-c%20statement_timeout%3D100ms"
        engine = create_sqlalchemy_engine(db_connections.through_plugin(cluster.uri("postgres") + limit))
        with engine.connect() as connection:
            with pytest.raises(MlflowException, match="longer than the server allows") as refused:
                connection.execute(sqlalchemy.text("SELECT pg_sleep(5)"))
            assert refused.value.get_http_status_code() == 400
        engine.dispose()


@pytest.mark.parametrize("body", [b"[]", b"5", b"true", b'[{"run_id": "x"}]'])
@pytest.mark.parametrize(
    ("method", "route"),
    [
        ("POST", "runs/log-batch"),
        ("PATCH", "registered-models/update"),
        ("DELETE", "registered-models/delete"),
        ("POST", "webhooks"),
        ("POST", "../mlflow-artifacts/mpu/create/1/x"),
    ],
)
def test_json_that_is_no_object_is_a_bad_request(url: str, method: str, route: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    refused = requests.request(method, f"{url}/api/2.0/mlflow/{route}", data=body, headers=headers, timeout=60)
    assert (refused.status_code, refused.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE"), refused.text
    assert "must be an object" in refused.json()["message"]


@pytest.mark.parametrize(("route", "status"), [("runs/create", 400), ("runs/search", 200), ("runs/searches", 404)])
def test_a_list_that_mlflow_answers_itself_is_left_to_it(url: str, route: str, status: int) -> None:
    """MLflow reads an empty list as an object without fields."""
    headers = {"Content-Type": "application/json"}
    answer = requests.post(f"{url}/api/2.0/mlflow/{route}", data=b"[]", headers=headers, timeout=60)
    assert answer.status_code == status and "must be an object" not in answer.text


def test_a_batch_that_is_no_json_is_a_bad_request_and_double_encoded_json_is_read(url: str) -> None:
    headers = {"Content-Type": "application/json"}
    batch = f"{url}/api/2.0/mlflow/runs/log-batch"
    assert requests.post(batch, data=b"[", headers=headers, timeout=60).status_code == 400
    twice = json.dumps(json.dumps({"max_results": 1}))
    found = requests.post(f"{url}/api/2.0/mlflow/experiments/search", data=twice, headers=headers, timeout=60)
    assert (found.status_code, len(found.json()["experiments"])) == (200, 1)
