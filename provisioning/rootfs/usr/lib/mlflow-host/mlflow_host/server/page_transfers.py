"""ASGI middleware that removes the offer of direct transfers from the server-info that MLflow's pages get. Its clients
get it unchanged.

Pages of MLflow 3.18 and newer fetch an artifact from S3 by a presigned URL if server-info offers direct downloads. The
stack's buckets have no CORS rules, so a browser blocks each such response, and the page then requests the file from the
server. Pages request /ajax-api/…/server-info, clients /api/…/server-info.
"""

from __future__ import annotations

import json

from mlflow_host.server.flask_shortcut import Application, Message, Receive, Scope, Send

OFFERS = ("multipart_uploads_enabled", "multipart_downloads_enabled")


def without_offers(application: Application) -> Application:
    """`application`, whose server-info for pages offers no direct transfers."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if not (path.startswith("/ajax-api/") and path.endswith("/server-info")):
            await application(scope, receive, send)
            return
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        await application(scope, receive, keep)
        for message in edited(messages):
            await send(message)

    return wrapped


def edited(messages: list[Message]) -> list[Message]:
    """The messages of a response. A response whose JSON offers direct transfers becomes two messages with the same
    status and headers and the edited JSON."""
    body = b"".join(each.get("body", b"") for each in messages)
    try:
        info = json.loads(body)
    except ValueError:  # an empty or compressed response
        return messages
    if not (isinstance(info, dict) and any(info.get(name) for name in OFFERS)):
        return messages
    body = json.dumps(info | {name: False for name in OFFERS if name in info}, separators=(",", ":")).encode()
    start = next(each for each in messages if each["type"] == "http.response.start")
    kept = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
    headers = [*kept, (b"content-length", str(len(body)).encode())]
    return [{**start, "headers": headers}, {"type": "http.response.body", "body": body}]
