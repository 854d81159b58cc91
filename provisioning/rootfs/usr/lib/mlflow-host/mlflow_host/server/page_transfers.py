"""ASGI middleware that removes the offer of direct transfers from the server-info response to MLflow's web pages.

If server-info offers direct downloads, the pages of MLflow 3.18 and newer request artifacts from S3 with presigned
URLs. The stack's buckets have no CORS rules, so the browser blocks S3's response. After this failure, the page requests
the file from the server. Pages use /ajax-api/…/server-info. Clients use /api/…/server-info, which this middleware does
not change.
"""

from __future__ import annotations

import json

from mlflow_host.server.flask_shortcut import Application, Message, Receive, Scope, Send

OFFERS = ("multipart_uploads_enabled", "multipart_downloads_enabled")


def without_offers(application: Application) -> Application:
    """Return `application` with middleware that removes the offer of direct transfers from the pages' server-info."""

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
    """Return the ASGI messages of a response, without the offer of direct transfers in its JSON. If there is no offer,
    the messages are returned unchanged."""
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
