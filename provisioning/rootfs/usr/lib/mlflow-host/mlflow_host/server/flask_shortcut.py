"""ASGI middleware that calls MLflow's Flask application directly, without the FastAPI stack.

MLflow's ASGI application mounts its Flask application (`mlflow.server:app`) as the last route. Before Flask handles a
request in a thread, the request passes through seven layers of middleware, about two hundred routes, and an adapter
with two tasks and a memory stream. If a request matches no native ASGI route, this middleware calls Flask in a thread
directly. MLflow's Flask application also checks hosts and origins and sets security headers, because gunicorn and
waitress can serve it without the ASGI application.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mlflow_host.server.request_threads import RequestThreads

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]]
WsgiApplication = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

WHOLE_BYTES = 2**20
"""A response whose Content-Length is at most this number of bytes is sent in one ASGI message."""


@dataclass
class FlaskResponse:
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    rest: Iterator[bytes] | None
    """The chunks after `body`, if the response is long or has no Content-Length. None if `body` is complete."""
    close: Callable[[], None]


def short_cut(
    application: Any, flask: WsgiApplication, *, requests: RequestThreads, files: RequestThreads
) -> Application:
    """Return the Starlette application with this middleware. `flask` runs in the threads of `requests`. Requests that
    may wait for S3 run in the threads of `files`."""
    from starlette.routing import Match, Mount

    native = [route for route in application.routes if not isinstance(route, Mount)]

    @lru_cache(maxsize=4096)
    def is_native(method: str, path: str) -> bool:
        scope = {"type": "http", "method": method, "path": path, "root_path": "", "headers": []}
        return any(route.matches(scope)[0] != Match.NONE for route in native)

    async def shortened(scope: Scope, receive: Receive, send: Send) -> None:
        # Preflight requests are rare, and FastAPI's response to them has more headers than Flask's response.
        detour = scope["type"] != "http" or scope["method"] == "OPTIONS" or names_workspace(scope)
        if detour or is_native(scope["method"], scope["path"]):
            await application(scope, receive, send)
        else:
            threads = files if "artifact" in scope["path"] else requests
            await through_flask(flask, threads, scope, receive, send)

    return shortened


def names_workspace(scope: Scope) -> bool:
    """Return true if a request has the workspace header. MLflow's FastAPI middleware rejects this header on a server
    without workspaces."""
    return any(name == b"x-mlflow-workspace" for name, _ in scope["headers"])


async def through_flask(
    flask: WsgiApplication, threads: RequestThreads, scope: Scope, receive: Receive, send: Send
) -> None:
    body = await whole(receive)
    if body is None:
        return
    answer = await threads.call(call, flask, environ(scope, body))
    try:
        await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
        await send({"type": "http.response.body", "body": answer.body, "more_body": answer.rest is not None})
        if answer.rest is not None:
            while chunk := await threads.call(next, answer.rest, b""):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
    finally:
        if answer.rest is not None:
            await threads.call(answer.close)


async def whole(receive: Receive) -> bytes | None:
    """Return the request's complete body, or None if the client has disconnected."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def call(flask: WsgiApplication, variables: dict[str, Any]) -> FlaskResponse:
    """Call the WSGI application and return its response. The body of a short response is read completely."""
    started: list[tuple[int, list[tuple[bytes, bytes]]]] = []

    def start_response(status: str, headers: list[tuple[str, str]], error: Any = None) -> None:
        encoded = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        started[:] = [(int(status.split(" ", 1)[0]), encoded)]

    chunks = flask(variables, start_response)
    close: Callable[[], None] = getattr(chunks, "close", lambda: None)
    try:
        rest = iter(chunks)
        first = next(rest, b"")  # some WSGI applications call start_response only when this chunk is read
        status, headers = started[0]
        length = next((int(value) for name, value in headers if name == b"content-length"), None)
        if length is not None and length <= WHOLE_BYTES:
            body = b"".join([first, *rest])
            close()
            return FlaskResponse(status, headers, body, None, close)
        return FlaskResponse(status, headers, first, (chunk for chunk in rest if chunk), close)
    except BaseException:
        close()
        raise


def environ(scope: Scope, body: bytes) -> dict[str, Any]:
    """Convert an ASGI scope of type "http" to WSGI's environ dictionary (PEP 3333)."""
    server = scope.get("server") or ("localhost", None)
    variables: dict[str, Any] = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": scope.get("root_path", "").encode().decode("latin-1"),
        "PATH_INFO": scope["path"].encode().decode("latin-1"),
        "QUERY_STRING": scope["query_string"].decode("latin-1"),
        "SERVER_PROTOCOL": f"HTTP/{scope['http_version']}",
        "SERVER_NAME": server[0],
        "SERVER_PORT": str(server[1] or 80),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scope.get("scheme", "http"),
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }
    if scope.get("client"):
        variables["REMOTE_ADDR"] = scope["client"][0]
    for raw, value in scope["headers"]:
        name = raw.decode("latin-1").upper().replace("-", "_")
        if name not in ("CONTENT_LENGTH", "CONTENT_TYPE"):
            name = f"HTTP_{name}"
        text = value.decode("latin-1")
        variables[name] = f"{variables[name]},{text}" if name in variables else text
    variables["CONTENT_LENGTH"] = str(len(body))
    return variables
