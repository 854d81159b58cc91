"""Tell MLflow's pages, but not its clients, that files pass through the server.

Pages of MLflow 3.18 and newer fetch an artifact from S3 by a presigned URL if server-info offers direct downloads. The
stack's buckets have no CORS rules, so a browser blocks each such response, and the page asks the server after that.
Pages ask for /ajax-api/…/server-info, clients for /api/…/server-info.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import json
from typing import Any

OFFERS = ("multipart_uploads_enabled", "multipart_downloads_enabled")


def offer_none_to_pages(flask: Any) -> None:
    """Install the hook in MLflow's Flask application."""
    flask.after_request(without_offers)


def without_offers(response: Any) -> Any:
    """Flask's after_request hook: the response, for a page's server-info without direct transfers."""
    from flask import request

    if not (request.path.startswith("/ajax-api/") and request.path.endswith("/server-info")):
        return response
    info = response.get_json(silent=True)
    if isinstance(info, dict) and any(info.get(name) for name in OFFERS):
        response.set_data(json.dumps(info | {name: False for name in OFFERS if name in info}))
    return response
