"""What clients ask, read as MLflow reads it, where it is as they write it; all else raises Unusual."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qsl

from mlflow_host import received
from mlflow_host.bridge import Scope
from mlflow_host.direct_store import Unusual, whole_number


def in_query(scope: Scope, kind: Any) -> Any:
    """The message of `kind` that a query says. Raises Unusual."""
    try:
        pairs = parse_qsl(scope["query_string"].decode(), keep_blank_values=True, strict_parsing=True, errors="strict")
    except ValueError:
        raise Unusual from None
    fields: dict[str, Any] = dict(pairs)
    if len(fields) != len(pairs):
        raise Unusual
    if "max_results" in fields:
        fields["max_results"] = whole_number(fields["max_results"])
    return plain(fields, kind)


def in_body(scope: Scope, body: bytes, kind: Any) -> Any:
    """The message of `kind` that a body of JSON says. Raises Unusual."""
    if not any(name == b"content-type" and value.startswith(b"application/json") for name, value in scope["headers"]):
        raise Unusual
    try:
        return plain(json.loads(body), kind)
    except ValueError:
        raise Unusual from None


def plain(fields: Any, kind: Any) -> Any:
    """The message of `kind` with these fields. Raises Unusual where MLflow may read them otherwise, or refuse them."""
    try:
        return received.plain(fields, kind)
    except received.NOT_PLAIN:
        raise Unusual from None
