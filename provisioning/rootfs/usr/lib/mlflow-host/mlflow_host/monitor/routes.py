"""Match the path of a request with MLflow's routes. `mlflow_host.bake.reader_routes` writes the list of the routes."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

ROUTES = Path("/usr/share/mlflow-host/routes.json")
CONVERTERS = ("path", "int", "string", "uuid")
"""Flask's converters, which are written before the name of a path part."""
_PART = re.compile(r"<([^>]+)>")


class Match(NamedTuple):
    route: str
    """The route's path, with <name> for each variable part. "" if no route matches."""
    ids: tuple[tuple[str, str], ...]
    """Names and values of the variable parts of the path."""


class Routes:
    """The routes of the MLflow release in the image. `known` lists their methods and paths."""

    def __init__(self, known: list[tuple[str, str]]):
        self._fixed = {(method, path) for method, path in known if "<" not in path}
        self._varying: dict[str, list[tuple[str, re.Pattern[str], list[str]]]] = {}
        for method, path in known:
            if "<" in path:
                pattern, names = _pattern(path)
                self._varying.setdefault(method, []).append((path, pattern, names))
        self.match = lru_cache(maxsize=4096)(self._match)

    def _match(self, method: str, path: str) -> Match:
        method = "GET" if method == "HEAD" else method
        path = unquote(path)
        if (method, path) in self._fixed:
            return Match(path, ())
        for route, pattern, names in self._varying.get(method, ()):
            if found := pattern.fullmatch(path):
                return Match(route, tuple(zip(names, found.groups(), strict=True)))
        return Match("", ())


def _pattern(path: str) -> tuple[re.Pattern[str], list[str]]:
    """The regular expression of a route, and the names of its variable parts. A part that may contain slashes is
    written as <path:name> in Flask and as <name:path> in FastAPI."""
    names, expression, end = [], "", 0
    for part in _PART.finditer(path):
        first, _, second = part[1].partition(":")
        slashes = bool(second) and "path" in (first, second)
        names.append(second if first in CONVERTERS and second else first)
        expression += re.escape(path[end : part.start()]) + ("(.+)" if slashes else "([^/]+)")
        end = part.end()
    return re.compile(expression + re.escape(path[end:]), re.DOTALL), names


def installed(path: Path = ROUTES) -> Routes:
    return Routes([(method, route) for method, route in json.loads(path.read_text())])
