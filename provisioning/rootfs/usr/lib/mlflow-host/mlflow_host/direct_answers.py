"""What training and its readers ask most, answered beside MLflow: metrics logged and runs made by statements of ours
(`mlflow_host.direct_writes`); runs, searches and histories as PostgreSQL writes them (`mlflow_host.direct_reads`).

What is out of the ordinary goes on to MLflow, to be answered or refused as ever, and nothing was changed by then:
requests with fields or values that clients do not send, ids that are not there, filters on datasets.

That clients are answered, and rows written, as MLflow would have done it is compared in tests/schema/test_tracking.py;
with which releases, `mlflow_host.tracking` says.
"""

# mypy: disable-error-code="no-untyped-call, no-any-return"

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from mlflow.exceptions import MlflowException

from mlflow_host import direct_reads, direct_writes
from mlflow_host.bridge import Application, Message, Receive, Scope, Send, whole
from mlflow_host.direct_store import DirectStore, Unreachable, Unusual

Answer = Callable[[DirectStore, Scope, bytes], str]

ANSWERS: dict[tuple[str, str], Answer] = {
    ("GET", "/runs/get"): direct_reads.run,
    ("GET", "/metrics/get-history"): direct_reads.history,
    ("POST", "/runs/search"): direct_reads.search,
    ("POST", "/runs/create"): direct_writes.create_run,
    ("POST", "/runs/log-metric"): direct_writes.log_metric,
    ("POST", "/runs/log-batch"): direct_writes.log_batch,
}
"""What answers, by method and by path behind the prefix. Each raises Unusual or MlflowException where MLflow has to
answer, with nothing changed; and Unreachable."""

PREFIXES = ("/api/2.0/mlflow", "/ajax-api/2.0/mlflow")


def answered_directly(application: Application, store: Any, executor: Executor) -> Application:
    """`application`, with what is asked in `ANSWERS` answered from `store`, in the threads of `executor` and behind
    MLflow's own checks of host and origin; without ours as the tracking store, `application` itself."""
    if not isinstance(store, DirectStore):
        return application
    from mlflow.server.fastapi_security import init_fastapi_security
    from starlette.applications import Starlette
    from starlette.routing import Mount

    answers = {(method, prefix + path): answer for (method, path), answer in ANSWERS.items() for prefix in PREFIXES}

    async def direct(scope: Scope, receive: Receive, send: Send) -> None:
        body = await whole(receive)
        if body is None:
            return
        answer = answers[scope["method"], scope["path"]]
        found = await asyncio.get_running_loop().run_in_executor(executor, answer_or_none, answer, store, scope, body)
        if found is None:
            await application(scope, once(body), send)
            return
        status, told = found
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(told)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": told})

    guarded: Any = Starlette(routes=[Mount("/", direct)])
    init_fastapi_security(guarded)

    async def answered(scope: Scope, receive: Receive, send: Send) -> None:
        mine = scope["type"] == "http" and (scope["method"], scope["path"]) in answers
        await (guarded if mine else application)(scope, receive, send)

    return answered


def once(body: bytes) -> Receive:
    """What receives a body that was received before."""

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def answer_or_none(answer: Answer, store: DirectStore, scope: Scope, body: bytes) -> tuple[int, bytes] | None:
    """An answer's status and JSON; None where MLflow has to answer, or to say why not."""
    try:
        return 200, in_ascii(answer(store, scope, body)).encode()
    except Unreachable as error:  # what was to be written may have been: a client may ask again, MLflow may not
        return error.get_http_status_code(), error.serialize_as_json().encode()
    except (Unusual, MlflowException):
        return None


def in_ascii(text: str) -> str:
    """The same JSON in ASCII: clients take answers that name no encoding for what they guess."""
    return text if text.isascii() else re.sub("[^\0-\x7f]+", lambda found: json.dumps(found[0])[1:-1], text)
