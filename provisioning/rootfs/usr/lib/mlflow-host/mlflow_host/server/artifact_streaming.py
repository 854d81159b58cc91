"""ASGI middleware that streams artifacts between the client and S3, without storing a whole file on disk or in memory.

MLflow downloads an artifact to a temporary folder before it sends the first byte. MLflow before 3.15 holds a whole
upload in memory. MLflow 3.15 and later stream uploads, but spend most of the time of an upload in other middleware.
This middleware handles downloads and uploads directly, after MLflow's checks of host, origin and path. For uploads, the
middleware calls MLflow's own handler if MLflow is 3.15 or newer. All other requests are passed to the application.
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
"""If one of these settings is on, a request's path alone is not enough, so all requests are passed to MLflow."""


def streamed(application: Application, repository: Any, threads: RequestThreads) -> Application:
    """Return `application` with middleware that streams artifacts from and to `repository`. Blocking calls to the
    repository run in `threads`."""
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
            # A browser must not display an uploaded file as a page of this server.
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
    """Return MLflow's media type for a file with this name. A browser executes no type that MLflow returns."""
    from mlflow.utils import mime_type_utils

    untyped: Any = mime_type_utils
    return str(untyped._guess_mime_type(path))


def safe_path(path: str) -> str:
    """Return `path` if MLflow accepts it. Raises MlflowException if `path` is outside the artifacts destination or has
    no file name."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils import uri

    untyped: Any = uri
    checked: str = untyped.validate_path_is_safe(path)
    if not posixpath.basename(checked):
        raise MlflowException.invalid_parameter_value(f"'{checked}' is not a file's path: it must not end with '/'")
    return checked


def reason(error: Exception) -> tuple[dict[str, Any], int]:
    """Return the JSON and the status of an MlflowException. Any other exception is raised again."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException):
        raise error
    known: Any = error
    return json.loads(known.serialize_as_json()), known.get_http_status_code()
