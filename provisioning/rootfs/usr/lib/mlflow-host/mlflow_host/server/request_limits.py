"""Limits of requests: bytes of the body, also decompressed, conditions of a search, nesting of JSON, and concurrent
requests of one user per process.

60 MiB of JSON took 1.8 GB to parse, and a search with 200 conditions 1.5 GB in PostgreSQL's planner. Every
reader could send both. The limits are far above the requests of MLflow's client and pages.
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
"""Maximum bytes of a request's body, by method and path; the first match counts. None: streamed files, which are
limited by the space on the volume. Every other body is read into memory. MLflow accepts a batch of at most 1 MB, and a
file of at most 10 MB in `upload-artifact`."""

LARGE_BYTES = 2 * MEBIBYTE
"""Larger bodies are parsed one at a time: 16 MiB of JSON may take 500 MB of memory."""

TRACES = "/v1/traces"
"""Path of OpenTelemetry's exports, whose body MLflow decompresses."""

SPANS = 10_000
"""Maximum number of spans in one export of OpenTelemetry. Its exporters send 512 at a time, its collector 8,192."""

DEAR = re.compile(
    r"(GET|HEAD) .*/(traces|unified-traces|get-history.*|records|get-online-trace-details|traces/get)"
    r"|(GET|HEAD|POST) .*/(search|graphql|traces/metrics|batchGet(Infos)?|calculate-filter-correlation)"
)
"""Requests whose answer may take much memory and time: searches, histories, traces."""

DEAR_AT_ONCE = 2
"""Maximum number of one user's expensive requests that a process handles at a time. With more, one user's searches end
sooner, but each takes up to 100 MB in PostgreSQL (`CONDITIONS`) and memory in this process."""

DEAR_SECONDS = 60
"""Seconds after which an expensive request makes no further query."""

POINTS = 50_000
"""Maximum number of points of a metric in one response. MLflow's client requests pages of 25,000."""

SAMPLED_POINTS = 100_000
"""Maximum number of points of several runs in one response, which take 1 KB of memory each. MLflow's charts request 320
of each of at most 100 runs."""

MOST_OF_A_RUN = 2500
"""The maximum and default of MLflow's max_results."""

SAMPLED = re.compile(r".*/metrics/get-history-bulk-interval")

CONDITIONS, ORDERS = 30, 10
"""Maximum number of comparisons in a search's filter, and of columns to order by. Each adds a join. With
join_collapse_limit = 4, PostgreSQL's planner takes 8 MB for 10 conditions and 100 MB for 30
(tests/bench/planner_memory.py)."""

GRAPHQL_RUNS = 100
"""Maximum number of runs in the answer to a GraphQL request. MLflow makes several objects for each metric, parameter
and tag of a run. MLflow's pages use only the first run of an answer."""

NO_THREAD = "can't start new thread"
"""The text of Python's RuntimeError when there is no memory for a thread's stack."""

STATM = Path("/proc/self/statm")
LAST_RETURN = [0.0]
RETURN_SECONDS = 5
"""Shortest time between two returns of memory. Each one stops the process while it collects garbage."""

FILTERS = ("filter", "filter_string", "filter_string1", "filter_string2", "base_filter", "filters")
"""The fields of MLflow's requests that contain a filter; `filters` is a list of them."""
LISTS = ("order_by", "filters")
SEARCHED = (*FILTERS, "order_by")

PRESIGNED_SECONDS = 3600
"""Longest validity of a presigned URL: enough for a large file."""

DECOMPRESSED_BYTES = 64 * MEBIBYTE
"""Maximum decompressed size of a body with traces, in bytes; equal to the limit of an uncompressed one
(`BODY_BYTES`)."""

USER = b"x-mlflow-host-user"
"""The header with the logged-in user, set by nginx, which removes a client's own."""

PRESIGNED = re.compile(r"/presigned-(up|down)load-url$")
ABOUT_FILES = re.compile(rf"{PRESIGNED.pattern}|/mlflow-artifacts/mpu/")
"""Requests about files whose body is JSON."""

UNSHARED = re.compile(r"artifact|^/gateway/|/mlflow/(assistant/|gateway-proxy)")
"""Requests that may wait long for S3 or a model; they have threads of their own."""


LARGE_ANSWER = re.compile(r"/v1/traces|.*/(graphql|get-history-bulk-interval)")
"""Requests whose objects take 200 MB. A process handles one of a user at a time."""


OBJECTS = 500_000
"""Maximum number of objects and lists in JSON. An empty list takes two bytes in the body and 56 in memory; `{"a":1}`
takes seven and about 200."""

KINDS = {"large": 1, "dear": DEAR_AT_ONCE}
"""Concurrent requests of one user, by kind."""

IDLE_USERS = 1000
"""Users without a request whose turns are kept, because making them takes as long as the rest of this layer."""

NEEDS_MUCH = "mlflow_host.needs_much"
"""Key of a scope, for a request that may take much memory."""

WAIT_SECONDS = 100
"""Longest wait for a turn. MLflow's client gives up after 120 seconds."""


class TooLong(Exception):
    """A body exceeds a limit; the text says which one."""


class HeldError:
    """A `send` function that keeps a response with status 500. Starlette sends one for any exception and then raises
    it again, so another answer is still possible."""

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
    """`application`, with 413 for a body that is too long. nginx sends the length of the bodies that it buffers; the
    others are counted."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        limit = limit_of(scope["method"], scope["path"]) if scope["type"] == "http" else None
        length = content_length(scope) if limit is not None else None
        if limit is None or (length is not None and length <= min(limit, LARGE_BYTES)):
            await application(scope, receive, send)
            return
        if length is not None and length > limit:
            more = f"the request has {length:,} bytes; {scope['path']} takes at most {limit:,}"
            await refuse(send, 413, f"{more}: send it in parts")
            return
        received, objects, held = 0, 0, HeldError(send)

        async def counted() -> Message:
            nonlocal received, objects
            message = await receive()
            body = message.get("body", b"")
            received += len(body)
            if received > limit:
                raise TooLong(f"the request has more than the {limit:,} bytes that {scope['path']} takes")
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
    """`application`, with at most `at_once` concurrent requests per user. At most `DEAR_AT_ONCE` of them are expensive,
    and at most one has a large body or a large answer; further ones of that user wait. The limit is lower than
    the number of threads, so that a thread is free for other users. Large bodies of all users are read one at a
    time."""
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
                sentence = f"this request waited {WAIT_SECONDS} seconds for its turn: send fewer at once"
                await answer(send, 429, {"error_code": "REQUEST_LIMIT_EXCEEDED", "message": sentence})
        finally:
            for turn in taken:
                turn.release()
            own.requests -= 1
            if not own.requests and len(users) > IDLE_USERS:
                del users[user]

    return in_turn


class TurnsOfUser:
    """One user's semaphores in this process, one per kind of request, and the number of the user's requests that run
    or wait."""

    def __init__(self, at_once: int) -> None:
        self.requests = 0
        self.turns = {kind: asyncio.Semaphore(most) for kind, most in KINDS.items()}
        self.turns["any"] = asyncio.Semaphore(at_once)


async def took(turns: list[asyncio.Semaphore], taken: list[asyncio.Semaphore]) -> bool:
    """Acquire `turns` one by one and append each to `taken`; False after `WAIT_SECONDS`. Every request calls this, so
    it sets a timer only if one of the turns is taken."""

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
    """The kinds of turns that a request takes, always in this order, so that no two requests wait for each other."""
    kinds = {
        "large": is_large or LARGE_ANSWER.fullmatch(path),
        "dear": is_dear(method, path),
        "any": not UNSHARED.search(path),
    }
    return tuple(kind for kind, applies in kinds.items() if applies)


def bound_memory(mebibytes: int) -> None:
    """Limit this process's data; 0: no limit. Beyond it, Python raises MemoryError in the thread that needs more."""
    if mebibytes:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (mebibytes * MEBIBYTE, hard))


def out_of_memory(method: str, path: str, length: int | None) -> tuple[int, str, str]:
    """Status, error code and sentence for a request that exceeded the memory of its process. 400 for a request that
    may need much; any other one fails because of them, and MLflow's client repeats it after 503.

    Ends the process after the requests under way: systemd starts it again, and the other processes answer meanwhile.
    Python returns little of its memory to the kernel, so the next requests would fail, too.
    """
    print(f"mlflow-host: {method} {path!r} exceeded the memory of this process, which starts again", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)
    if is_dear(method, path) or (length or 0) > LARGE_BYTES:
        return (
            400,
            "INVALID_PARAMETER_VALUE",
            "this request needs more memory than there is: send it in parts, or narrow it",
        )
    return 503, "TEMPORARILY_UNAVAILABLE", "other requests take the memory of this process: try again"


def within_memory(application: Application) -> Application:
    """`application`, with an answer for a request that exceeds the memory of this process."""

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
    """Whether Python raised it for a lack of memory. Other errors may contain any text, a user's as well."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and str(error) == NO_THREAD)


def uses_much_memory() -> bool:
    """Whether this process has used more than half of its limit, and has not returned memory for five seconds."""
    if time.monotonic() < LAST_RETURN[0] + RETURN_SECONDS:
        return False
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    data = int(STATM.read_text().split()[5]) * resource.getpagesize()
    return limit != resource.RLIM_INFINITY and data > limit / 2


def return_memory() -> None:
    """Collect garbage and return free memory to the kernel. The collector by itself runs too rarely: searches leave
    cycles of objects, one per row."""
    LAST_RETURN[0] = time.monotonic()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def inflating(application: Application) -> Application:
    """`application`, which receives compressed traces decompressed. MLflow limits the decompressed size nowhere: 64 MiB
    of gzip may contain 64 GiB."""
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
    """Whether a body of this request, other than a streamed file, may have more than LARGE_BYTES."""
    if scope["method"] not in ("POST", "PUT", "PATCH") or limit_of(scope["method"], scope["path"]) is None:
        return False
    length = content_length(scope)
    return length is None or length > LARGE_BYTES


def is_json(path: str) -> bool:
    """Whether a body of this path is JSON, neither a file nor spans."""
    return path != TRACES and ("artifact" not in path or bool(ABOUT_FILES.search(path)))


@lru_cache(maxsize=4096)
def is_dear(method: str, path: str) -> bool:
    return DEAR.fullmatch(f"{method} {path}") is not None


def only_objects(application: Application) -> Application:
    """`application`, with 400 for JSON that is no object where MLflow's routes of the AI gateway answer 500."""

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
            found = {}  # MLflow refuses it
        if isinstance(found, dict):
            await application(scope, replayed(body, receive), send)
        else:
            await refuse(send, 400, "the JSON of the request must be an object, in { and }")

    return checked


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` function that returns a body that was already received, and then waits for the client's end."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return again


def traces_apart(application: Application) -> Application:
    """`application`, with OpenTelemetry's exports handled in a thread, one at a time. MLflow converts the spans in the
    event loop, where every other request of this process would wait. 413 for more than `SPANS` spans."""
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
                sentence = f"the request has more than {SPANS:,} spans, the most that is taken: send them in parts"
                await refuse(collect, 413, sentence)
            else:
                await application(scope, replayed(body, never), collect)

        await asyncio.get_running_loop().run_in_executor(thread, lambda: asyncio.run(export()))
        for message in sent:
            await send(message)

    return checked


def spans_of(scope: Scope, body: bytes) -> int:
    """The number of spans in an export of OpenTelemetry, decompressed; 0 for one that MLflow refuses."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    if dict(scope["headers"]).get(b"content-type", b"").startswith(b"application/json"):
        return len(re.findall(rb'"span_?[iI]d"\s*:', body))
    try:
        sent = ExportTraceServiceRequest.FromString(body)
    except DecodeError:
        return 0
    return sum(len(scope_spans.spans) for resource in sent.resource_spans for scope_spans in resource.scope_spans)


class BudgetOfThread(threading.local):
    """What the request that this thread handles may still take; None: no limit."""

    until: float | None = None
    """The deadline for its queries."""
    runs: int | None = None
    """Runs in its answer."""
    exceeded_memory: bool = False
    """Whether a session of MLflow's store ended with a MemoryError, for which MLflow returns 500."""


THIS_THREAD = BudgetOfThread()


def check_time(*_: object) -> None:
    """SQLAlchemy's hook before each statement. Raises MlflowException (400) when the request has taken too long."""
    if THIS_THREAD.until is not None and time.monotonic() > THIS_THREAD.until:
        from mlflow.exceptions import MlflowException

        raise MlflowException.invalid_parameter_value(
            f"The queries of this request took longer than {DEAR_SECONDS} seconds: narrow it, or ask for fewer results "
            "at once."
        )


def note_memory_error(*_: object) -> None:
    """Called by SQLAlchemy after a rollback: MLflow's session rolls back while it handles an exception."""
    if isinstance(sys.exc_info()[1], MemoryError):
        THIS_THREAD.exceeded_memory = True


async def refuse(send: Send, status: int, sentence: str) -> None:
    await answer(send, status, {"error_code": "INVALID_PARAMETER_VALUE", "message": sentence})


async def answer(send: Send, status: int, content: dict[str, Any]) -> None:
    """Send JSON."""
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def decompressed(raw_body: bytes, content_encoding: str) -> bytes:
    """What MLflow's decompress_otlp_body returns, with HTTPException 413 for a body that decompresses to too much."""
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
    """`raw` decompressed, with all gzip members. Raises HTTPException 413, and zlib.error for incomplete data."""
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
    """The error of a request that MLflow would answer with 500, or of a presigned URL with too long a validity."""
    if b"\0" in unquote_to_bytes(query):
        return "The query of this request contains a NUL character (U+0000), which PostgreSQL cannot store: remove it."
    if path.endswith("/graphql") and not isinstance(body.get("query") if isinstance(body, dict) else None, str):
        return 'a GraphQL request needs its text in "query"'
    if PRESIGNED.search(path) and fields.get("expiration"):
        try:
            seconds = int(fields["expiration"])
        except (TypeError, ValueError, OverflowError):
            return None  # MLflow refuses values of the wrong type
        if not 0 < seconds <= PRESIGNED_SECONDS:
            return f"expiration is {seconds} seconds; a presigned URL is valid for 1 to {PRESIGNED_SECONDS}"
    return None


def problem(fields: Iterable[tuple[str, Any]]) -> str | None:
    """The limit that a request's fields exceed, as a sentence; None within the limits."""
    for name, value in fields:
        if name in FILTERS:
            texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
            conditions = sum(map(conditions_of, texts))
            if conditions > CONDITIONS:
                return f"the filter has {conditions} conditions; the limit is {CONDITIONS}: narrow it on the client"
        if name == "order_by" and isinstance(value, list) and len(value) > ORDERS:
            return f"the search has {len(value)} columns to order by; the limit is {ORDERS}"
    return None


def sampled(request: Any) -> str | None:
    """The sentence for histories of several runs with more than SAMPLED_POINTS points."""
    if not SAMPLED.fullmatch(request.path):
        return None
    runs, each = len(request.args.getlist("run_ids")), request.args.get("max_results", str(MOST_OF_A_RUN))
    if not each.isdecimal() or runs * min(int(each), MOST_OF_A_RUN) <= SAMPLED_POINTS:
        return None  # MLflow refuses a max_results of another type, and one that is larger
    return (
        f"{runs} runs with {each} points each are more than {SAMPLED_POINTS:,} points: request fewer runs at once, or "
        "a smaller max_results"
    )


def fields_of(request: Any, body: Any) -> list[tuple[str, Any]]:
    """The fields of a Flask request with this JSON, as MLflow reads them: from the query of a GET that has one, else
    from the JSON, which may also be a text that contains the JSON. Names are protobuf's: it takes `orderBy` for
    `order_by`."""
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
    """MLflow's `search` by a protobuf message, with a check that raises MlflowException (400) for one beyond the
    limits. A GraphQL request may call `search` several times, and has no JSON that Flask's hook could check."""
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
                f"a GraphQL request returns at most {GRAPHQL_RUNS:,} runs: ask for fewer at once"
            )
        if left is not None:
            message.max_results = min(message.max_results, left)
        found = search(message)
        if left is not None:
            THIS_THREAD.runs = left - len(found.runs)
        return found

    return checked


def conditions_of(text: str) -> int:
    """Comparisons in a filter, which MLflow joins by AND alone; quoted text does not count."""
    return len(re.findall(r"\band\b", re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`", "", text), re.IGNORECASE)) + 1


def refuse_dear_requests(flask_application: Any) -> None:
    """Make MLflow's Flask application return 400 to searches beyond the limits, to JSON that nests too deeply, and to
    JSON that is not an object where MLflow would return 500."""
    import flask

    def with_json() -> bool:
        """Whether the request has a body other than a file."""
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
        if body is None or isinstance(body, (dict, str)):  # old clients send an object as the text of its JSON
            return response
        return answered("the JSON of the request must be an object, in { and }")

    @flask_application.before_request  # type: ignore[untyped-decorator]
    def refuse() -> Any:
        request = flask.request
        if request.routing_exception is not None:  # MLflow answers with 404, 405 or a redirect
            return None
        try:
            THIS_THREAD.until = time.monotonic() + DEAR_SECONDS if is_dear(request.method, request.path) else None
            THIS_THREAD.runs = GRAPHQL_RUNS if request.path.endswith("/graphql") else None
            THIS_THREAD.exceeded_memory = False  # a FastAPI route in this thread may have set it
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
        """The thread's next request may be one of MLflow's FastAPI routes, which has no budget."""
        THIS_THREAD.__dict__.clear()

    @flask_application.errorhandler(MemoryError)  # type: ignore[untyped-decorator]
    def say_what_was_too_large(_: MemoryError | None = None) -> Any:
        request = flask.request
        status, code, sentence = out_of_memory(request.method, request.path, request.content_length)
        return answered(sentence, status, code)

    def answered(sentence: str, status: int = 400, code: str = "INVALID_PARAMETER_VALUE") -> Any:
        content = {"error_code": code, "message": sentence}
        return flask.Response(json.dumps(content), status=status, mimetype="application/json")
