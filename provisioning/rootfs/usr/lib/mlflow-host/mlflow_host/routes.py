"""Which of MLflow's routes a reader may call: derived from the installed release's own route table, at bake.

HTTP methods alone do not tell: MLflow searches with POST. Every route that takes POST is therefore put into one of
two lists by its path, and a route that is in neither fails the bake, so that a new release's new route cannot become
writable by readers unnoticed. PUT, PATCH and DELETE always change something; GET, HEAD and OPTIONS never do.

    python -m mlflow_host.routes --write /usr/share/mlflow-host/reader-posts.map

writes the map file that nginx includes (one raw request URI pattern a line). A pattern matches the *raw* request
target, so an encoded or doubled character never matches and is refused.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

# Paths below /api/N.0/mlflow or /ajax-api/N.0/mlflow whose POST only reads. Source: the RPC's definition and handler
# in mlflow/protos/service.proto, model_registry.proto and mlflow/server/handlers.py, read at 3.12 to 3.17.
READING_POSTS = re.compile(
    r"""(
      /graphql                                   # queries; the one mutation echoes its argument
    | /(ajax-)?api/\d\.\d/?mlflow/(
        runs/search
      | experiments/search
      | experiments/search-datasets
      | logged-models/search
      | registered-models/get-latest-versions
      | artifacts/presigned-download-url
      | traces/search
      | traces/metrics
      | traces/batchGet(Infos)?
      | traces/calculate-filter-correlation
      | datasets/search
      | issues/search
      | prompt-optimization/jobs/search
      )
    | /ajax-api/\d\.\d/jobs/search
    )""",
    re.VERBOSE,
)

# POSTs that change something, or spend money or processor time on a third party's behalf.
WRITING_POSTS = re.compile(
    r"""(
      /v1/traces                                 # OpenTelemetry's way in
    | /gateway/.+                                # calls a paid model
    | /ajax-api/\d\.\d/jobs/?
    | /(ajax-)?api/\d\.\d/mlflow-artifacts/mpu/(create|complete|abort)/.+
    | /(ajax-)?api/\d\.\d/mlflow/(
        artifacts/presigned-upload-url
      | upload-artifact
      | gateway-proxy
      | ui-telemetry
      | assistant/.+
      | mcp-servers(/.+)?
      | webhooks(/<[^>]+>(/test)?)?
      | workspaces
      | issues(/invoke)?
      | scorer/invoke
      | genai/evaluate/invoke
      | demo/(generate|delete)
      | traces(/<[^>]+>/assessments)?
      | logged-models(/<[^>]+>/params)?
      | prompt-optimization/jobs(/<[^>]+>/cancel)?
      | [a-z-]+(/[a-z-]+|/<[^>]+>)*/(
          create|delete|update|rename|restore|register|transition-stage|alias|attach|detach|add|remove|copy
        | (create|delete|update|set|add|remove|link|log|get-or-create)-[a-z-]+
        )
      | runs/outputs
      | datasets/<[^>]+>/records
      )
    )""",
    re.VERBOSE,
)

CHANGING_METHODS = frozenset({"PUT", "PATCH", "DELETE"})
READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class UnclassifiedRoutes(Exception):
    """Routes of the installed MLflow that neither list knows: `.routes`, as "METHOD path" strings."""

    def __init__(self, routes: list[str]) -> None:
        super().__init__(
            f"{len(routes)} of MLflow's routes are not classified as reading or writing: {', '.join(routes)}; "
            "add each to READING_POSTS or WRITING_POSTS in mlflow_host/routes.py"
        )
        self.routes = routes


@dataclass(frozen=True, order=True)
class Route:
    path: str  # with <name> or <type:name> where the path varies
    method: str


def installed_routes() -> list[Route]:
    """Every route of the installed MLflow, of its Flask and of its FastAPI application, one entry a method.

    Imports MLflow (seconds). Raises RuntimeError when a FastAPI route hides from the OpenAPI schema, because the
    table would then be incomplete.
    """
    # Importing the applications opens no store, but asks where it would be.
    with mock.patch.dict(os.environ, {"MLFLOW_BACKEND_STORE_URI": "sqlite://"}):
        from mlflow.server import app as flask_app
        from mlflow.server.fastapi_app import app as fastapi_app

    hidden = [str(route) for route in _leaves(fastapi_app.routes) if not getattr(route, "include_in_schema", True)]
    if hidden:
        raise RuntimeError(f"FastAPI routes outside the schema cannot be classified: {', '.join(hidden)}")
    routes = {
        Route(rule.rule, method)
        for rule in flask_app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    for path, operations in fastapi_app.openapi()["paths"].items():
        # An operation's name in the schema is its method in lower case.
        routes |= {Route(re.sub(r"\{([^}]+)\}", r"<\1>", path), method.upper()) for method in operations}
    return sorted(routes)


def _leaves(routes: object) -> Iterator[object]:
    for route in routes:  # type: ignore[attr-defined]
        router = getattr(route, "original_router", None)
        if router is not None:
            yield from _leaves(router.routes)
        elif hasattr(route, "methods"):
            yield route


def reading_posts(routes: list[Route]) -> list[str]:
    """The paths a reader may POST to. Raises UnclassifiedRoutes when a route is in neither list or in both."""
    readable, unclassified = [], []
    for route in routes:
        if route.method in READING_METHODS | CHANGING_METHODS:
            continue
        reads = bool(READING_POSTS.fullmatch(route.path))
        writes = bool(WRITING_POSTS.fullmatch(route.path))
        if route.method != "POST" or reads == writes:
            unclassified.append(f"{route.method} {route.path}")
        elif reads:
            readable.append(route.path)
    if unclassified:
        raise UnclassifiedRoutes(unclassified)
    return readable


def nginx_map(paths: list[str]) -> str:
    """Lines for nginx's `map $request_uri …` block: the raw target of each reading POST, query allowed."""
    variable = [path for path in paths if "<" in path]
    if variable:
        raise RuntimeError(f"reading POSTs with variable parts need patterns of their own: {', '.join(variable)}")
    return "".join(f'"~^{re.escape(path)}(\\?|$)" 1;\n' for path in paths)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the nginx map here; default: print it")
    arguments = parser.parse_args()
    try:
        text = nginx_map(reading_posts(installed_routes()))
    except (UnclassifiedRoutes, RuntimeError) as error:
        print(f"routes: {error}", file=sys.stderr)
        return 2
    if arguments.write:
        arguments.write.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
