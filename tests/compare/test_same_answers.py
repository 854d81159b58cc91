"""Our server and plain MLflow give the same responses to generated requests and to requests from bug reports, and write
the same rows. `STATED` contains the intended differences:

| request | MLflow | here |
|---|---|---|
| text with a NUL character or half a surrogate pair | 500, 400 in other words, 200 if unused | 400 with a sentence |
| a body that is not JSON | 500, 400 in other words | 400 with a sentence |
| a body that is JSON, but not an object | 500 | 400 with a sentence |
| a page token that is base64 of JSON, but not a token | 500 | 400 with a sentence |
| JSON that nests too deeply for Python | 500 | 400 with a sentence |
| more than 30 conditions in a filter or 10 columns to order by | 200, or PostgreSQL's memory | 400 with a sentence |
| more than 100,000 points of several runs in one history | 200, or a process's memory | 400 with a sentence |
| more than 1,000 runs or 3 fields at the root in a GraphQL request | 200 up to 10 fields | an error in the response |

The reasons: PostgreSQL cannot store NUL characters or half surrogate pairs, and the refused page tokens never work.
After a response with status 500, a client repeats the request for minutes, so our server returns 400 instead. If a
batch contains refused text, MLflow stores the other parts of the batch, and our server stores nothing. The limits on
nesting, conditions, points and runs bound the cost of a request (server/request_limits.py).

The indentation of JSON is not compared. CORS headers are not compared if the request has no Origin.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench import environments as installed
from tests.compare.grammar import foundation, generated, get, post, run
from tests.compare.pair import Answer, Pair, pair
from tests.compare.reported import DEAR, METRIC, NAMED, NUL, REFUSED, TOKENS
from tests.schema.environments import releases, server_environment
from tests.support.services import PostgreSQL, postgresql

SEED = int(os.environ.get("MLFLOW_AMI_COMPARE_SEED", "20261129"))
IN_TEST, IN_TEST_COMPARE = 500, 10_000
STATED: tuple[tuple[str, set[int]], ...] = (
    ("which PostgreSQL cannot store: remove it.", {200, 400, 500}),
    ("the body of the request is not JSON", {400, 500}),
    ("the JSON of the request must be an object", {500}),
    ("send the next_page_token of the previous answer, or none.", {500}),
    ("the JSON of the request nests too deeply", {400, 500}),
    ("columns to order by; the limit is 10", {200, 400, 500}),
    ("conditions; the limit is 30: use fewer conditions", {200, 400, 500}),
)
"""Texts of our server's responses that may differ from MLflow's response, each with the statuses that MLflow may
return."""
PART = 500
"""The number of requests after which the tables of both databases are compared."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[PostgreSQL]:
    """Start PostgreSQL outside pytest's folder. When another pytest session begins, it removes the access of
    PostgreSQL's user to pytest's folder."""
    with (
        tempfile.TemporaryDirectory(prefix="mlflow-ami-compare-") as folder,
        postgresql(Path(folder) / "postgresql") as running,
    ):
        yield running


@pytest.fixture(scope="module", params=["default", "newest"])
def both(request: pytest.FixtureRequest, cluster: PostgreSQL, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run a pair of servers (plain MLflow and ours), first with the image's default MLflow release, then with the
    newest release."""
    python = installed.image() if request.param == "default" else server_environment(releases()[-1])
    with pair(tmp_path_factory.mktemp("servers") / request.param, cluster, python, request.param) as started:
        for one in foundation():
            own, ours = started.ask(one)
            assert own.status == 200 and own == ours, f"{one}\n{own}\n{ours}"
        yield started


@pytest.mark.parametrize("count", [IN_TEST, pytest.param(IN_TEST_COMPARE, marks=pytest.mark.slow)])
def test_generated_requests_are_answered_as_mlflow_answers_them(both: Pair, count: int) -> None:
    before = both.counts()
    different = []
    for number, request in enumerate(generated(SEED + count, count, started=count), 1):
        own, ours = both.ask(request)
        if own != ours and not is_stated(own, ours):
            different.append(f"{number}: {request}\nMLflow: {own}\nours:   {ours}")
        if number % PART == 0:
            assert_same_tables(both, number)
    assert not different, f"{len(different)} of {count}, seed {SEED + count}:\n\n" + "\n\n".join(different[:40])
    after = both.counts()
    for path in ("runs/create", "runs/log-metric", "runs/log-batch", "runs/search", "runs/get", "metrics/get-history"):
        for how in ("answered", "passed on"):
            counted = after[f"{path} {how}"] - before[f"{path} {how}"]
            assert counted > 0.01 * count, f"{counted} of {count} requests to {path} were {how}"


def is_stated(own: Answer, ours: Answer) -> bool:
    return ours.status == 400 and any(said in ours.body and own.status in statuses for said, statuses in STATED)


def assert_same_tables(both: Pair, number: int) -> None:
    own, ours = both.own.tables(), both.ours.tables()
    for table, rows in own.items():
        only = sorted(set(rows) - set(ours[table])), sorted(set(ours[table]) - set(rows))
        assert rows == ours[table], f"{table} after {number} requests: MLflow only and ours only: {only}"


# Requests of bug reports


@pytest.mark.parametrize("name", NAMED)
def test_requests_of_bug_reports_are_answered_as_mlflow_answers_them(both: Pair, name: str) -> None:
    request, status = NAMED[name]
    own, ours = both.ask(request)
    assert (ours == own or is_stated(own, ours)) and ours.status == status


@pytest.mark.parametrize("name", DEAR)
def test_requests_that_cost_too_much_are_refused(both: Pair, name: str) -> None:
    own, ours = both.ask(DEAR[name])
    assert own != ours and is_stated(own, ours)


@pytest.mark.parametrize("path", ["runs/log-metric", "runs/log-batch"])
def test_negative_zero_is_stored_as_zero(both: Pair, path: str) -> None:
    metric = METRIC | {"key": path, "value": -0.0}
    batch = {"run_id": metric.pop("run_id"), "metrics": [metric]}
    own, ours = both.ask(post(path, batch if path == "runs/log-batch" else metric | {"run_id": run(1)}))
    assert own.status == ours.status == 200
    own, ours = both.ask(get("metrics/get-history", f"run_id={run(1)}&metric_key={path}&max_results=5"))
    assert own == ours and '"value": 0.0' in ours.body
    assert_same_tables(both, 1)


# Requests that are refused because MLflow would fail


@pytest.mark.parametrize("name", REFUSED)
def test_text_that_postgresql_cannot_store_is_refused(both: Pair, name: str) -> None:
    own, ours = both.ask(REFUSED[name])
    assert own.status == 500 and ours.status == 400
    assert json.loads(ours.body)["error_code"] == "INVALID_PARAMETER_VALUE"
    assert "contains a NUL character (U+0000), which PostgreSQL cannot store: remove it." in ours.body
    assert_same_tables(both, 1)


@pytest.mark.parametrize("name", ["params", "tags"])
def test_refused_batch_writes_nothing(both: Pair, name: str) -> None:
    text = [{"key": "fine", "value": "x"}, {"key": "k", "value": NUL}]
    key = f"beside {name}"
    batch = {"run_id": run(2), "metrics": [METRIC | {"key": key}], name: text}
    ours = both.ours.ask(post("runs/log-batch", batch))
    assert ours.status == 400 and f"The text of {name}[1].value contains a NUL character" in ours.body
    assert not any(key in row for row in both.ours.tables()["metrics"])
    assert_same_tables(both, 1)


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize(
    "path", ["runs/search", "metrics/get-history", "experiments/search", "registered-models/search"]
)
def test_page_tokens_of_malformed_json_are_refused(both: Pair, path: str, token: str) -> None:
    told = base64.b64encode(token.encode()).decode()
    fields = {"runs/search": {"experiment_ids": ["0"]}, "experiments/search": {}}.get(path)
    query = f"run_id={run(1)}&metric_key=loss&max_results=2&page_token={told}"
    request = get(path, query) if fields is None else post(path, fields | {"max_results": 2, "page_token": told})
    own, ours = both.ask(request)
    assert own.status == 500 and ours.status == 400
    assert f"Invalid page token '{told}': send the next_page_token of the previous answer, or none." in ours.body
