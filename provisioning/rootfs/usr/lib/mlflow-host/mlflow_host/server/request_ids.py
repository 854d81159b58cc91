"""ASGI middleware for the audit trail: copy the IDs in each write request into a header of the response.

nginx logs the header and removes it from the response. nginx itself cannot read a request's JSON or the IDs of created
items. The value of the header `IDS` has the form of a query string. It contains the IDs and names from the request's
query, from the request's JSON, and from the response if the response is short. The middleware copies no other fields,
so the header contains no logged values and no secrets. The header `ANSWER` marks responses that this project's code
created instead of MLflow.
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
"""A key of the ASGI scope. The value is a list, to which the fast path adds the parsed JSON of the request, and the IDs
and names of created items. Therefore this middleware does not parse JSON that the fast path has already parsed."""
READING = ("GET", "HEAD", "OPTIONS")
REQUEST_BYTES, RESPONSE_BYTES = 16 << 10, 4 << 10
"""The middleware parses the body of a request or a response only up to these sizes. In a longer request, only the first
KiB is searched for IDs, because clients send the run's ID first."""
SEARCHED_BYTES = 1 << 10
ID_CHARACTERS, HEADER_CHARACTERS, IDS_IN_LIST = 200, 1000, 10
RESPONSE_DEPTH = 3

NAMING = re.compile(r"(?!user_id$)([a-z]+_)*(id|ids|uuid|name|version|alias)")
"""The fields that contain IDs or names. user_id is excluded, because its value may differ from the logged-in user."""
FIRST_IDS = re.compile(rb'"((?:[a-z]+_)*(?:id|uuid))"\s*:\s*"([\w-]{1,64})"')
CUT = "cut=1"
"""The header ends with this text if it does not contain all IDs and names of the request."""
EXPERIMENT = b"x-mlflow-experiment-id"
"""The request header in which OpenTelemetry's exporters send the experiment's ID."""


def naming_ids(application: Application) -> Application:
    """Return `application` with middleware that adds the header `IDS` to the responses to write requests."""

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
                except Exception as error:  # an error in the audit trail must not cause a request to fail
                    print(f"mlflow-host: {scope['path']!r} has no IDs in the audit trail: {error!r}", file=sys.stderr)
                    ids = (IDS, CUT.encode())
                await send({**start, "headers": [*start.get("headers", ()), ids]})
            await send(message)

        await application(scope, noted, with_ids)

    return named


def header(scope: Scope, request: bytes, response: bytes) -> str:
    """Return the IDs and names in the request and the response, as a query string of at most HEADER_CHARACTERS."""
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
    """Return false if the body of a request to this path is a file, spans, or a prompt for a model, else true."""
    return path != TRACES and not (UNSHARED.search(path) and not ABOUT_FILES.search(path))


def named_fields(scope: Scope, request: bytes, response: bytes) -> list[Mapping[str, Any]]:
    """Return the fields of a request and of its response, as a list of objects. Nested objects are separate items."""
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
    """Return the text of a value for the header `IDS`, or "" if the value cannot be an ID or a name."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        value = ",".join(value[:IDS_IN_LIST])
    if isinstance(value, str):
        text = value[:ID_CHARACTERS]
        if text.isalnum() and text.isascii():
            return text
        return re.sub("%.?$", "", quote(text, safe="", errors="replace")[:ID_CHARACTERS])  # no incomplete %-escape
    return str(value) if type(value) is int else ""


def parsed(body: bytes) -> Mapping[str, Any]:
    """Return the JSON object in a body, or an empty object if the body contains anything else."""
    try:
        found = json.loads(body)
        if isinstance(found, str):  # MLflow also accepts a JSON string that contains the JSON object
            found = json.loads(found)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def objects_in(fields: Mapping[str, Any], depth: int) -> Iterator[Mapping[str, Any]]:
    """Yield `fields` and its nested objects, for example {"run": {"info": {"run_id": …}}}, down to `depth` levels."""
    yield fields
    for value in fields.values():
        if isinstance(value, dict) and depth > 1:
            yield from objects_in(value, depth - 1)
