"""Test the rights of each role in MLflow: on every route of the installed release, and on other users' objects.

The two tables in infra/README.md contain the expected answers.
"""

from __future__ import annotations

import itertools
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import requests

from mlflow_host.bake import reader_routes
from mlflow_host.bake.reader_routes import READING_METHODS, Route
from tests.support.servers import REPOSITORY, Server

pytestmark = [pytest.mark.machine, pytest.mark.slow]

Login = tuple[str, str]
ROLES = ("reader", "writer", "admin")

READS = "`GET`, `HEAD`"
SEARCHES = "`POST` that only reads: searches and the like"
CHANGES = "other `POST`, `PUT`, `PATCH`, `DELETE`"
ASSISTANT = "the assistant's chats, skills and settings, which run programs on the server"

OF_THE_ASSISTANT = re.compile(
    r"\w+ .*/mlflow/assistant/(message|sessions/.+|skills/.+|providers/.+)|PUT .*/mlflow/assistant/config"
)
WITHOUT_WORKSPACES = re.compile(r"/mlflow/workspaces(/|$)")
"""MLflow answers 503 on workspace routes if the server was started without workspaces."""
MAKES_DATA = re.compile(r"/demo/")
"""Demo routes create data for any request, even without fields, so the tests do not call demo routes."""


def table(heading: str) -> dict[str, tuple[str, ...]]:
    """Return the table in infra/README.md with the first heading `heading`: name of a row → cells of the three
    roles."""
    text = (REPOSITORY / "infra" / "README.md").read_text()
    [rows] = re.findall(
        rf"^\| {heading} \| reader \| writer \| admin \|\n\|[-|]+\|\n((?:\|.*\|\n)+)", text, re.MULTILINE
    )
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()]
    return {name: tuple(said) for name, *said in cells}


# Routes


@pytest.fixture(scope="module")
def routes() -> list[Route]:
    found = [each for each in reader_routes.installed_routes() if not MAKES_DATA.search(each.path)]
    assert len(found) > 200
    return found


@pytest.fixture(scope="module")
def answers(server: Server, logins: dict[str, Login], routes: list[Route]) -> dict[str, dict[Route, tuple[int, str]]]:
    """Return status and text of the response to each role on each route. Variables in the path are replaced by 1 and
    the body has no fields, so no request creates an object."""
    found: dict[str, dict[Route, tuple[int, str]]] = {}
    for role in ROLES:
        found[role] = {}
        for route in routes:
            target = re.sub(r"<[^>]+>", "1", route.path)
            body = {} if route.method == "GET" else {"data": b"[]", "headers": {"Content-Type": "application/json"}}
            answer = server.ask(target, route.method, auth=logins[role], timeout=60, stream=True, **body)
            found[role][route] = (answer.status_code, answer.text[:200])
    return found


def kind(route: Route, searches: set[str]) -> str:
    if OF_THE_ASSISTANT.fullmatch(f"{route.method} {route.path}"):
        return ASSISTANT
    if route.method in READING_METHODS:
        return READS
    return SEARCHES if route.method == "POST" and route.path in searches else CHANGES


def test_every_route_is_open_to_the_roles_of_the_readme_and_to_no_other(
    routes: list[Route], answers: dict[str, dict[Route, tuple[int, str]]]
) -> None:
    searches = set(reader_routes.sort_posts(routes)[0])
    wanted = table("route of MLflow")
    assert list(wanted) == [READS, SEARCHES, CHANGES, ASSISTANT]
    assert {kind(each, searches) for each in routes} == set(wanted)
    wrong = []
    for route in routes:
        for role, said in zip(ROLES, wanted[kind(route, searches)], strict=True):
            status, text = answers[role][route]
            refused = status in (401, 403)
            if refused != (said == "no"):
                wrong.append(f"{role}: {route.method} {route.path} answers {status} {text}")
    assert wrong == []


def test_no_route_fails_on_what_it_cannot_read(answers: dict[str, dict[Route, tuple[int, str]]]) -> None:
    """After status 500 clients repeat a request for minutes, and the server logs a traceback each time."""
    failed = [
        f"{role}: {route.method} {route.path}: {status} {text}"
        for role, found in answers.items()
        for route, (status, text) in found.items()
        if status >= 500 and not WITHOUT_WORKSPACES.search(route.path)
    ]
    assert failed == []


# Things of others


Ask = Callable[..., requests.Response]
SECRET = "sk-" + uuid.uuid4().hex
ONE_EACH = itertools.count()


def unused(what: str) -> str:
    return f"{what}-{uuid.uuid4().hex[:8]}-{next(ONE_EACH)}"


@dataclass(frozen=True)
class Thing:
    """An object that a user created, with a request that shows the object, a text that the response contains, and a
    request that changes the object."""

    shown_by: tuple[str, str, dict[str, Any]]
    has: str
    changed_by: tuple[str, str, dict[str, Any]]


def made(answer: requests.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()


def experiment(ask: Ask) -> Thing:
    name = unused("experiment")
    found = made(ask("POST", "2.0/mlflow/experiments/create", json={"name": name}))["experiment_id"]
    tag = {"experiment_id": found, "key": "k", "value": "v"}
    return Thing(
        ("GET", "2.0/mlflow/experiments/get", {"params": {"experiment_id": found}}),
        name,
        ("POST", "2.0/mlflow/experiments/set-experiment-tag", {"json": tag}),
    )


def new_run(ask: Ask, name: str) -> dict[str, str]:
    body = {"experiment_id": "0", "run_name": name, "start_time": int(time.time() * 1000)}
    return dict(made(ask("POST", "2.0/mlflow/runs/create", json=body))["run"]["info"])


def run(ask: Ask) -> Thing:
    name = unused("run")
    found = new_run(ask, name)["run_id"]
    return Thing(
        ("GET", "2.0/mlflow/runs/get", {"params": {"run_id": found}}),
        name,
        ("POST", "2.0/mlflow/runs/set-tag", {"json": {"run_id": found, "key": "k", "value": "v"}}),
    )


def artifact(ask: Ask) -> Thing:
    content, found = unused("artifact"), new_run(ask, unused("run"))["run_id"]
    path = f"2.0/mlflow-artifacts/artifacts/0/{found}/artifacts/note.txt"
    made_by = ask("PUT", path, data=content.encode())
    assert made_by.status_code == 200, made_by.text
    return Thing(("GET", path, {}), content, ("PUT", path, {"data": content.encode()}))


def registered_model(ask: Ask, tags: tuple[dict[str, str], ...] = ()) -> Thing:
    name = unused("model")
    made(ask("POST", "2.0/mlflow/registered-models/create", json={"name": name, "tags": tags}))
    return Thing(
        ("GET", "2.0/mlflow/registered-models/get", {"params": {"name": name}}),
        name,
        ("PATCH", "2.0/mlflow/registered-models/update", {"json": {"name": name, "description": "changed"}}),
    )


def prompt(ask: Ask) -> Thing:
    return registered_model(ask, ({"key": "mlflow.prompt.is_prompt", "value": "true"},))


def trace(ask: Ask) -> Thing:
    found = f"tr-{uuid.uuid4().hex}"
    info = {
        "trace_id": found,
        "trace_location": {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": "0"}},
        "request_time": "2026-11-29T00:00:00Z",
        "state": "OK",
    }
    made(ask("POST", "3.0/mlflow/traces", json={"trace": {"trace_info": info}}))
    tag = {"key": "k", "value": "v"}
    return Thing(
        ("GET", f"3.0/mlflow/traces/{found}", {}), found, ("PATCH", f"3.0/mlflow/traces/{found}/tags", {"json": tag})
    )


def dataset(ask: Ask) -> Thing:
    name = unused("dataset")
    body = {"name": name, "experiment_ids": ["0"]}
    found = made(ask("POST", "3.0/mlflow/datasets/create", json=body))["dataset"]["dataset_id"]
    return Thing(
        ("GET", f"3.0/mlflow/datasets/{found}", {}),
        name,
        ("PATCH", f"3.0/mlflow/datasets/{found}/tags", {"json": {"tags": '{"k": "v"}'}}),
    )


def webhook(ask: Ask) -> Thing:
    name = unused("webhook")
    event = {"entity": "REGISTERED_MODEL", "action": "CREATED"}
    body = {"name": name, "url": "https://1.1.1.1/hook", "events": [event], "secret": SECRET, "status": "DISABLED"}
    found = made(ask("POST", "2.0/mlflow/webhooks", json=body))["webhook"]["webhook_id"]
    path = f"2.0/mlflow/webhooks/{found}"
    return Thing(("GET", path, {}), name, ("PATCH", path, {"json": {"description": "changed"}}))


def gateway_key(ask: Ask) -> Thing:
    name = unused("key")
    body = {"secret_name": name, "secret_value": {"api_key": SECRET}, "provider": "openai"}
    found = made(ask("POST", "3.0/mlflow/gateway/secrets/create", json=body))["secret"]["secret_id"]
    return Thing(
        ("GET", "3.0/mlflow/gateway/secrets/get", {"params": {"secret_id": found}}),
        name,
        (
            "POST",
            "3.0/mlflow/gateway/secrets/update",
            {"json": {"secret_id": found, "secret_value": {"api_key": SECRET}}},
        ),
    )


THINGS: dict[str, Callable[[Ask], Thing]] = {
    "experiments": experiment,
    "runs": run,
    "artifacts": artifact,
    "registered models": registered_model,
    "prompts": prompt,
    "traces": trace,
    "evaluation datasets": dataset,
    "webhooks, without their secrets": webhook,
    "the AI gateway's keys, masked": gateway_key,
}


def test_the_readme_names_these_things() -> None:
    assert list(table("of others")) == list(THINGS)


@pytest.mark.parametrize("name", THINGS)
def test_each_role_sees_and_changes_the_things_of_others_as_the_readme_says(
    name: str, server: Server, logins: dict[str, Login]
) -> None:
    def asking(login: Login) -> Ask:
        return lambda method, path, **options: server.ask(f"/api/{path}", method, auth=login, timeout=60, **options)

    thing = THINGS[name](asking(server.login))
    found = []
    for role in ROLES:
        ask = asking(logins[role])
        (method, path, options), (how, where, sent) = thing.shown_by, thing.changed_by
        shown = ask(method, path, **options)
        changed = ask(how, where, **sent)
        assert SECRET not in shown.text + changed.text
        sees = shown.status_code == 200 and thing.has in shown.text
        assert changed.status_code in (200, 403), changed.text
        found.append("changes" if sees and changed.status_code == 200 else "sees" if sees else "no")
    assert tuple(found) == table("of others")[name]
