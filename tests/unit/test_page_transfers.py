"""The server offers direct transfers to clients, but not to web pages, because browsers block direct transfers."""

from __future__ import annotations

import json
from typing import Any

import fastapi
import flask
import pytest
from starlette.middleware.wsgi import WSGIMiddleware
from starlette.testclient import TestClient

from mlflow_host.server import page_transfers

INFO = {"store_type": "SqlStore", "multipart_uploads_enabled": True, "multipart_downloads_enabled": True}
SEEN_BY_PAGES = INFO | {"multipart_uploads_enabled": False, "multipart_downloads_enabled": False}


def by_flask(routes: dict[str, Any]) -> Any:
    """Return an application that responds like MLflow up to 3.17."""
    app = flask.Flask("mlflow")
    for path, answer in routes.items():
        app.add_url_rule(
            path, path.replace(".", "-"), lambda answer=answer: flask.Response(answer, mimetype="application/json")
        )
    return WSGIMiddleware(app)


def by_fastapi(routes: dict[str, Any]) -> Any:
    """Return an application that responds like MLflow since 3.18."""
    app = fastapi.FastAPI()
    for path, answer in routes.items():
        app.get(path)(lambda answer=answer: fastapi.Response(answer, media_type="application/json"))
    return app


@pytest.fixture(params=[by_flask, by_fastapi])
def asked(request: pytest.FixtureRequest) -> TestClient:
    whole = json.dumps(INFO)
    routes = {
        "/api/3.0/mlflow/server-info": whole,
        "/ajax-api/3.0/mlflow/server-info": whole,
        "/ajax-api/2.0/mlflow/runs/get": whole,
        "/ajax-api/1.0/server-info": "{",
        "/ajax-api/0.9/server-info": '{"store_type": "FileStore"}',
    }
    return TestClient(page_transfers.without_offers(request.param(routes)))


def test_pages_are_offered_no_direct_transfers(asked: TestClient) -> None:
    response = asked.get("/ajax-api/3.0/mlflow/server-info")
    assert response.json() == SEEN_BY_PAGES
    assert response.headers["content-type"] == "application/json"
    assert int(response.headers["content-length"]) == len(response.content)


@pytest.mark.parametrize("path", ["/api/3.0/mlflow/server-info", "/ajax-api/2.0/mlflow/runs/get"])
def test_clients_and_other_routes_are_answered_as_by_mlflow(asked: TestClient, path: str) -> None:
    assert asked.get(path).json() == INFO


@pytest.mark.parametrize(
    ("path", "text"),
    [("/ajax-api/1.0/server-info", "{"), ("/ajax-api/0.9/server-info", '{"store_type": "FileStore"}')],
)
def test_a_response_without_offers_is_left_alone(asked: TestClient, path: str, text: str) -> None:
    assert asked.get(path).text == text
    assert asked.get("/ajax-api/4.0/server-info").status_code == 404
