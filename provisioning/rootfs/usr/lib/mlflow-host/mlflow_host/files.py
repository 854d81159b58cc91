"""Artifacts that pass the server as they come, without a copy on its disk or the whole of them in its memory.

MLflow downloads an artifact into its temporary folder before it sends the first byte, and before 3.15 it held an upload
in memory first; since then it passes an upload on as it comes, but through layers for other requests that cost more
than the rest of it. Here these two requests are answered from the store itself, an upload since 3.15 by MLflow's own
handler, behind MLflow's own checks of host, origin and path. Every other request goes on to the application.
"""

from __future__ import annotations

import asyncio
import json
import os
import posixpath
import re
import urllib.parse
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from typing import Any

from mlflow_host.bridge import Application, Receive, Scope, Send

ARTIFACT = re.compile(r"/(ajax-)?api/2\.0/mlflow-artifacts/artifacts/.+")
CHUNK_BYTES = 2**20

OTHER_RULES = ("MLFLOW_ENABLE_WORKSPACES", "MLFLOW_ARTIFACTS_PRESIGNED_ONLY")
"""Settings under which MLflow decides by more than the path; then it answers itself."""


def streamed(application: Application, repository: Any, executor: Executor) -> Application:
    """`application`, with artifacts streamed from and to `repository`, which waits for the store in `executor`."""
    from fastapi import FastAPI
    from mlflow.server.fastapi_security import init_fastapi_security
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse

    from mlflow_host.artifacts import UPLOADS_ARE_STREAMED

    if any(os.environ.get(name, "").lower() in ("true", "1") for name in OTHER_RULES):
        return application

    async def download(request: Request) -> Response:
        loop = asyncio.get_running_loop()
        try:
            path = safe_path(request.path_params["path"])
            stored = await loop.run_in_executor(executor, repository.open, path)
        except Exception as error:
            return JSONResponse(*reason(error))

        async def chunks() -> AsyncIterator[bytes]:
            with stored["Body"] as body:
                while chunk := await loop.run_in_executor(executor, body.read, CHUNK_BYTES):
                    yield chunk

        name = urllib.parse.quote(posixpath.basename(path))
        headers = {
            "Content-Type": media_type(path),
            "Content-Length": str(stored["ContentLength"]),
            # Never shown in a page of this origin, whatever the file says.
            "Content-Disposition": f"attachment; filename*=UTF-8''{name}",
            "X-Content-Type-Options": "nosniff",
        }
        return StreamingResponse(chunks(), headers=headers)

    async def upload(request: Request) -> Response:
        try:
            folder, name = posixpath.split(safe_path(request.path_params["path"]))
            await repository.log_artifact_from_async_stream(request.stream(), name, folder or None)
        except Exception as error:
            return JSONResponse(*reason(error))
        return JSONResponse({})

    ours = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    init_fastapi_security(ours)
    methods = {"GET": download} if UPLOADS_ARE_STREAMED else {"GET": download, "PUT": upload}
    for prefix in ("/api", "/ajax-api"):
        for method, handler in methods.items():
            ours.add_route(prefix + "/2.0/mlflow-artifacts/artifacts/{path:path}", handler, methods=[method])
    if UPLOADS_ARE_STREAMED:
        from mlflow.server.artifact_router import artifact_router

        ours.include_router(artifact_router)

    async def answered(scope: Scope, receive: Receive, send: Send) -> None:
        mine = scope["type"] == "http" and scope["method"] in ("GET", "PUT") and ARTIFACT.fullmatch(scope["path"])
        await (ours if mine else application)(scope, receive, send)

    return answered


def media_type(path: str) -> str:
    """What MLflow says a file of this name is: nothing that a browser would run."""
    from mlflow.utils import mime_type_utils

    untyped: Any = mime_type_utils
    return str(untyped._guess_mime_type(path))


def safe_path(path: str) -> str:
    """`path` as MLflow accepts it. Raises MlflowException for one that leaves the destination or names no file."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils import uri

    untyped: Any = uri
    checked: str = untyped.validate_path_is_safe(path)
    if not posixpath.basename(checked):
        raise MlflowException.invalid_parameter_value(f"'{checked}' names no file: it must not end with '/'")
    return checked


def reason(error: Exception) -> tuple[dict[str, Any], int]:
    """MLflow's JSON for an error, and the status. Raises it again when neither MLflow nor S3 foresaw it."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

    from mlflow_host.artifacts import is_missing_object

    if is_missing_object(error):
        error = MlflowException("No such artifact", error_code=RESOURCE_DOES_NOT_EXIST)
    if not isinstance(error, MlflowException):
        raise error
    known: Any = error
    return json.loads(known.serialize_as_json()), known.get_http_status_code()
