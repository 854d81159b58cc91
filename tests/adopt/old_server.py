"""Run the tracking server of one MLflow release: MLflow's own application, without gunicorn. The script runs in a
Python environment of this MLflow release.

    python old_server.py URI PLACE PORT LOGIN

PLACE is a folder of artifacts, which the server serves, or a URI to which the clients write artifacts directly. If
LOGIN is not empty, the server accepts only requests whose header Authorization has the value LOGIN."""

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
    """Run the server of an MLflow release before 3.5. Before 3.5, MLflow has no routes outside Flask."""
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
