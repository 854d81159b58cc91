"""For scripts/follow.py: print the facts of the installed MLflow on which this project depends, as JSON.

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
    """`version`; `posts`: the source of each POST route's handler, by path; `unsorted`: the routes that are in neither
    list of bake/reader_routes.py; `sources`: text and hash of the sources that the fast path was compared with;
    `different`: those of them that equal no compared release; `migrations`: the title of each, by revision;
    `fallbacks`: features that the release does not support; `refused`: why the server process cannot start, or None."""
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
    """For every POST route, its path and the source of its handler. A route of an included router has its path without
    the router's prefix in FastAPI, so the handler is found by the schema's path and operation."""
    with variables({"MLFLOW_BACKEND_STORE_URI": "sqlite://"}):
        from mlflow.server import app as flask_app
        from mlflow.server.fastapi_app import app as fastapi_app

    for rule in flask_app.url_map.iter_rules():
        if "POST" in (rule.methods or ()):
            yield rule.rule, source(flask_app.view_functions[rule.endpoint])
    found = [route for route in endpoints(fastapi_app.routes) if "POST" in (route.methods or ())]
    for path, methods in fastapi_app.openapi()["paths"].items():
        operation = methods.get("post", {}).get("operationId", "")  # the handler's name, then its path
        if of_path := [each for each in found if path.endswith(each.path) and operation.startswith(each.name)]:
            handler = max(of_path, key=lambda route: len(route.name))
            yield re.sub(r"\{([^}]+)\}", r"<\1>", path), source(handler.endpoint)


def endpoints(routes: Any) -> Iterator[Any]:
    """The routes of a FastAPI application that have a handler, those of its routers included."""
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
    """Text and hash of each source that the fast path was compared with; both are empty for one that is absent."""
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
