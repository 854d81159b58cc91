"""Print the facts of the installed MLflow release that this project depends on, as JSON for scripts/follow.py.

python -m mlflow_host.bake.release_facts
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow_host.bake import check_release, mlflow_migrations, reader_routes
from mlflow_host.bake.fallbacks import Fallback
from mlflow_host.server.environment import variables
from mlflow_host.server.fast_path import compatibility
from mlflow_host.server.mlflow_checks import Refusal


def facts() -> dict[str, Any]:
    """The facts, by key. `version` is MLflow's version. `posts` maps a POST route's path to the source of its handler.
    `unsorted` lists the routes that bake/reader_routes.py cannot classify as reading or writing. `sources` has the
    source code and hash of each MLflow function and class with which the fast path is compared. `different` lists the
    functions and classes that differ from every release with which the fast path was compared.
    `migrations` maps a revision to its title. `fallbacks` lists the features that the release does not support.
    `refused` is the reason why the server process cannot start, or None."""
    import mlflow

    package = Path(mlflow.__file__).parent
    routes = reader_routes.installed_routes()
    _, unsorted = reader_routes.sort_posts(routes)
    found: list[Fallback] = []
    refused = None
    try:
        _, found = check_release.check()
    except Refusal as refusal:
        refused = str(refusal)
    return {
        "version": mlflow.__version__,
        "posts": dict(handlers()),
        "unsorted": [{"path": each.path, "method": each.method} for each in unsorted],
        "sources": sources(package),
        "different": compatibility.not_compared(package),
        "migrations": {each["revision"]: each["title"] for each in mlflow_migrations.titles()},
        "fallbacks": [{"what": each.what, "why": each.why} for each in [*found, *reader_routes.fallback(unsorted)]],
        "refused": refused,
    }


def handlers() -> Iterator[tuple[str, str]]:
    """The path of every POST route, and the source code of its handler. FastAPI stores a route of an included router
    without the router's prefix, so the handler is found by the path and the operation ID in the OpenAPI schema."""
    with variables({"MLFLOW_BACKEND_STORE_URI": "sqlite://"}):
        from mlflow.server import app as flask_app
        from mlflow.server.fastapi_app import app as fastapi_app

    for rule in flask_app.url_map.iter_rules():
        if "POST" in (rule.methods or ()):
            yield rule.rule, source(flask_app.view_functions[rule.endpoint])
    found = [route for route in endpoints(fastapi_app.routes) if "POST" in (route.methods or ())]
    for path, methods in fastapi_app.openapi()["paths"].items():
        operation = methods.get("post", {}).get("operationId", "")  # it begins with the handler's name
        if of_path := [each for each in found if path.endswith(each.path) and operation.startswith(each.name)]:
            handler = max(of_path, key=lambda route: len(route.name))
            yield re.sub(r"\{([^}]+)\}", r"<\1>", path), source(handler.endpoint)


def endpoints(routes: Any) -> Iterator[Any]:
    """All routes of a FastAPI application and of its routers, without the routes that have no handler."""
    for route in routes:
        if router := getattr(route, "original_router", None):
            yield from endpoints(router.routes)
        elif hasattr(route, "endpoint"):
            yield route


def source(function: Any) -> str:
    try:
        return inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return repr(function)


def sources(package: Path) -> dict[str, dict[str, str]]:
    """The source code and the hash of each MLflow function and class with which the fast path is compared. If MLflow
    has no such function or class, both values are empty."""
    hashes = compatibility.hashes(package)
    found = {}
    for file, names in compatibility.SOURCES.items():
        path = package / file
        texts = compatibility.definitions(path.read_text()) if path.exists() else {}
        for name in names:
            key = f"{path.stem}.{name}"
            found[key] = {"text": texts.get(name, ""), "hash": hashes[key]}
    return found


if __name__ == "__main__":
    logging.disable()
    printed = json.dumps(facts())
    sys.stdout.write(printed + "\n")
