"""Parse the requests of the fast path. For a request in an unusual form, the functions raise an exception, and MLflow
handles the request."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qsl

from mlflow_host.server import json_decode
from mlflow_host.server.fast_path.store import Unusual, whole_number
from mlflow_host.server.flask_shortcut import Scope
from mlflow_host.server.request_ids import PARSED


def in_query(scope: Scope, kind: Any) -> Any:
    """Parse the query string as a protobuf message of the class `kind`."""
    pairs = parse_qsl(scope["query_string"].decode(), keep_blank_values=True, strict_parsing=True, errors="strict")
    fields: dict[str, Any] = dict(pairs)
    if len(fields) != len(pairs):
        raise Unusual
    if "max_results" in fields:
        fields["max_results"] = whole_number(fields["max_results"])
    return json_decode.plain(fields, kind)


def in_body(scope: Scope, body: bytes, kind: Any) -> Any:
    """Parse the JSON body as a protobuf message of the class `kind`."""
    (content_type,) = (value for name, value in scope["headers"] if name == b"content-type")
    if content_type.split(b";")[0] != b"application/json":
        raise Unusual
    fields = json.loads(body)
    if isinstance(fields, dict):
        scope.get(PARSED, []).append(fields)
    return json_decode.plain(fields, kind)
