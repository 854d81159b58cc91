"""A tracking server of one release, run with the interpreter of that release: its own application, without gunicorn.

    python old_server.py URI PLACE PORT LOGIN

PLACE is the folder of the artifacts, which the server itself serves, or the URI of one that the clients write to.
LOGIN, if not empty, is the only value of the header Authorization that is accepted."""

from __future__ import annotations

import os
import sys
from typing import Any

URI, PLACE, PORT, LOGIN = sys.argv[1:]
SERVED = "://" not in PLACE
os.environ.update(
    _MLFLOW_SERVER_FILE_STORE=URI,
    _MLFLOW_SERVER_REGISTRY_STORE=URI,
    _MLFLOW_SERVER_ARTIFACT_ROOT="mlflow-artifacts:/" if SERVED else PLACE,
    _MLFLOW_SERVER_SERVE_ARTIFACTS=str(SERVED).lower(),
    _MLFLOW_SERVER_ARTIFACT_DESTINATION=PLACE,
    MLFLOW_DISABLE_TELEMETRY="true",
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
)


def flask() -> None:
    """Releases before 3.5, which have no routes outside Flask."""
    from mlflow.server import app

    def guarded(environ: dict[str, Any], respond: Any) -> Any:
        if LOGIN and environ.get("HTTP_AUTHORIZATION") != LOGIN:
            respond("401 Unauthorized", [])
            return [b"a login is needed"]
        return application(environ, respond)

    application = app.wsgi_app
    app.wsgi_app = guarded  # type: ignore[method-assign, assignment]
    app.run(port=int(PORT), threaded=True)


def fastapi(app: Any) -> None:
    import uvicorn

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers", ()))
        if LOGIN and scope["type"] == "http" and headers.get(b"authorization", b"").decode() != LOGIN:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"a login is needed"})
        else:
            await app(scope, receive, send)

    uvicorn.run(guarded, port=int(PORT), log_level="warning")


try:
    from mlflow.server.fastapi_app import app as found
except ImportError:
    flask()
else:
    fastapi(found)
