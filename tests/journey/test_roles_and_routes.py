"""The rights of each role: every route of the installed MLflow, with a login of each role."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
import requests

from mlflow_host.bake import reader_routes
from mlflow_host.bake.reader_routes import CHANGING_METHODS, Route
from tests.support.servers import Server, script

pytestmark = [pytest.mark.machine, pytest.mark.slow]

WITHOUT_WORKSPACES = re.compile(r"/mlflow/workspaces(/|$)")
"""MLflow answers 503 there unless the server was started with workspaces."""
MAKES_DATA = re.compile(r"/demo/")
"""Routes that create data for any request body."""


@pytest.fixture(scope="module")
def logins(server: Server) -> Iterator[dict[str, tuple[str, str]]]:
    """A user of each role."""
    made: dict[str, tuple[str, str]] = {}
    try:
        for role in ("reader", "writer", "admin"):
            name = f"matrix-{role}"
            made[role] = (name, script("users.py", "add", name, "--role", role).stdout.strip())
        deadline = time.monotonic() + 90
        while {server.ask("/version", auth=login).status_code for login in made.values()} != {200}:
            assert time.monotonic() < deadline, "the server does not accept the new users within 90 s"
            time.sleep(2)
        yield made
    finally:
        for name, _ in made.values():
            script("users.py", "remove", name)


@pytest.fixture(scope="module")
def routes() -> list[Route]:
    found = reader_routes.installed_routes()
    assert len(found) > 200
    return found


def asked(server: Server, login: tuple[str, str], routes: list[Route]) -> dict[Route, requests.Response]:
    """The response of each, with 1 for the variable parts of its path, and a body that is not an object, so that
    nothing is created."""
    answers = {}
    for route in routes:
        target = re.sub(r"<[^>]+>", "1", route.path)
        body = {} if route.method == "GET" else {"data": b"[]", "headers": {"Content-Type": "application/json"}}
        answers[route] = server.ask(target, route.method, auth=login, timeout=60, stream=True, **body)
        answers[route].close()
    return answers


def changes(route: Route, readable: set[str]) -> bool:
    return route.method in CHANGING_METHODS or (route.method == "POST" and route.path not in readable)


def test_reader_is_refused_only_changes(
    server: Server, logins: dict[str, tuple[str, str]], routes: list[Route]
) -> None:
    readable = set(reader_routes.sort_posts(routes)[0])
    answers = asked(server, logins["reader"], routes)
    let_through = [each for each in routes if changes(each, readable) and answers[each].status_code != 403]
    kept_out = [each for each in routes if not changes(each, readable) and answers[each].status_code in (401, 403)]
    assert (let_through, kept_out) == ([], [])


@pytest.mark.parametrize("role", ["writer", "admin"])
def test_a_writer_and_an_admin_are_refused_no_route(
    role: str, server: Server, logins: dict[str, tuple[str, str]], routes: list[Route]
) -> None:
    harmless = [each for each in routes if not MAKES_DATA.search(each.path)]
    answers = asked(server, logins[role], harmless)
    assert [each for each, answer in answers.items() if answer.status_code in (401, 403)] == []


@pytest.mark.parametrize("role", ["reader", "writer", "admin"])
def test_no_route_returns_500_for_an_unreadable_body(
    role: str, server: Server, logins: dict[str, tuple[str, str]], routes: list[Route]
) -> None:
    """After a 500 clients repeat the request for minutes, and each time a traceback is logged."""
    left_out = re.compile(f"{MAKES_DATA.pattern}|{WITHOUT_WORKSPACES.pattern}")
    answers = asked(server, logins[role], [each for each in routes if not left_out.search(each.path)])
    failed = [f"{each.method} {each.path}: {a.status_code}" for each, a in answers.items() if a.status_code >= 500]
    assert failed == []
