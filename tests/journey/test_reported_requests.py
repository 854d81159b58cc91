"""A launched machine responds correctly to requests from bug reports. tests/compare/test_same_answers.py compares the
responses with those of plain MLflow."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.compare.grammar import Request, get, post, run, with_run_ids
from tests.compare.reported import DEAR, METRIC, NAMED, REFUSED, TOKENS
from tests.support.servers import Server

pytestmark = pytest.mark.machine


@pytest.fixture(scope="module")
def runs(server: Server) -> list[str]:
    made = [ask(server, [], post("runs/create", {"experiment_id": "0", "start_time": 1})) for _ in range(3)]
    return [one.json()["run"]["info"]["run_id"] for one in made]


def ask(server: Server, runs: list[str], request: Request) -> Any:
    headers = {name: value for name, value in request.headers if name != "host"}
    target, body = (with_run_ids(text, runs) for text in (request.target, request.body))
    return server.ask(target.decode(), request.method, data=body, headers=headers, auth=server.login, timeout=60)


@pytest.mark.parametrize("name", NAMED)
def test_reported_requests_are_answered_as_mlflow_answers_them(server: Server, runs: list[str], name: str) -> None:
    request, status = NAMED[name]
    assert ask(server, runs, request).status_code == status


@pytest.mark.parametrize("name", DEAR)
def test_requests_that_cost_too_much_are_refused(server: Server, runs: list[str], name: str) -> None:
    assert ask(server, runs, DEAR[name]).status_code == 400


def test_negative_zero_is_stored_as_zero(server: Server, runs: list[str]) -> None:
    assert ask(server, runs, post("runs/log-metric", METRIC | {"value": -0.0})).status_code == 200
    found = ask(server, runs, get("runs/get", f"run_id={run(1)}")).json()["run"]["data"]["metrics"]
    assert [repr(one["value"]) for one in found if one["key"] == METRIC["key"]] == ["0.0"]


@pytest.mark.parametrize("name", REFUSED)
def test_text_that_postgresql_cannot_store_is_refused(server: Server, runs: list[str], name: str) -> None:
    answer = ask(server, runs, REFUSED[name])
    assert answer.status_code == 400 and "which PostgreSQL cannot store: remove it." in answer.json()["message"]


@pytest.mark.parametrize("token", TOKENS)
def test_page_tokens_of_malformed_json_are_refused(server: Server, runs: list[str], token: str) -> None:
    told = base64.b64encode(token.encode()).decode()
    answer = ask(server, runs, post("runs/search", {"experiment_ids": ["0"], "page_token": told}))
    assert answer.status_code == 400 and "Invalid page token" in answer.json()["message"]


def test_requests_beside_graphql_requests_succeed(server: Server) -> None:
    """MLflow imports its basic-auth application at each GraphQL request, and other requests look for that module."""
    query = {"query": 'query Q { test(inputString: "x") { output } }', "operationName": "Q"}

    def answer(number: int) -> int:
        if number % 2:
            found = server.ask("/graphql", "POST", json=query, auth=server.login)
        else:
            found = server.ask("/ajax-api/3.0/mlflow/assistant/config", auth=server.login)
        return found.status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(answer, range(200))) == {200}
