"""ASGI middleware for the audit trail: name the items of each write in response headers, which nginx logs and removes.

nginx sees neither a request's JSON nor what it created. `IDS` has the IDs and names among the fields of the request's
query and JSON, and of a short response, as a query string. No other field is read, so it contains no value that a user
logs, and no secret. `ANSWER` is set where a process answers beside MLflow.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, quote

from mlflow_host.server.flask_shortcut import Application, Message, Receive, Scope, Send
from mlflow_host.server.request_limits import ABOUT_FILES, TRACES, UNSHARED

IDS = b"x-mlflow-host-ids"
ANSWER = (b"x-mlflow-host-answer", b"direct")

PARSED = "mlflow_host.parsed"
"""Key of a scope: a list to which the fast path adds the JSON object of the body, and an object with the names of what
it created, so that neither the body nor the response is parsed again."""
READING = ("GET", "HEAD", "OPTIONS")
REQUEST_BYTES, RESPONSE_BYTES = 16 << 10, 4 << 10
"""Longer bodies are not parsed. Of a longer request, the first KiB is searched: clients send the run's ID first."""
SEARCHED_BYTES = 1 << 10
ID_CHARACTERS, HEADER_CHARACTERS, IDS_IN_LIST = 200, 1000, 10
RESPONSE_DEPTH = 3

NAMING = re.compile(r"(?!user_id$)([a-z]+_)*(id|ids|uuid|name|version|alias)")
"""Fields that name items. A user's name in a request is not the logged-in user's."""
FIRST_IDS = re.compile(rb'"((?:[a-z]+_)*(?:id|uuid))"\s*:\s*"([\w-]{1,64})"')
CUT = "cut=1"
"""In the header if the request has fields that were not read."""
EXPERIMENT = b"x-mlflow-experiment-id"
"""Header of OpenTelemetry's exports."""


def naming_ids(application: Application) -> Application:
    """`application`, with `IDS` in the responses to writes."""

    async def named(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in READING:
            await application(scope, receive, send)
            return
        body = b""
        started: list[Message] = []
        scope[PARSED] = []

        async def noted() -> Message:
            nonlocal body
            message = await receive()
            if len(body) <= REQUEST_BYTES:
                body += message.get("body", b"")[: REQUEST_BYTES + 1]
            return message

        async def with_ids(message: Message) -> None:
            if message["type"] == "http.response.start":
                started.append(message)
                return
            if started:
                start = started.pop()
                whole = message.get("body", b"") if not message.get("more_body") else b""
                try:
                    ids = (IDS, header(scope, body, whole).encode())
                except Exception as error:  # no request fails because of the trail
                    print(f"mlflow-host: {scope['path']!r} has no IDs in the trail: {error!r}", file=sys.stderr)
                    ids = (IDS, CUT.encode())
                await send({**start, "headers": [*start.get("headers", ()), ids]})
            await send(message)

        await application(scope, noted, with_ids)

    return named


def header(scope: Scope, request: bytes, response: bytes) -> str:
    """The IDs that the request and the response name, as a query string of at most HEADER_CHARACTERS."""
    found: dict[str, str] = {}
    for fields in named_fields(scope, request, response):
        for name in fields:
            if names_item(name) and name not in found and (text := written(fields[name])):
                found[name] = text
    whole = scope[PARSED] or len(request) <= REQUEST_BYTES or not has_fields(scope["path"])
    header = "&".join([f"{name}={value}" for name, value in found.items()] + [CUT] * (not whole))
    while len(header) > HEADER_CHARACTERS:
        header = f"{header.removesuffix('&' + CUT).rpartition('&')[0]}&{CUT}"
    return header


@lru_cache(maxsize=1024)
def has_fields(path: str) -> bool:
    """Whether the body consists of the request's fields: not of a file, of spans, or of a question to a model."""
    return path != TRACES and not (UNSHARED.search(path) and not ABOUT_FILES.search(path))


def named_fields(scope: Scope, request: bytes, response: bytes) -> list[Mapping[str, Any]]:
    """The fields of a request and of its response, each as an object without others inside."""
    if scope[PARSED]:
        found = [*scope[PARSED]]
    elif not has_fields(scope["path"]):
        found = []
    elif len(request) > REQUEST_BYTES:
        found = [{name.decode(): value.decode() for name, value in FIRST_IDS.findall(request[:SEARCHED_BYTES])}]
    else:
        found = [parsed(request)]
    if scope["query_string"]:
        found.append(dict(parse_qsl(scope["query_string"].decode("latin-1"))))
    if scope["path"] == TRACES:
        found.append({"experiment_id": dict(scope["headers"]).get(EXPERIMENT, b"").decode("latin-1")})
    if len(scope[PARSED]) < 2 and len(b"{}") < len(response) <= RESPONSE_BYTES:
        found += objects_in(parsed(response), RESPONSE_DEPTH)
    return found


@lru_cache(maxsize=1024)
def names_item(field: str) -> bool:
    return NAMING.fullmatch(field) is not None


def written(value: Any) -> str:
    """A value for the header; "" for one that is no ID or name."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        value = ",".join(value[:IDS_IN_LIST])
    if isinstance(value, str):
        text = value[:ID_CHARACTERS]
        if text.isalnum() and text.isascii():
            return text
        return re.sub("%.?$", "", quote(text, safe="", errors="replace")[:ID_CHARACTERS])  # a character may take twelve
    return str(value) if type(value) is int else ""


def parsed(body: bytes) -> Mapping[str, Any]:
    """The JSON object in a body; an empty one if it contains anything else."""
    try:
        found = json.loads(body)
        if isinstance(found, str):  # MLflow reads JSON in a text, too
            found = json.loads(found)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def objects_in(fields: Mapping[str, Any], depth: int) -> Iterator[Mapping[str, Any]]:
    """`fields` and the objects inside, to `depth`: {"run": {"info": {"run_id": …}}}."""
    yield fields
    for value in fields.values():
        if isinstance(value, dict) and depth > 1:
            yield from objects_in(value, depth - 1)
