"""Limits of requests: bytes of the body, also decompressed, conditions of a search, nesting of JSON, and concurrent
requests of one user per process.

60 MiB of JSON took 1.8 GB to parse, and a search with 200 conditions 1.5 GB in PostgreSQL's planner. Every
reader could send both. The limits are far above the requests of MLflow's client and pages.
"""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from typing import Any
from urllib.parse import unquote_to_bytes

from mlflow_host.server.flask_shortcut import Application, Message, Receive, Scope, Send, whole

MEBIBYTE = 2**20

BODY_BYTES = (
    (re.compile(r"artifact"), None),
    (re.compile(r"/graphql$"), MEBIBYTE // 8),
    (re.compile(r"/(search|search-datasets|batchGet(Infos)?|metrics|calculate-filter-correlation)$"), MEBIBYTE),
    (re.compile(r"/v1/traces$"), 64 * MEBIBYTE),
    (re.compile(r""), 16 * MEBIBYTE),
)
"""Maximum size of a request's body in bytes, by the end of its path; the first match counts. None: files, which are
limited by the space on the volume. MLflow accepts a batch of at most 1 MB."""

CONDITIONS, ORDERS = 50, 20
"""Maximum number of comparisons in a search's filter, and of columns to order by. Each adds a join."""

FILTERS = ("filter", "filter_string")


PRESIGNED_SECONDS = 3600
"""Longest validity of a presigned URL: enough for a large file."""

TRACES = re.compile(r"/v1/traces$")
"""Requests whose body MLflow decompresses."""

DECOMPRESSED_BYTES = 64 * MEBIBYTE
"""Maximum decompressed size of a body with traces, in bytes; equal to the limit of an uncompressed one
(`BODY_BYTES`)."""

USER = b"x-mlflow-host-user"
"""The header with the logged-in user, set by nginx, which removes a client's own."""

PRESIGNED = re.compile(r"/presigned-(up|down)load-url$")

UNSHARED = re.compile(r"artifact|^/gateway/|/mlflow/(assistant/|gateway-proxy)")
"""Requests that may wait long for S3 or a model; they have threads of their own."""


def refusal(path: str, length: int) -> dict[str, str] | None:
    """MLflow's JSON for a body that is too long; None for an allowed one."""
    limit = next(limit for pattern, limit in BODY_BYTES if pattern.search(path))
    if limit is None or length <= limit:
        return None
    return {
        "error_code": "INVALID_PARAMETER_VALUE",
        "message": f"the request has {length:,} bytes; {path} accepts at most {limit:,}: send it in parts",
    }


def limited(application: Application) -> Application:
    """`application`, with 413 for a body that is too long. nginx buffers the body and sends its length."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            length = next((int(value) for name, value in scope["headers"] if name == b"content-length"), 0)
            if content := refusal(scope["path"], length):
                body = json.dumps(content).encode()
                headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
                await send({"type": "http.response.start", "status": 413, "headers": headers})
                await send({"type": "http.response.body", "body": body})
                return
        await application(scope, receive, send)

    return checked


def shared(application: Application, at_once: int) -> Application:
    """`application`, with at most `at_once` concurrent requests per user; further ones of that user wait. The limit is
    lower than the number of threads, so that a thread is free for other users."""
    turns: dict[bytes, tuple[asyncio.Semaphore, list[object]]] = {}

    async def in_turn(scope: Scope, receive: Receive, send: Send) -> None:
        user = next((value for name, value in scope.get("headers", ()) if name == USER), b"")
        if not user or UNSHARED.search(scope["path"]):
            await application(scope, receive, send)
            return
        turn, present = turns.setdefault(user, (asyncio.Semaphore(at_once), []))
        present.append(scope)
        try:
            async with turn:
                await application(scope, receive, send)
        finally:
            present.pop()
            if not present:
                del turns[user]

    return in_turn


def inflating(application: Application) -> Application:
    """`application`, which gets compressed traces decompressed. MLflow would decompress any number of bytes: 64 MiB of
    gzip may hold 64 GiB."""
    from fastapi import HTTPException

    async def inflated_first(scope: Scope, receive: Receive, send: Send) -> None:
        sent = dict(scope["headers"]) if scope["type"] == "http" and TRACES.search(scope["path"]) else {}
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
            content = json.dumps({"detail": refused.detail}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
            await send({"type": "http.response.start", "status": refused.status_code, "headers": headers})
            await send({"type": "http.response.body", "body": content})
            return
        left = [entry for entry in scope["headers"] if entry[0] not in (b"content-encoding", b"content-length")]
        waiting: list[Message] = [{"type": "http.request", "body": plain, "more_body": False}]

        async def receive_plain() -> Message:
            return waiting.pop() if waiting else await receive()

        length = (b"content-length", str(len(plain)).encode())
        await application({**scope, "headers": [*left, length]}, receive_plain, send)

    return inflated_first


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


def oddity(path: str, query: bytes, body: Any) -> str | None:
    """The error of a request that MLflow would answer with 500, or of a presigned URL with too long a validity."""
    if b"\0" in unquote_to_bytes(query):
        return "The query of this request contains a NUL character (U+0000), which PostgreSQL cannot store: remove it."
    if path.endswith("/graphql") and not isinstance(body.get("query") if isinstance(body, dict) else None, str):
        return 'a GraphQL request needs its text in "query"'
    if PRESIGNED.search(path) and isinstance(body, dict) and body.get("expiration"):
        try:
            seconds = int(body["expiration"])
        except (TypeError, ValueError, OverflowError):
            return None  # MLflow refuses values of the wrong type
        if not 0 < seconds <= PRESIGNED_SECONDS:
            return f"expiration is {seconds} seconds; a presigned URL is valid for 1 to {PRESIGNED_SECONDS}"
    return None


def problem(search: Any) -> str | None:
    """The limit that a search's JSON exceeds, as a sentence; None within the limits."""
    if not isinstance(search, dict):
        return None
    texts = [search[name] for name in FILTERS if isinstance(search.get(name), str)]
    conditions = max((conditions_of(text) for text in texts), default=0)
    if conditions > CONDITIONS:
        return f"the filter has {conditions} conditions; the limit is {CONDITIONS}: narrow it on the client"
    orders = search.get("order_by")
    if isinstance(orders, list) and len(orders) > ORDERS:
        return f"the search has {len(orders)} columns to order by; at most {ORDERS} are allowed"
    return None


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
        is_json = not UNSHARED.search(request.path) or PRESIGNED.search(request.path)
        return bool(request.method not in ("GET", "HEAD") and is_json and request.data)

    @flask_application.after_request  # type: ignore[untyped-decorator]
    def explain(response: Any) -> Any:
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
            search = request.get_json(force=True, silent=True) if with_json() else None
        except RecursionError:
            return answered("the JSON of the request nests too deeply")
        asked = request.args.to_dict() if request.method == "GET" else search
        if sentence := oddity(request.path, request.query_string, asked):
            return answered(sentence)
        if search is None and request.path.endswith("/runs/log-batch") and with_json():
            return answered("the body of the request is not JSON")
        if not request.path.endswith("/search"):
            return None
        if request.method == "GET":
            search = {**request.args.to_dict(), "order_by": request.args.getlist("order_by")}
        sentence = problem(search)
        return answered(sentence) if sentence else None

    def answered(sentence: str) -> Any:
        content = {"error_code": "INVALID_PARAMETER_VALUE", "message": sentence}
        return flask.Response(json.dumps(content), status=400, mimetype="application/json")
