"""A reader's rights follow MLflow's route table. Readers have no access to an unclassified route."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlflow_host.bake import fallbacks, reader_routes
from mlflow_host.bake.fallbacks import Fallback
from mlflow_host.bake.reader_routes import Route


@pytest.mark.long
def test_a_moved_route_for_spans_is_reported(installed: list[Route]) -> None:
    assert reader_routes.exports(installed) == []
    (moved,) = reader_routes.exports([route for route in installed if route.path != "/v1/traces"])
    assert moved.why == "MLflow has no route POST /v1/traces"


@pytest.fixture(scope="module")
def installed() -> list[Route]:
    return reader_routes.installed_routes()


def test_every_route_of_the_installed_release_is_sorted(installed: list[Route]) -> None:
    assert len(installed) > 300
    readable, unsorted = reader_routes.sort_posts(installed)
    assert "/api/2.0/mlflow/runs/search" in readable
    assert unsorted == []


def test_no_post_that_a_reader_may_send_changes_anything(installed: list[Route]) -> None:
    verbs = re.compile(r"create|delete|update|set-|log-|restore|rename|register(/|$)|invoke|upload|cancel|/tags|alias")
    assert [path for path in reader_routes.sort_posts(installed)[0] if verbs.search(path)] == []


@pytest.mark.parametrize(
    "route",
    [
        Route("/api/9.0/mlflow/runs/explode", "POST"),
        Route("/api/2.0/mlflow/runs/search", "BREW"),
        Route("/api/3.0/mlflow/skills/<name>/search", "POST"),
    ],
)
def test_unsorted_route_is_closed_to_readers_and_named_in_the_facts(installed: list[Route], route: Route) -> None:
    readable, unsorted = reader_routes.sort_posts([*installed, route])
    assert readable == reader_routes.sort_posts(installed)[0]
    assert unsorted == [route]
    (found,) = reader_routes.fallback(unsorted)
    assert found.what.startswith("1 routes for readers") and f"{route.method} {route.path}" in found.why


def test_routes_outside_the_openapi_schema_are_listed() -> None:
    from fastapi import FastAPI

    application = FastAPI()
    application.add_api_route("/hidden/{name}", lambda name: name, methods=["POST"], include_in_schema=False)
    assert Route("/hidden/<name>", "POST") in set(reader_routes._hidden(application.routes))


def test_new_posts_of_3_18_are_sorted_as_writing() -> None:
    for path in (
        *("issues/schedule/state", "skills", "skills/bulk-register", "skills/<name>/aliases"),
        *("skills/<name>/versions/<version>/tags", "skills/@<organization>/<name>/versions"),
    ):
        assert reader_routes.sort_posts([Route(f"/ajax-api/3.0/mlflow/{path}", "POST")]) == ([], []), path


def test_entries_are_recorded_by_step_and_a_repeated_step_replaces_its_own(tmp_path: Path) -> None:
    file = tmp_path / "fallbacks.json"
    assert fallbacks.recorded(file) == []
    fallbacks.record("one", [Fallback("old", "x")], file)
    fallbacks.record("two", [Fallback("b", "y")], file)
    fallbacks.record("one", [Fallback("a", "x")], file)
    assert fallbacks.recorded(file) == [{"what": "a", "why": "x"}, {"what": "b", "why": "y"}]


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("/api/2.0/mlflow/runs/search", True),
        ("/ajax-api/2.0/mlflow/runs/search?x=1", True),
        ("/graphql", True),
        ("/api/2.0/mlflow/runs/delete", False),
        ("/api/2.0/mlflow/runs/search/../delete", False),
        ("/api/2.0/mlflow/runs/delete?/api/2.0/mlflow/runs/search", False),
        ("//api/2.0/mlflow/runs/search", False),
        ("/api/2.0/mlflow/runs/%73earch", False),
        ("/api/2x0/mlflow/runs/search", False),
    ],
)
def test_the_map_matches_raw_targets_exactly(installed: list[Route], target: str, allowed: bool) -> None:
    text = reader_routes.nginx_map(reader_routes.sort_posts(installed)[0])
    patterns = re.findall(r'^"~(.*)" 1;$', text, re.MULTILINE)
    assert len(patterns) == text.count("\n")
    assert any(re.search(pattern, target) for pattern in patterns) is allowed
