"""A reader's rights follow MLflow's own route table, and a route nobody classified stops the bake."""

from __future__ import annotations

import re

import pytest
from mlflow_host import routes
from mlflow_host.routes import Route


@pytest.fixture(scope="module")
def installed() -> list[Route]:
    return routes.installed_routes()


def test_every_route_of_the_installed_release_is_classified(installed: list[Route]) -> None:
    assert len(installed) > 300
    assert "/api/2.0/mlflow/runs/search" in routes.reading_posts(installed)


def test_no_post_that_a_reader_may_send_changes_anything(installed: list[Route]) -> None:
    verbs = re.compile(r"create|delete|update|set-|log-|restore|rename|register(/|$)|invoke|upload|cancel|/tags|alias")
    assert [path for path in routes.reading_posts(installed) if verbs.search(path)] == []


@pytest.mark.parametrize(
    "route", [Route("/api/9.0/mlflow/runs/explode", "POST"), Route("/api/2.0/mlflow/runs/search", "BREW")]
)
def test_an_unclassified_route_is_refused_by_name(installed: list[Route], route: Route) -> None:
    with pytest.raises(routes.UnclassifiedRoutes, match=re.escape(f"{route.method} {route.path}")):
        routes.reading_posts([*installed, route])


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
    text = routes.nginx_map(routes.reading_posts(installed))
    patterns = re.findall(r'^"~(.*)" 1;$', text, re.MULTILINE)
    assert len(patterns) == text.count("\n")
    assert any(re.search(pattern, target) for pattern in patterns) is allowed
