"""ASGI middleware that streams artifacts through the server, without a copy on its disk or in its memory.

MLflow downloads an artifact into its temporary folder before it sends the first byte. Before 3.15 it also held an
upload in memory; since then it streams uploads, but through layers of middleware that take most of the time. This
middleware handles these two requests with the artifact store directly (since 3.15 an upload with MLflow's own handler),
after MLflow's checks of host, origin and path. Every other request is passed to the application.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import AsyncIterator
from typing import Any

from mlflow_host.server.flask_shortcut import Application, Message, Receive, Scope, Send
from mlflow_host.server.request_ids import ANSWER
from mlflow_host.server.request_threads import RequestThreads

ARTIFACT = re.compile(r"/(ajax-)?api/2\.0/mlflow-artifacts/artifacts/.+")
METHODS = ("GET", "HEAD", "PUT")
CHUNK_BYTES = 2**20

OTHER_RULES = ("MLFLOW_ENABLE_WORKSPACES", "MLFLOW_ARTIFACTS_PRESIGNED_ONLY")
"""With these settings MLflow uses more than the path; then requests are passed to MLflow."""


def streamed(application: Application, repository: Any, threads: RequestThreads) -> Application:
    """`application`, with artifacts streamed from and to `repository`. Calls that wait for the store run in
    `threads`."""
    from fastapi import FastAPI
    from mlflow.server.fastapi_security import init_fastapi_security
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse

    from mlflow_host.server.artifact_repository import UPLOADS_ARE_STREAMED, content_disposition

    if any(os.environ.get(name, "").lower() in ("true", "1") for name in OTHER_RULES):
        return application

    async def download(request: Request) -> Response:
        try:
            path = safe_path(request.path_params["path"])
            if request.method == "HEAD":
                size = await threads.call(repository.size, path)
            else:
                stored = await threads.call(repository.open, path)
                size = stored["ContentLength"]
        except Exception as error:
            return JSONResponse(*reason(error))

        async def chunks() -> AsyncIterator[bytes]:
            with stored["Body"] as body:
                while chunk := await threads.call(body.read, CHUNK_BYTES):
                    yield chunk

        headers = {
            "Content-Type": media_type(path),
            "Content-Length": str(size),
            # A browser must not render an uploaded file in this origin.
            "Content-Disposition": content_disposition(posixpath.basename(path)),
            "X-Content-Type-Options": "nosniff",
        }
        return Response(headers=headers) if request.method == "HEAD" else StreamingResponse(chunks(), headers=headers)

    async def upload(request: Request) -> Response:
        try:
            folder, name = posixpath.split(safe_path(request.path_params["path"]))
            await repository.log_artifact_from_async_stream(request.stream(), name, folder or None)
        except Exception as error:
            return JSONResponse(*reason(error))
        return JSONResponse({})

    ours = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    init_fastapi_security(ours)
    handlers = {"GET": download} if UPLOADS_ARE_STREAMED else {"GET": download, "PUT": upload}
    for prefix in ("/api", "/ajax-api"):
        for method, handler in handlers.items():  # Starlette adds HEAD to GET
            ours.add_route(prefix + "/2.0/mlflow-artifacts/artifacts/{path:path}", handler, methods=[method])
    if UPLOADS_ARE_STREAMED:
        from mlflow.server.artifact_router import artifact_router

        ours.include_router(artifact_router)

    async def answered(scope: Scope, receive: Receive, send: Send) -> None:
        mine = scope["type"] == "http" and scope["method"] in METHODS and ARTIFACT.fullmatch(scope["path"])
        if not mine:
            await application(scope, receive, send)
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], ANSWER]}
            await send(message)

        await ours(scope, receive, marked)

    return answered


def media_type(path: str) -> str:
    """MLflow's media type for a file of this name: none that a browser would execute."""
    from mlflow.utils import mime_type_utils

    untyped: Any = mime_type_utils
    return str(untyped._guess_mime_type(path))


def safe_path(path: str) -> str:
    """`path`, if MLflow accepts it. Raises MlflowException for one outside the destination or without a file name."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils import uri

    untyped: Any = uri
    checked: str = untyped.validate_path_is_safe(path)
    if not posixpath.basename(checked):
        raise MlflowException.invalid_parameter_value(f"'{checked}' names no file: it must not end with '/'")
    return checked


def reason(error: Exception) -> tuple[dict[str, Any], int]:
    """MLflow's JSON and status for an error. Re-raises errors that are not MLflow's."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException):
        raise error
    known: Any = error
    return json.loads(known.serialize_as_json()), known.get_http_status_code()
