"""ASGI middleware of the fast path: handles the most frequent requests with our own SQL, without MLflow's Python code.

Writes (`writes`) are log-batch, log-metric and create run. Reads (`reads`) are get run, search runs and metric
histories; PostgreSQL builds their JSON. Requests with unusual fields or values, unknown IDs or filters on datasets are
passed to MLflow unchanged, before anything is written.

tests/schema/test_tracking.py compares responses and rows with MLflow's own. `compatibility` lists the compared
releases.
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
"""Handlers by method and path after the prefix. Each raises Unreachable if PostgreSQL does not respond, and any other
exception if MLflow must handle the request; then nothing was changed."""

PREFIXES = ("/api/2.0/mlflow", "/ajax-api/2.0/mlflow")


def answered_directly(application: Application, store: Any, threads: RequestThreads) -> Application:
    """`application`, with the requests in `ANSWERS` handled by `store`, in `threads`, after MLflow's checks of host
    and origin. If the tracking store is MLflow's, returns `application` itself. `compatibility` switches single
    endpoints off."""
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
    """`application`, with the middleware that MLflow adds to its own for hosts, origins and headers.

    A Starlette application also calls its layers for errors and routes at each request. A release of MLflow that does
    more than add middleware gets one.
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
    """An application and the middleware that is added to it, as Starlette has it: the last one is the outermost."""

    def __init__(self, application: Application) -> None:
        self.outermost = application

    def add_middleware(self, middleware: Any, *arguments: Any, **options: Any) -> None:
        self.outermost = middleware(self.outermost, *arguments, **options)


def once(body: bytes) -> Receive:
    """A `receive` function that returns a body that was already received."""

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def answer_or_none(answer: Handler, store: DirectStore, scope: Scope, body: bytes) -> tuple[int, bytes] | None:
    """Status and JSON of a response; None if MLflow must handle the request."""
    try:
        return 200, in_ascii(answer(store, scope, body)).encode()
    except Unreachable as error:  # the write may have happened: only the client may repeat the request, not MLflow
        return error.get_http_status_code(), error.serialize_as_json().encode()
    except Exception:
        return None


def in_ascii(text: str) -> str:
    """The same JSON in ASCII, because clients guess the encoding of responses that do not name one."""
    return text if text.isascii() else re.sub("[^\0-\x7f]+", lambda found: json.dumps(found[0])[1:-1], text)
