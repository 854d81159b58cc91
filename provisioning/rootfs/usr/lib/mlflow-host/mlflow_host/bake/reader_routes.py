"""Bake: list the routes of the installed MLflow that a user with the role `reader` may call.

The HTTP method does not show whether a POST request writes, because MLflow's searches also use POST. Therefore every
POST route must match a list of reading paths or a list of writing paths. A POST route that matches neither list counts
as writing: nginx returns 403 to readers, and `fallbacks` in image.json lists the route. GET, HEAD and OPTIONS count as
reading. PUT, PATCH, DELETE and unknown methods count as writing. The next command writes the map file that nginx
includes:

    python -m mlflow_host.bake.reader_routes --write /usr/share/mlflow-host/reader-posts.map

The map has one pattern per line. A pattern matches the raw request target, so a target with an encoded character or a
doubled slash does not match and is refused. The option `--routes` also writes a list of all routes, which
`mlflow_host.monitor` reads.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlflow_host.bake import fallbacks
from mlflow_host.bake.fallbacks import Fallback
from mlflow_host.server.environment import variables
from mlflow_host.server.request_limits import TRACES

# POST routes that only read. Source: the definition and the handler of each RPC
# in mlflow/protos/service.proto, model_registry.proto and mlflow/server/handlers.py of MLflow 3.12 to 3.18.
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

# POST routes that change data, cost money or load the processor.
WRITING_POSTS = re.compile(
    r"""(
      /v1/traces                                 # OpenTelemetry's exporter
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
      | issues(/invoke|/schedule/state)?
      | skills(/bulk-register)?
      | skills/(@<[^>]+>/)?<[^>]+>/(aliases|tags|versions(/<[^>]+>/tags)?)
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


@dataclass(frozen=True, order=True)
class Route:
    path: str  # a variable part is written as <name> or <type:name>
    method: str


def installed_routes() -> list[Route]:
    """All routes of the Flask and FastAPI applications of the installed MLflow, one entry per method.

    This function imports MLflow, which takes seconds.
    """
    # The import of the applications requires the URI of a store, but does not open the store.
    with variables({"MLFLOW_BACKEND_STORE_URI": "sqlite://"}):
        from mlflow.server import app as flask_app
        from mlflow.server.fastapi_app import app as fastapi_app

    routes = {
        Route(rule.rule, method)
        for rule in flask_app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    for path, operations in fastapi_app.openapi()["paths"].items():
        # The keys of `operations` are HTTP methods in lower case.
        routes |= {Route(re.sub(r"\{([^}]+)\}", r"<\1>", path), method.upper()) for method in operations}
    return sorted(routes | set(_hidden(fastapi_app.routes)))


def _hidden(routes: object) -> Iterator[Route]:
    """FastAPI routes that are not in the OpenAPI schema. The paths of an included router lack the router's prefix."""
    for route in routes:  # type: ignore[attr-defined]
        router = getattr(route, "original_router", None)
        if router is not None:
            yield from _hidden(router.routes)
        elif hasattr(route, "methods") and not getattr(route, "include_in_schema", True):
            yield from (Route(re.sub(r"\{([^}]+)\}", r"<\1>", route.path), method) for method in route.methods)


def sort_posts(routes: list[Route]) -> tuple[list[str], list[Route]]:
    """Return the paths of the POST routes that only read, and the unclassified routes. A route counts as unclassified
    if no list matches its path, if both lists match, or if its method is unknown. A route that only reads also counts
    as unclassified if its path has a variable part, because nginx's map has no pattern for variable parts."""
    readable, unsorted = [], []
    for route in routes:
        if route.method in READING_METHODS | CHANGING_METHODS:
            continue
        reads = bool(READING_POSTS.fullmatch(route.path))
        writes = bool(WRITING_POSTS.fullmatch(route.path))
        if route.method != "POST" or reads == writes or (reads and "<" in route.path):
            unsorted.append(route)
        elif reads:
            readable.append(route.path)
    return readable, unsorted


def fallback(unsorted: list[Route]) -> list[Fallback]:
    """The fallback for the unclassified routes. The bake writes the fallback to image.json."""
    named = ", ".join(f"{route.method} {route.path}" for route in unsorted)
    what = f"{len(unsorted)} routes for readers: only writers and administrators may call them"
    return [Fallback(what, f"mlflow_host/bake/reader_routes.py does not classify {named}")] if unsorted else []


def exports(installed: list[Route]) -> list[Fallback]:
    """The fallback if MLflow does not receive OpenTelemetry's spans at TRACES, the only path with limits on spans."""
    if Route(TRACES, "POST") in installed:
        return []
    what = "limits on the spans and the decompressed size of an OpenTelemetry export: only the body limit applies"
    return [Fallback(what, f"MLflow has no route POST {TRACES}")]


def nginx_map(paths: list[str]) -> str:
    """Lines for nginx's `map $request_uri …` block. Each line matches a raw target, with or without a query."""
    return "".join(f'"~^{re.escape(path)}(\\?|$)" 1;\n' for path in paths)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the nginx map here; default: print it")
    parser.add_argument("--routes", type=Path, metavar="FILE", help="write the list of all routes here, as JSON")
    arguments = parser.parse_args()
    installed = installed_routes()
    readable, unsorted = sort_posts(installed)
    if arguments.routes:
        arguments.routes.write_text(json.dumps([[route.method, route.path] for route in installed]) + "\n")
    if arguments.write:
        arguments.write.write_text(nginx_map(readable))
        fallbacks.record("reader_routes", fallback(unsorted) + exports(installed))
    else:
        print(nginx_map(readable), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
