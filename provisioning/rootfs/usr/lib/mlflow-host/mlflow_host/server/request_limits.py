"""Limits for requests: the size of the body, the number of conditions in a search, the depth of nested JSON, and the
number of one user's concurrent requests per process.

Without limits, parsing a request with 60 MiB of JSON used 1.8 GB of memory, and PostgreSQL's planner used 1.5 GB for a
search with 200 conditions. The requests that MLflow's client and web pages send are far below the limits.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import re
import resource
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from google.protobuf.message import DecodeError

from mlflow_host.server.flask_shortcut import Application, Message, Receive, Scope, Send, whole

MEBIBYTE = 2**20

BODY_BYTES = (
    (re.compile(r"PUT /(ajax-)?api/2\.0/mlflow-artifacts/artifacts/.+"), None),
    (re.compile(r".*/graphql"), MEBIBYTE // 8),
    (
        re.compile(
            r"(GET|HEAD|OPTIONS) .*|"
            r".*/(search|search-datasets|batchGet(Infos)?|metrics|calculate-filter-correlation)"
        ),
        MEBIBYTE,
    ),
    (re.compile(r".*/v1/traces"), 64 * MEBIBYTE),
    (re.compile(r".*", re.DOTALL), 16 * MEBIBYTE),
)
"""Maximum bytes of a request's body, by method and path. The first match counts. Streamed files have no limit (None),
because they are not read into memory. Some uploads are first written to the data volume, whose free space is then the
limit. MLflow itself accepts a batch of at most 1 MB, and a file of at most 10 MB in `upload-artifact`."""

LARGE_BYTES = 2 * MEBIBYTE
"""A process parses only one body of more than this size at a time, because 16 MiB of JSON may use 500 MB of memory."""

TRACES = "/v1/traces"
"""The path for OpenTelemetry's exports. MLflow decompresses their bodies."""

SPANS = 10_000
"""Maximum number of spans in one export. An exporter of OpenTelemetry sends 512 spans, and a collector sends 8,192."""

DEAR = re.compile(
    r"(GET|HEAD) .*/(traces|unified-traces|get-history.*|records|get-online-trace-details|traces/get)"
    r"|(GET|HEAD|POST) .*/(search|graphql|traces/metrics|batchGet(Infos)?|calculate-filter-correlation)"
)
"""Requests for searches, metric histories and traces are expensive: a response may need much memory and time."""

DEAR_AT_ONCE = 2
"""Maximum number of one user's concurrent expensive requests per process. A higher number would speed up one user's
searches, but each search may use 100 MB in PostgreSQL (`CONDITIONS`), and also memory in this process."""

DEAR_SECONDS = 60
"""An expensive request can send no more queries to PostgreSQL after this number of seconds."""

POINTS = 50_000
"""Maximum number of points of one metric in a response. MLflow's client requests pages of 25,000 points."""

SAMPLED_POINTS = 100_000
"""Maximum number of metric points of several runs in a response. Each point uses 1 KB of memory. MLflow's charts
request 320 points per run, for at most 100 runs."""

MOST_OF_A_RUN = 2500
"""If a path matches `SAMPLED`, this number is MLflow's default and MLflow's maximum for the parameter max_results."""

SAMPLED = re.compile(r".*/metrics/get-history-bulk-interval")

CONDITIONS, ORDERS = 30, 10
"""Maximum number of conditions in the filter of a search, and maximum number of columns in order_by. Each condition and
each column adds a join to the SQL query. With join_collapse_limit = 4, PostgreSQL's planner uses 8 MB for 10 conditions
and 100 MB for 30 conditions (tests/bench/planner_memory.py)."""

GRAPHQL_RUNS = 100
"""Maximum number of runs in the response to a GraphQL request. MLflow creates several objects for each metric,
parameter and tag of a run. MLflow's web pages use only the first run of a GraphQL response."""

NO_THREAD = "can't start new thread"
"""The text of Python's RuntimeError if there is not enough memory for a new thread's stack."""

STATM = Path("/proc/self/statm")
LAST_RETURN = [0.0]
RETURN_SECONDS = 5
"""Minimum number of seconds between two calls of `return_memory`, which stops all threads during garbage collection."""

FILTERS = ("filter", "filter_string", "filter_string1", "filter_string2", "base_filter", "filters")
"""The fields of MLflow's requests that contain a filter. The field `filters` contains a list of filters."""
LISTS = ("order_by", "filters")
SEARCHED = (*FILTERS, "order_by")

PRESIGNED_SECONDS = 3600
"""Maximum validity of a presigned URL in seconds, which is enough for the transfer of a large file."""

DECOMPRESSED_BYTES = 64 * MEBIBYTE
"""Maximum size of traces after decompression, in bytes. Traces that a client sends uncompressed have the same limit."""

USER = b"x-mlflow-host-user"
"""nginx sets this header to the name of the logged-in user, and ignores a header of this name from a client."""

PRESIGNED = re.compile(r"/presigned-(up|down)load-url$")
ABOUT_FILES = re.compile(rf"{PRESIGNED.pattern}|/mlflow-artifacts/mpu/")
"""The paths of requests that concern a file, but whose body is JSON and not the file."""

UNSHARED = re.compile(r"artifact|^/gateway/|/mlflow/(assistant/|gateway-proxy)")
"""Requests that may wait a long time for S3 or for a model. They run in separate threads."""


LARGE_ANSWER = re.compile(r"/v1/traces|.*/(graphql|get-history-bulk-interval)")
"""Requests for which Python's objects may use 200 MB; a process handles only one of them per user at a time."""


OBJECTS = 500_000
"""Maximum number of objects and lists in JSON. An empty list has 2 bytes in the body and 56 bytes in memory. The object
`{"a":1}` has 7 bytes in the body and about 200 bytes in memory."""

KINDS = {"large": 1, "dear": DEAR_AT_ONCE}
"""Maximum number of concurrent requests of one user, by kind of request."""

IDLE_USERS = 1000
"""A process keeps the semaphores of at most this number of users after the users' requests have ended. To create new
semaphores takes as much time as the rest of the function `shared`."""

NEEDS_MUCH = "mlflow_host.needs_much"
"""This key of the ASGI scope has the value true if the request may use much memory."""

WAIT_SECONDS = 100
"""Maximum time that a request waits for other requests of the same user. The timeout of MLflow's client is 120 s."""


class TooLong(Exception):
    """The body of a request exceeds a limit. The exception's text names the limit."""


class HeldError:
    """A `send` function that stores a response with status 500 instead of sending it. Starlette sends a 500 response
    for any exception and then raises the exception. The caller of Starlette can then send a different response."""

    def __init__(self, send: Send) -> None:
        self.send, self.begun = send, False
        self.kept: list[Message] = []

    async def __call__(self, message: Message) -> None:
        if self.kept or message.get("status") == 500:
            self.kept.append(message)
        else:
            self.begun = True
            await self.send(message)

    async def flush(self) -> None:
        while self.kept:
            await self.send(self.kept.pop(0))


@lru_cache(maxsize=4096)
def limit_of(method: str, path: str) -> int | None:
    return next(limit for pattern, limit in BODY_BYTES if pattern.fullmatch(f"{method} {path}"))


def content_length(scope: Scope) -> int | None:
    return next((int(value) for name, value in scope["headers"] if name == b"content-length"), None)


def limited(application: Application) -> Application:
    """Return `application` with middleware that returns 413 for a body that is too long. If nginx has buffered the
    body, the request has a Content-Length. If a request has no Content-Length, the middleware counts the bytes."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        limit = limit_of(scope["method"], scope["path"]) if scope["type"] == "http" else None
        length = content_length(scope) if limit is not None else None
        if limit is None or (length is not None and length <= min(limit, LARGE_BYTES)):
            await application(scope, receive, send)
            return
        if length is not None and length > limit:
            more = f"the request has {length:,} bytes; the limit for {scope['path']} is {limit:,}"
            await refuse(send, 413, f"{more}: send it in parts")
            return
        received, objects, held = 0, 0, HeldError(send)

        async def counted() -> Message:
            nonlocal received, objects
            message = await receive()
            body = message.get("body", b"")
            received += len(body)
            if received > limit:
                raise TooLong(f"the request has more than {limit:,} bytes, the limit for {scope['path']}")
            objects += body.count(b"{") + body.count(b"[")
            if objects > OBJECTS and is_json(scope["path"]):
                raise TooLong(f"the JSON of the request has more than {OBJECTS:,} objects and lists")
            return message

        try:
            await application(scope, counted, held)
            await held.flush()
        except Exception as error:
            if isinstance(error, TooLong) and not held.begun:
                await refuse(send, 413, f"{error}: send it in parts")
                return
            await held.flush()
            raise

    return checked


def shared(application: Application, at_once: int) -> Application:
    """Return `application` with limits for each user's concurrent requests; a request above a limit waits. At the same
    time, the process handles at most `at_once` requests of a user, of which at most `DEAR_AT_ONCE` are expensive, and
    at most one has a large body or a large response. `at_once` is lower than the number of threads, so that a thread is
    free for other users. The process reads only one large body at a time, even if the bodies are of different users."""
    users: dict[bytes, TurnsOfUser] = {}
    large = asyncio.Semaphore(1)

    async def in_turn(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await application(scope, receive, send)
            return
        is_large = may_be_large(scope)
        kinds = kinds_of(scope["method"], scope["path"], is_large)
        scope[NEEDS_MUCH] = is_large or "dear" in kinds
        user = next((value for name, value in scope["headers"] if name == USER), b"")
        if not user:
            await application(scope, receive, send)
            return
        own = users.get(user) or users.setdefault(user, TurnsOfUser(at_once))
        turns = [own.turns[kind] for kind in kinds] + [large] * is_large
        own.requests += 1
        taken: list[asyncio.Semaphore] = []
        try:
            if await took(turns, taken):
                await application(scope, receive, send)
            else:
                sentence = f"this request waited {WAIT_SECONDS} seconds for your other requests: send fewer at once"
                await answer(send, 429, {"error_code": "REQUEST_LIMIT_EXCEEDED", "message": sentence})
        finally:
            for turn in taken:
                turn.release()
            own.requests -= 1
            if not own.requests and len(users) > IDLE_USERS:
                del users[user]

    return in_turn


class TurnsOfUser:
    """One user's semaphores in this process, by kind of request. `requests` counts running and waiting requests."""

    def __init__(self, at_once: int) -> None:
        self.requests = 0
        self.turns = {kind: asyncio.Semaphore(most) for kind, most in KINDS.items()}
        self.turns["any"] = asyncio.Semaphore(at_once)


async def took(turns: list[asyncio.Semaphore], taken: list[asyncio.Semaphore]) -> bool:
    """Acquire the semaphores `turns` in order, and append each to `taken`. Returns false after `WAIT_SECONDS`. To keep
    the common case fast, a timer is set only if one of the semaphores is locked."""

    async def acquire() -> None:
        for turn in turns:
            await turn.acquire()
            taken.append(turn)

    if not any(turn.locked() for turn in turns):
        await acquire()
        return True
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            await acquire()
    except TimeoutError:
        return False
    return True


@lru_cache(maxsize=4096)
def kinds_of(method: str, path: str, is_large: bool) -> tuple[str, ...]:
    """Return the kinds of semaphores that a request acquires. The kinds always have the same order, so two requests
    cannot cause a deadlock."""
    kinds = {
        "large": is_large or LARGE_ANSWER.fullmatch(path),
        "dear": is_dear(method, path),
        "any": not UNSHARED.search(path),
    }
    return tuple(kind for kind, applies in kinds.items() if applies)


def bound_memory(mebibytes: int) -> None:
    """Limit this process's memory (RLIMIT_DATA); 0 sets no limit. If a thread needs more memory than the limit allows,
    Python raises MemoryError in that thread."""
    if mebibytes:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (mebibytes * MEBIBYTE, hard))


def out_of_memory(method: str, path: str, length: int | None) -> tuple[int, str, str]:
    """Stop this process, and return the status, error code and message for a request that ran out of memory.

    The status is 400 for a request that may need much memory. Any other request fails only because of concurrent
    requests, so the status is 503, and MLflow's client tries again. The process completes its running requests, and
    systemd restarts it. Without a restart, later requests would fail: Python returns little memory to the kernel.
    """
    print(f"mlflow-host: {method} {path!r} exceeded the memory of this process, which restarts", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)
    if is_dear(method, path) or (length or 0) > LARGE_BYTES:
        return (
            400,
            "INVALID_PARAMETER_VALUE",
            "this request needs more memory than there is: send it in parts, or use a narrower filter",
        )
    return 503, "TEMPORARILY_UNAVAILABLE", "other requests use all memory of this process: try again"


def within_memory(application: Application) -> Application:
    """Return `application` with middleware that sends an error response if there is not enough memory for a request."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        held = HeldError(send)
        try:
            await application(scope, receive, held)
            await held.flush()
        except Exception as error:
            if lacks_memory(error) and scope["type"] == "http":
                status, code, sentence = out_of_memory(scope["method"], scope["path"], content_length(scope))
                if not held.begun:
                    await answer(send, status, {"error_code": code, "message": sentence})
                    return
            await held.flush()
            raise
        finally:
            if scope.get(NEEDS_MUCH) and uses_much_memory():
                await asyncio.to_thread(return_memory)

    return checked


def lacks_memory(error: Exception) -> bool:
    """Return true if Python raised `error` because there was not enough memory. The complete text of a RuntimeError is
    compared, because the text of another error may contain text that a user sent."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and str(error) == NO_THREAD)


def uses_much_memory() -> bool:
    """Return true if this process uses over half of its memory limit and did not call `return_memory` recently."""
    if time.monotonic() < LAST_RETURN[0] + RETURN_SECONDS:
        return False
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    data = int(STATM.read_text().split()[5]) * resource.getpagesize()
    return limit != resource.RLIM_INFINITY and data > limit / 2


def return_memory() -> None:
    """Collect garbage and return free memory to the kernel. A search leaves one reference cycle per row, and Python's
    automatic garbage collection runs too rarely to free these cycles."""
    LAST_RETURN[0] = time.monotonic()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def inflating(application: Application) -> Application:
    """Return `application` with middleware that decompresses traces and limits their decompressed size. MLflow has no
    limit for the decompressed size, and 64 MiB of gzip may contain 64 GiB."""
    from fastapi import HTTPException

    async def inflated_first(scope: Scope, receive: Receive, send: Send) -> None:
        sent = dict(scope["headers"]) if scope["type"] == "http" and scope["path"] == TRACES else {}
        encoding = sent.get(b"content-encoding", b"").decode("latin-1").lower()
        if not encoding:
            await application(scope, receive, send)
            return
        body = await whole(receive)
        if body is None:
            return
        try:
            plain = await asyncio.to_thread(decompressed, body, encoding)
        except HTTPException as refused:
            await answer(send, refused.status_code, {"detail": refused.detail})
            return
        left = [entry for entry in scope["headers"] if entry[0] not in (b"content-encoding", b"content-length")]
        length = (b"content-length", str(len(plain)).encode())
        await application({**scope, "headers": [*left, length]}, replayed(plain, receive), send)

    return inflated_first


def may_be_large(scope: Scope) -> bool:
    """Return true if the request's body may have more than LARGE_BYTES and is not a streamed file."""
    if scope["method"] not in ("POST", "PUT", "PATCH") or limit_of(scope["method"], scope["path"]) is None:
        return False
    length = content_length(scope)
    return length is None or length > LARGE_BYTES


def is_json(path: str) -> bool:
    """Return true if the body of a request to this path is JSON, and not a file or spans."""
    return path != TRACES and ("artifact" not in path or bool(ABOUT_FILES.search(path)))


@lru_cache(maxsize=4096)
def is_dear(method: str, path: str) -> bool:
    return DEAR.fullmatch(f"{method} {path}") is not None


def only_objects(application: Application) -> Application:
    """Return `application` with middleware that returns 400 if the JSON for an AI gateway route is not an object.
    MLflow would return 500."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith("/gateway/"):
            await application(scope, receive, send)
            return
        body = await whole(receive)
        if body is None:
            return
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            found = {}  # MLflow itself rejects invalid JSON
        if isinstance(found, dict):
            await application(scope, replayed(body, receive), send)
        else:
            await refuse(send, 400, "the JSON of the request must be an object, in { and }")

    return checked


def replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` function that first returns `body`, which was already read, and then calls `receive`."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return again


def traces_apart(application: Application) -> Application:
    """Return `application` with middleware that handles OpenTelemetry's exports in one separate thread. Without it,
    MLflow would convert spans in the event loop, and other requests would wait. If an export exceeds `SPANS` spans, the
    status is 413."""
    thread = ThreadPoolExecutor(1, "traces")

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] != TRACES:
            await application(scope, receive, send)
            return
        body = await whole(receive)
        if body is None:
            return
        sent: list[Message] = []

        async def collect(message: Message) -> None:
            sent.append(message)

        async def never() -> Message:
            return {"type": "http.disconnect"}

        async def export() -> None:
            if spans_of(scope, body) > SPANS:
                sentence = f"the request has more than {SPANS:,} spans, the limit of a request: send them in parts"
                await refuse(collect, 413, sentence)
            else:
                await application(scope, replayed(body, never), collect)

        await asyncio.get_running_loop().run_in_executor(thread, lambda: asyncio.run(export()))
        for message in sent:
            await send(message)

    return checked


def spans_of(scope: Scope, body: bytes) -> int:
    """Return the number of spans in a decompressed export of OpenTelemetry, or 0 for a body that MLflow rejects."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    if dict(scope["headers"]).get(b"content-type", b"").startswith(b"application/json"):
        return len(re.findall(rb'"span_?[iI]d"\s*:', body))
    try:
        sent = ExportTraceServiceRequest.FromString(body)
    except DecodeError:
        return 0
    return sum(len(scope_spans.spans) for resource in sent.resource_spans for scope_spans in resource.scope_spans)


class BudgetOfThread(threading.local):
    """The remaining limits of the request that this thread handles. None means no limit."""

    until: float | None = None
    """The request can send no queries to PostgreSQL after this time (time.monotonic)."""
    runs: int | None = None
    """Number of runs that the response may still contain."""
    exceeded_memory: bool = False
    """True if a session of MLflow's store ended with a MemoryError. MLflow returns 500 for a MemoryError."""


THIS_THREAD = BudgetOfThread()


def check_time(*_: object) -> None:
    """SQLAlchemy's hook before each statement. Raises MlflowException (400) if the request's time limit has passed."""
    if THIS_THREAD.until is not None and time.monotonic() > THIS_THREAD.until:
        from mlflow.exceptions import MlflowException

        raise MlflowException.invalid_parameter_value(
            f"The queries of this request took longer than {DEAR_SECONDS} seconds: use a narrower filter, or request "
            "fewer results at once."
        )


def note_memory_error(*_: object) -> None:
    """SQLAlchemy's hook after a rollback. MLflow rolls back while it handles an error, so sys.exc_info() returns it."""
    if isinstance(sys.exc_info()[1], MemoryError):
        THIS_THREAD.exceeded_memory = True


async def refuse(send: Send, status: int, sentence: str) -> None:
    await answer(send, status, {"error_code": "INVALID_PARAMETER_VALUE", "message": sentence})


async def answer(send: Send, status: int, content: dict[str, Any]) -> None:
    """Send a JSON response."""
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def decompressed(raw_body: bytes, content_encoding: str) -> bytes:
    """Decompress a body like MLflow's decompress_otlp_body. Raises HTTPException (413) if the result is too large."""
    from fastapi import HTTPException

    formats = {"gzip": (31,), "deflate": (15, -15)}.get(content_encoding)
    if formats is None:
        raise HTTPException(400, f"Unsupported Content-Encoding: {content_encoding}")
    for window in formats:
        try:
            return inflated(raw_body, window)
        except zlib.error:
            pass
    raise HTTPException(400, f"Failed to decompress {content_encoding} payload")


def inflated(raw: bytes, window: int) -> bytes:
    """Decompress `raw`, including all gzip members. Raises HTTPException (413) if the result is too large. Raises
    zlib.error for incomplete data."""
    from fastapi import HTTPException

    found = bytearray()
    while raw or not found:
        stream = zlib.decompressobj(window)
        found += stream.decompress(raw, DECOMPRESSED_BYTES + 1 - len(found))
        if len(found) > DECOMPRESSED_BYTES:
            raise HTTPException(413, f"the decompressed body has more bytes than the limit of {DECOMPRESSED_BYTES:,}")
        if not stream.eof:
            raise zlib.error("incomplete")
        raw = stream.unused_data.lstrip(b"\0") if window == 31 else b""
        if not raw:
            break
    return bytes(found)


def oddity(path: str, query: bytes, body: Any, fields: dict[str, Any]) -> str | None:
    """Return an error message if MLflow would return 500 for the request, or if the request asks for a presigned URL
    whose validity is too long. Returns None for other requests."""
    if b"\0" in unquote_to_bytes(query):
        return "The query of this request contains a NUL character (U+0000), which PostgreSQL cannot store: remove it."
    if path.endswith("/graphql") and not isinstance(body.get("query") if isinstance(body, dict) else None, str):
        return 'a GraphQL request needs its text in "query"'
    if PRESIGNED.search(path) and fields.get("expiration"):
        try:
            seconds = int(fields["expiration"])
        except (TypeError, ValueError, OverflowError):
            return None  # MLflow itself rejects values of the wrong type
        if not 0 < seconds <= PRESIGNED_SECONDS:
            return f"expiration is {seconds} seconds; a presigned URL is valid for 1 to {PRESIGNED_SECONDS}"
    return None


def problem(fields: Iterable[tuple[str, Any]]) -> str | None:
    """Return an error message if a request's fields exceed one of the limits, or None if no limit is exceeded."""
    for name, value in fields:
        if name in FILTERS:
            texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
            conditions = sum(map(conditions_of, texts))
            if conditions > CONDITIONS:
                return f"the filter has {conditions} conditions; the limit is {CONDITIONS}: use fewer conditions"
        if name == "order_by" and isinstance(value, list) and len(value) > ORDERS:
            return f"the search has {len(value)} columns to order by; the limit is {ORDERS}"
    return None


def sampled(request: Any) -> str | None:
    """Return an error message if a request for metric histories of several runs asks for too many points, else None."""
    if not SAMPLED.fullmatch(request.path):
        return None
    runs, each = len(request.args.getlist("run_ids")), request.args.get("max_results", str(MOST_OF_A_RUN))
    if not each.isdecimal() or runs * min(int(each), MOST_OF_A_RUN) <= SAMPLED_POINTS:
        return None  # MLflow itself rejects a max_results that is not a number or is too large
    return (
        f"{runs} runs with {each} points each are more than {SAMPLED_POINTS:,} points: request fewer runs at once, or "
        "a smaller max_results"
    )


def fields_of(request: Any, body: Any) -> list[tuple[str, Any]]:
    """Return the fields of a Flask request as MLflow would read them. If a GET request has a query string, the fields
    are in the query string. For all other requests, `body` contains the fields: `body` is a JSON object, or a JSON
    string that contains a JSON object. The names of the fields are converted from the form `orderBy` to the form
    `order_by`, because protobuf accepts both forms."""
    if request.method == "GET" and request.args:
        lists = request.args.to_dict(flat=False)
        return [(name, values if name in LISTS else values[0]) for name, values in lists.items()]
    if isinstance(body, str):
        try:
            body = json.loads(body)
        except ValueError:
            return []
    if not isinstance(body, dict):
        return []
    return [(re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", name), value) for name, value in body.items()]


def bounded(search: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return MLflow's function `search` with a check that raises MlflowException (400) if a search exceeds the limits.
    A GraphQL request may call `search` several times, and Flask's hook cannot check the searches in a GraphQL text."""
    from mlflow.exceptions import MlflowException

    def checked(message: Any) -> Any:
        fields = ((each.name, getattr(message, each.name)) for each, _ in message.ListFields())
        listed = (
            (name, value if isinstance(value, str) else list(value)) for name, value in fields if name in SEARCHED
        )
        if sentence := problem(listed):
            raise MlflowException.invalid_parameter_value(sentence)
        left = THIS_THREAD.runs
        asked_for = message.max_results if message.HasField("max_results") else 0
        if left is not None and (left <= 0 or asked_for > GRAPHQL_RUNS):
            raise MlflowException.invalid_parameter_value(
                f"a GraphQL request returns at most {GRAPHQL_RUNS:,} runs: request fewer at once"
            )
        if left is not None:
            message.max_results = min(message.max_results, left)
        found = search(message)
        if left is not None:
            THIS_THREAD.runs = left - len(found.runs)
        return found

    return checked


def conditions_of(text: str) -> int:
    """Return the number of conditions in a filter. Quoted text is ignored. In MLflow, only AND can join conditions."""
    return len(re.findall(r"\band\b", re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`", "", text), re.IGNORECASE)) + 1


def refuse_dear_requests(flask_application: Any) -> None:
    """Make MLflow's Flask application return 400 for searches that exceed the limits, and for JSON that nests too
    deeply. If MLflow returns 500 because the JSON is not an object, the status is changed to 400."""
    import flask

    def with_json() -> bool:
        """Return true if the request has a body that is not a file."""
        request = flask.request
        has_json = not UNSHARED.search(request.path) or ABOUT_FILES.search(request.path)
        return bool(has_json and request.data)

    @flask_application.after_request  # type: ignore[untyped-decorator]
    def explain(response: Any) -> Any:
        if response.status_code == 500 and THIS_THREAD.exceeded_memory:
            return say_what_was_too_large()
        if response.status_code != 500 or not with_json():
            return response
        body = flask.request.get_json(force=True, silent=True)
        if body is None or isinstance(body, (dict, str)):  # old clients send a JSON string that contains a JSON object
            return response
        return answered("the JSON of the request must be an object, in { and }")

    @flask_application.before_request  # type: ignore[untyped-decorator]
    def refuse() -> Any:
        request = flask.request
        if request.routing_exception is not None:  # MLflow itself returns 404, 405 or a redirect for this path
            return None
        try:
            THIS_THREAD.until = time.monotonic() + DEAR_SECONDS if is_dear(request.method, request.path) else None
            THIS_THREAD.runs = GRAPHQL_RUNS if request.path.endswith("/graphql") else None
            THIS_THREAD.exceeded_memory = False  # an earlier FastAPI request in this thread may have set the flag
            body = request.get_json(force=True, silent=True) if with_json() else None
            fields = fields_of(request, body)
        except RecursionError:
            return answered("the JSON of the request nests too deeply")
        if sentence := (
            oddity(request.path, request.query_string, body, dict(fields)) or problem(fields) or sampled(request)
        ):
            return answered(sentence)
        if body is None and request.path.endswith("/runs/log-batch") and with_json():
            return answered("the body of the request is not JSON")
        return None

    @flask_application.teardown_request  # type: ignore[untyped-decorator]
    def forget(_: BaseException | None) -> None:
        """Remove this request's limits. The thread's next request may be for a FastAPI route, which has no limits."""
        THIS_THREAD.__dict__.clear()

    @flask_application.errorhandler(MemoryError)  # type: ignore[untyped-decorator]
    def say_what_was_too_large(_: MemoryError | None = None) -> Any:
        request = flask.request
        status, code, sentence = out_of_memory(request.method, request.path, request.content_length)
        return answered(sentence, status, code)

    def answered(sentence: str, status: int = 400, code: str = "INVALID_PARAMETER_VALUE") -> Any:
        content = {"error_code": code, "message": sentence}
        return flask.Response(json.dumps(content), status=status, mimetype="application/json")
