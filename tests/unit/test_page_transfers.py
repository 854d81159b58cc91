"""Pages are not offered direct transfers, which their browser would block; clients are."""

from __future__ import annotations

from typing import Any

import flask
import pytest

from mlflow_host.server import page_transfers

INFO = {"store_type": "SqlStore", "multipart_uploads_enabled": True, "multipart_downloads_enabled": True}


@pytest.fixture
def pages() -> Any:
    app = flask.Flask("mlflow")
    for prefix in ("api", "ajax-api"):
        app.add_url_rule(f"/{prefix}/3.0/mlflow/server-info", prefix, lambda: flask.jsonify(INFO))
    app.add_url_rule("/ajax-api/2.0/mlflow/runs/get", "run", lambda: flask.jsonify(INFO))
    app.add_url_rule("/ajax-api/1.0/server-info", "broken", lambda: flask.Response("{", mimetype="application/json"))
    page_transfers.offer_none_to_pages(app)
    return app.test_client()


def test_pages_are_offered_no_direct_transfers(pages: Any) -> None:
    response = pages.get("/ajax-api/3.0/mlflow/server-info")
    assert response.get_json() == INFO | dict.fromkeys(page_transfers.OFFERS, False)
    assert response.mimetype == "application/json" and response.content_length == len(response.data)


@pytest.mark.parametrize("path", ["/api/3.0/mlflow/server-info", "/ajax-api/2.0/mlflow/runs/get"])
def test_clients_and_other_routes_are_answered_as_by_mlflow(pages: Any, path: str) -> None:
    assert pages.get(path).get_json() == INFO


def test_an_answer_that_is_no_json_is_left_alone(pages: Any) -> None:
    assert pages.get("/ajax-api/1.0/server-info").data == b"{"
