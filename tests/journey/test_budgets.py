"""32 clients of one user send the most expensive request of each kind while a second user logs metrics. No request may
delay the second user by more than a second, and no request may end a process.

The tests have their own stack, a t3.small. The stack's database has a metric with two million points, a thousand runs
with a hundred metrics each, traces and registered models.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Queue
from typing import Any

import pytest
import requests

from mlflow_host.server.request_limits import CONDITIONS, ORDERS
from scripts.local_cloud import LocalCloud
from tests.support.servers import Server, launch_server, on_machine, own_stack, script

pytestmark = [pytest.mark.machine, pytest.mark.slow]

CLIENTS = 32
SECONDS = 15.0
PATIENCE_SECONDS = 600
SLOWEST_SECONDS = 1.0
POINTS = 2_000_000
RUNS, METRICS = 1000, 100
TRACES = 400
FILE_BYTES = 64 << 20

SEED = f"""
INSERT INTO runs (run_uuid, name, user_id, status, start_time, end_time, lifecycle_stage, artifact_uri, experiment_id)
SELECT 'budget' || lpad(n::text, 26, '0'), 'run-' || n, 'ada', 'FINISHED', n, n, 'active', 'mlflow-artifacts:/0/b', 0
FROM generate_series(1, {RUNS}) n;
INSERT INTO latest_metrics (run_uuid, key, value, timestamp, step, is_nan)
SELECT 'budget' || lpad(n::text, 26, '0'), 'm' || m, n * m / 7.0, n, m, false
FROM generate_series(1, {RUNS}) n, generate_series(1, {METRICS}) m;
INSERT INTO params (run_uuid, key, value)
SELECT 'budget' || lpad(n::text, 26, '0'), 'p' || m, 'value ' || n
FROM generate_series(1, {RUNS}) n, generate_series(1, 50) m;
INSERT INTO tags (run_uuid, key, value)
SELECT 'budget' || lpad(n::text, 26, '0'), 't' || m, 'value ' || n
FROM generate_series(1, {RUNS}) n, generate_series(1, 20) m;
INSERT INTO metrics (run_uuid, key, value, timestamp, step, is_nan)
SELECT 'budget' || lpad('1', 26, '0'), 'loss', n / 7.0, n, n, false FROM generate_series(1, {POINTS}) n;
ANALYZE;
"""
RUN_IDS = [f"budget{number:026}" for number in range(1, RUNS + 1)]
HEAVY = RUN_IDS[0]


@dataclass(frozen=True)
class Request:
    path: str
    method: str = "GET"
    options: Mapping[str, Any] = field(default_factory=dict)


def post(path: str, body: Any) -> Request:
    return Request(path, "POST", {"json": body})


def searching(**fields: Any) -> Request:
    return post("/api/2.0/mlflow/runs/search", {"experiment_ids": ["0"], "max_results": 50_000} | fields)


def by_graphql(count: int = 3, **fields: Any) -> Request:
    """Return one GraphQL request with `count` searches."""
    fragment = "runs { info { runId } data { metrics { key value } params { key value } } modelVersions { name } }"
    searches = " ".join(f"s{number}: mlflowSearchRuns(input: $input) {{ {fragment} }}" for number in range(count))
    query = f"query q($input: MlflowSearchRunsInput) {{ {searches} }}"
    return post("/graphql", {"query": query, "variables": {"input": {"experimentIds": ["0"], **fields}}})


def history(kind: str, **query: Any) -> Request:
    return Request(f"/ajax-api/2.0/mlflow/metrics/{kind}", options={"params": {"metric_key": "loss"} | query})


def of_traces(route: str, **body: Any) -> Request:
    where = [{"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": "0"}}]
    return post(f"/ajax-api/3.0/mlflow/traces/{route}", {"locations": where} | body)


def spans(count: int, text: str = "") -> bytes:
    """Return an OpenTelemetry export of `count` traces with one span each."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    sent = ExportTraceServiceRequest()
    scope = sent.resource_spans.add().scope_spans.add()
    for number in range(count):
        span = scope.spans.add(name="predict", trace_id=uuid.uuid4().bytes, span_id=os.urandom(8))
        span.start_time_unix_nano = time.time_ns() + number
        span.end_time_unix_nano = span.start_time_unix_nano + 1000
        if text:
            span.attributes.add(key="mlflow.spanInputs").value.string_value = json.dumps(f"{number} {text}")
    return bytes(sent.SerializeToString())


OTLP = {"Content-Type": "application/x-protobuf", "x-mlflow-experiment-id": "0"}


def export(content: bytes) -> Request:
    return Request("/v1/traces", "POST", {"data": content, "headers": OTLP})


def widest_json() -> bytes:
    """Return 15 MiB of JSON in the form that needs the most memory after parsing."""
    return b'{"records": [' + b'{"a":1},' * (15 * 2**20 // 8) + b"{}]}"


JSON = {"Content-Type": "application/json"}
KINDS: dict[str, Callable[[], list[Request]]] = {
    "search": lambda: [searching(filter=" and ".join(f"metrics.m{n} > -{n}" for n in range(1, CONDITIONS + 1)))],
    "order": lambda: [searching(order_by=[f"metrics.m{n} DESC" for n in range(1, ORDERS + 1)])],
    "search and order": lambda: [
        searching(
            filter=" and ".join(f"params.p{n} LIKE '%v%'" for n in range(1, CONDITIONS + 1)),
            order_by=[f"metrics.m{n} DESC" for n in range(1, ORDERS + 1)],
        )
    ],
    "conditions beyond the limit": lambda: [
        searching(filter=" and ".join(f"metrics.m{n} > {n}" for n in range(200))),
        by_graphql(filter=" and ".join(f"metrics.m{n} > {n}" for n in range(200))),
    ],
    "history of all points": lambda: [
        history("get-history", run_id=HEAVY),
        history("get-history", run_id=HEAVY, max_results=2_000_000_000),
        history("get-history", run_id=HEAVY, max_results=50_000),
    ],
    "GraphQL": lambda: [by_graphql(), by_graphql(maxResults=50_000), by_graphql(10, maxResults=100)],
    "bulk histories": lambda: [
        history("get-history-bulk", run_id=RUN_IDS[:100]),
        history("get-history-bulk-interval", run_ids=[HEAVY] * 100, max_results=2500),
        history("get-history-bulk-interval", run_ids=[HEAVY] * 40, max_results=2500),
    ],
    "traces with text search": lambda: [
        of_traces("search", filter="trace.text LIKE '%needle%'", max_results=500),
        of_traces("search", filter=" and ".join(f"tags.t{n} LIKE '%x%'" for n in range(CONDITIONS)), max_results=500),
    ],
    "compare pages": lambda: [searching(filter="", max_results=1000)],
    "registry searches": lambda: [
        Request("/api/2.0/mlflow/registered-models/search", options={"params": {"max_results": 1000}}),
        Request(
            "/api/2.0/mlflow/model-versions/search",
            options={"params": {"max_results": 10_000, "filter": "name LIKE '%a%'"}},
        ),
    ],
    "artifacts": lambda: [Request("/get-artifact", options={"params": {"run_uuid": HEAVY, "path": "large.bin"}})],
    "OpenTelemetry": lambda: [export(spans(9_000)), export(spans(400_000))],
    "large bodies": lambda: [
        Request("/api/3.0/mlflow/datasets/d-1/records", "POST", {"data": widest_json(), "headers": JSON}),
        Request("/api/2.0/mlflow-artifacts/mpu/create/x", "POST", {"data": widest_json(), "headers": JSON}),
    ],
    "deletes and writes": lambda: [
        post("/api/2.0/mlflow/runs/create", {"experiment_id": "0", "tags": [{"key": "k", "value": "v" * 5000}] * 200}),
        post("/api/2.0/mlflow/runs/log-batch", {"run_id": RUN_IDS[5], "metrics": batch(1000)}),
    ],
}


def batch(count: int, step: int = 0) -> list[dict[str, Any]]:
    return [{"key": f"b{n}", "value": n / 7, "timestamp": 1_700_000_000_000, "step": step} for n in range(count)]


@pytest.fixture(scope="module")
def own(cloud: LocalCloud, image: Mapping[str, Any]) -> Iterator[Server]:
    with own_stack(cloud, "budgets"):
        server = launch_server("--ami", image["ami_id"])
        psql = ["runuser", "-u", "postgres", "--", "psql", "-qXd", "mlflow", "-v", "ON_ERROR_STOP=1", "-c", SEED]
        on_machine(cloud, server, *psql)
        for number in range(100):
            made = {"name": f"model-a-{number}"}
            assert server.ask(API + "registered-models/create", "POST", auth=server.login, json=made).ok
        sent = export(spans(TRACES, "a text of some length " * 50))
        assert server.ask(sent.path, sent.method, auth=server.login, timeout=60, **sent.options).ok
        file = "/api/2.0/mlflow-artifacts/artifacts/0/b/large.bin"
        assert server.ask(file, "PUT", auth=server.login, timeout=120, data=os.urandom(FILE_BYTES)).ok
        yield server


API = "/api/2.0/mlflow/"


@pytest.fixture(scope="module")
def sender(own: Server) -> tuple[str, str]:
    """Create the user who sends the expensive requests."""
    login = "sender", script("users.py", "add", "sender").stdout.strip()
    deadline = time.monotonic() + 90
    while own.ask("/version", auth=login).status_code != 200:
        assert time.monotonic() < deadline, "the server does not take the new user within 90 s"
        time.sleep(2)
    return login


def log_until(server: Server, run_id: str, ended: Any, latencies: Queue[list[float]]) -> None:
    """Log batches of ten metrics in a separate process, like a training script, until `ended` is set."""
    taken = []
    session = requests.Session()
    for step in itertools.count():
        if ended.is_set():
            break
        body: Any = {"run_id": run_id, "metrics": batch(10, step)}
        begun = time.monotonic()
        answer = session.post(
            server.url + API + "runs/log-batch",
            json=body,
            auth=server.login,
            timeout=PATIENCE_SECONDS,
            verify=server.server_certificate or True,
        )
        taken.append(time.monotonic() - begun if answer.status_code == 200 else float("inf"))
    latencies.put(taken)


def send(server: Server, login: tuple[str, str], dear: list[Request], until: float) -> list[tuple[int, str]]:
    """Send the requests in `dear` one after the other until `until`. Returns each response's status and first 500
    bytes."""
    found = []
    for request in itertools.cycle(dear):
        if time.monotonic() > until:
            break
        with server.ask(
            request.path, request.method, auth=login, timeout=PATIENCE_SECONDS, stream=True, **request.options
        ) as answer:
            first = b""
            for piece in answer.iter_content(1 << 16):
                first = first or piece[:500]
            found.append((answer.status_code, first.decode(errors="replace")))
    return found


def processes(cloud: LocalCloud, server: Server) -> str:
    line = (
        "systemctl show --property=Id,MainPID,NRestarts 'mlflow-server@*' mlflow-host-postgresql nginx; "
        "grep -hs oom_kill /sys/fs/cgroup/memory.events /sys/fs/cgroup/memory/memory.oom_control; "
        "journalctl --no-pager -u mlflow-host-postgresql | grep -cE 'server process .* was terminated'"
    )
    return cloud.exec(server.instance_id, ["sh", "-c", line], timeout=120).stdout


@pytest.mark.parametrize("kind", KINDS)
def test_another_user_logs_on_and_nothing_ends(
    kind: str, own: Server, sender: tuple[str, str], cloud: LocalCloud
) -> None:
    body = {"experiment_id": "0", "start_time": 1}
    made = own.ask(API + "runs/create", "POST", auth=own.login, json=body).json()["run"]["info"]["run_id"]
    before, dear = processes(cloud, own), KINDS[kind]()
    context = multiprocessing.get_context("fork")
    ended, latencies = context.Event(), context.Queue()
    other = context.Process(target=log_until, args=(own, made, ended, latencies))
    other.start()
    try:
        time.sleep(1)
        until = time.monotonic() + SECONDS
        with ThreadPoolExecutor(CLIENTS) as clients:
            sent = [
                clients.submit(send, own, sender, dear[number % len(dear) :] + dear[: number % len(dear)], until)
                for number in range(CLIENTS)
            ]
            answers = [answer for each in sent for answer in each.result()]
    finally:
        ended.set()
        taken = sorted(latencies.get(timeout=PATIENCE_SECONDS))
        other.join()
    slow = taken[int(0.99 * len(taken))] if taken else float("inf")
    statuses = Counter(status for status, _ in answers)
    print(f"{kind}: {dict(statuses)}; second user: {len(taken)} batches, p99 {slow:.2f} s, slowest {taken[-1]:.2f} s")
    wrong = {said for status, said in answers if not (status == 200 or (400 <= status < 500 and len(said) > 20))}
    assert (wrong, processes(cloud, own)) == (set(), before)
    assert slow < SLOWEST_SECONDS, f"the other's p99 is {slow:.2f} s"
