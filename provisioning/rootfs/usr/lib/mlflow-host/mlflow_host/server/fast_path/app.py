"""ASGI middleware of the fast path: handles the most frequent requests with SQL, without MLflow's Python code.

The module `writes` handles log-batch, log-metric and create run. The module `reads` handles get run, search runs and
metric histories; PostgreSQL builds the JSON. Some requests are passed to MLflow unchanged, before anything is written:
requests with unusual fields or values, with unknown IDs, or with filters on datasets.

The test tests/schema/test_tracking.py compares the responses and rows of the fast path with the responses and rows of
MLflow. `compatibility` lists the MLflow releases that were tested.
"""

# mypy: disable-error-code="no-untyped-call, no-any-return"

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from mlflow_host.server.fast_path import compatibility, reads, writes
from mlflow_host.server.fast_path.store import DirectStore, Unreachable
from mlflow_host.server.flask_shortcut import Application, Message, Receive, Scope, Send, names_workspace, whole
from mlflow_host.server.request_ids import ANSWER
from mlflow_host.server.request_threads import RequestThreads

Handler = Callable[[DirectStore, Scope, bytes], str]

ANSWERS: dict[tuple[str, str], Handler] = {
    ("GET", "/runs/get"): reads.run,
    ("GET", "/metrics/get-history"): reads.history,
    ("POST", "/runs/search"): reads.search,
    ("POST", "/runs/create"): writes.create_run,
    ("POST", "/runs/log-metric"): writes.log_metric,
    ("POST", "/runs/log-batch"): writes.log_batch,
}
"""The handlers, by HTTP method and by path without the prefix. A handler raises Unreachable if PostgreSQL does not
respond. If a handler raises any other exception, the database is unchanged, and MLflow handles the request."""

PREFIXES = ("/api/2.0/mlflow", "/ajax-api/2.0/mlflow")


def answered_directly(application: Application, store: Any, threads: RequestThreads) -> Application:
    """Return `application` with the fast path for the requests in `ANSWERS`. MLflow's checks of host and origin run
    first; then a handler in one of `threads` uses `store`. `compatibility` decides which endpoints are disabled. If
    `store` is MLflow's own store, this function returns `application` itself."""
    if not isinstance(store, DirectStore):
        return application
    off = compatibility.switched_off(compatibility.installed_mlflow())
    answers = {
        (method, prefix + path): answer
        for (method, path), answer in ANSWERS.items()
        for prefix in PREFIXES
        if path not in off
    }

    async def direct(scope: Scope, receive: Receive, send: Send) -> None:
        body = await whole(receive)
        if body is None:
            return
        answer = answers[scope["method"], scope["path"]]
        found = await threads.call(answer_or_none, answer, store, scope, body)
        if found is None:
            await application(scope, once(body), send)
            return
        status, told = found
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(told)).encode()), ANSWER]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": told})

    guarded = with_mlflows_checks(direct)

    async def answered(scope: Scope, receive: Receive, send: Send) -> None:
        mine = scope["type"] == "http" and (scope["method"], scope["path"]) in answers and not names_workspace(scope)
        await (guarded if mine else application)(scope, receive, send)

    return answered


def with_mlflows_checks(application: Application) -> Application:
    """Return `application` with MLflow's middleware for hosts, origins and headers.

    `Layers` is used instead of a Starlette application, which would add layers for errors and routes to each request.
    If `init_fastapi_security` needs more than `add_middleware`, a Starlette application is used.
    """
    from mlflow.server.fastapi_security import init_fastapi_security
    from starlette.applications import Starlette
    from starlette.routing import Mount

    layers: Any = Layers(application)
    try:
        init_fastapi_security(layers)
    except AttributeError:
        whole_application: Any = Starlette(routes=[Mount("/", application)])
        init_fastapi_security(whole_application)
        return whole_application
    outermost: Application = layers.outermost
    return outermost


class Layers:
    """An application with added middleware. As in Starlette, the middleware that is added last is called first."""

    def __init__(self, application: Application) -> None:
        self.outermost = application

    def add_middleware(self, middleware: Any, *arguments: Any, **options: Any) -> None:
        self.outermost = middleware(self.outermost, *arguments, **options)


def once(body: bytes) -> Receive:
    """Return a `receive` function that returns `body`, which was already read from the client."""

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def answer_or_none(answer: Handler, store: DirectStore, scope: Scope, body: bytes) -> tuple[int, bytes] | None:
    """Return the status and the JSON of a response, or None if MLflow must handle the request."""
    try:
        return 200, in_ascii(answer(store, scope, body)).encode()
    except Unreachable as error:  # PostgreSQL may have committed the write, so MLflow must not repeat the request
        return error.get_http_status_code(), error.serialize_as_json().encode()
    except Exception:
        return None


def in_ascii(text: str) -> str:
    """Escape the JSON's non-ASCII characters, because clients guess the encoding of a response without a charset."""
    return text if text.isascii() else re.sub("[^\0-\x7f]+", lambda found: json.dumps(found[0])[1:-1], text)
