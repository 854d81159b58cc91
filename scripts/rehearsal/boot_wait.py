"""Wait until a launched machine serves MLflow, and report the time of each boot step."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from scripts.rehearsal.errors import BootFailed

# This route needs MLflow and PostgreSQL; /health returns 200 even with the database down.
QUESTION = "/api/2.0/mlflow/experiments/get?experiment_id=0"
POLL_SECONDS = 0.1
GRACE_SECONDS = 20
"""Seconds during which the machine that is being replaced may still refuse the password."""


@dataclass(frozen=True)
class ServerReply:
    """A response of the server: HTTP status, 0 without a response, and the JSON document in it."""

    status: int
    document: dict[str, Any]


def ask(
    url: str, username: str, password: str, certificate: str | None = None, timeout: float = 10, path: str = QUESTION
) -> ServerReply:
    """GET `path` from the server; the default path needs MLflow and its database.

    Over HTTPS the server is verified by `certificate` (PEM; empty for the authorities that this machine trusts). While
    there is none, the request is sent without the password and the response is not verified.
    """
    context = ssl.create_default_context(cadata=certificate)
    if url.startswith("https:") and certificate is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return _get(url + path, {}, context, timeout)
    credentials = base64.b64encode(f"{username}:{password}".encode()).decode()
    return _get(url + path, {"Authorization": f"Basic {credentials}"}, context, timeout)


def unresolved(url: str) -> str:
    """The host name in `url` if this machine cannot resolve it, else empty."""
    name = urllib.parse.urlsplit(url).hostname or ""
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return name
    return ""


def ask_port_80(url: str, timeout: float = 10) -> ServerReply:
    """The boot status on port 80: the machine serves no HTTPS before it has a certificate."""
    return _get(url.replace("https:", "http:", 1) + QUESTION, {}, ssl.create_default_context(), timeout)


def _get(url: str, headers: dict[str, str], context: ssl.SSLContext, timeout: float) -> ServerReply:
    request = urllib.request.Request(url, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(request, timeout=timeout) as response:
            return ServerReply(response.status, _json(response.read()))
    except urllib.error.HTTPError as error:
        return ServerReply(error.code, _json(error.read()))
    except (OSError, http.client.HTTPException):
        return ServerReply(0, {})


def _json(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def wait(
    url: str,
    username: str,
    password: str,
    *,
    seconds: float,
    say: Callable[[str], None],
    alive: Callable[[], str],
    certificate: Callable[[], str | None] = lambda: "",
) -> float:
    """Wait for the first authenticated 200 and return its time (seconds since 1970).

    Logs each step that the machine reports. `alive` returns the instance's state. `certificate` returns the
    server's certificate, or None until the machine has published it. Raises BootFailed if a step failed, the machine
    ended, the password stays refused, or `seconds` have passed.
    """
    began = time.monotonic()
    looked = began
    told = ""
    trusted: str | None = None
    while True:
        if trusted is None and url.startswith("https:"):
            trusted = certificate()
        answer = ask(url, username, password, trusted)
        if answer.status == 200:
            return time.time()
        unverified = answer.status == 0 and url.startswith("https:")
        if unverified:
            answer = ask_port_80(url)
        now = time.monotonic()
        if answer.document.get("state") == "failed":
            raise BootFailed(str(answer.document.get("message")))
        refused = answer.status == 401 and (trusted is not None or not url.startswith("https:"))
        if refused and now - began > GRACE_SECONDS:
            raise BootFailed(f"{url} refuses the password of {username} that is in the credentials parameter")
        message = str(answer.document.get("message", ""))
        if answer.status == 503 and message and message != told:
            told = message
            say(message)
        if now - looked > 2:
            looked = now
            if unverified:
                # With a new data volume the machine creates a new authority.
                trusted = certificate()
            if answer.status == 0 and not told and (name := unresolved(url)):
                told = (
                    f"{name} cannot be resolved here: add it to /etc/hosts with the address that `rehearse.py status "
                    f"--json` prints as public_ip"
                )
                say(told)
            if (state := alive()) not in ("pending", "running"):
                raise BootFailed(f"the machine is {state} instead of running; `rehearse.py logs` shows its console")
        if now - began > seconds:
            last = told or (f"HTTP status {answer.status}" if answer.status else "nothing answers")
            raise BootFailed(
                f"{url} did not respond within {seconds:.0f} s; last response: {last}; "
                "`rehearse.py logs` shows the machine's journal and console"
            )
        time.sleep(POLL_SECONDS)


@dataclass(frozen=True)
class StepTime:
    """When a boot step began and how long it took, in seconds; `after` counts from RunInstances."""

    step: str
    after: float
    seconds: float


def step_times(statuses: list[dict[str, Any]], run_instances: float) -> list[StepTime]:
    """The times in the machine's step status documents, in the order of the steps."""
    found = []
    for each in statuses:
        began = datetime.fromisoformat(each["started"]).timestamp()
        found.append(StepTime(each["step"], round(began - run_instances, 2), round(float(each.get("seconds") or 0), 2)))
    return sorted(found, key=lambda each: each.after)
