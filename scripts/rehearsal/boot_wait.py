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

# This route returns 200 only if MLflow and PostgreSQL are running. /health returns 200 even if the database is down.
QUESTION = "/api/2.0/mlflow/experiments/get?experiment_id=0"
POLL_SECONDS = 0.1
GRACE_SECONDS = 20
"""Seconds for which a refused password is not an error, because the old machine may respond until it is replaced."""


@dataclass(frozen=True)
class ServerReply:
    """A response of the server: its HTTP status and its JSON document. The status is 0 if no response arrived."""

    status: int
    document: dict[str, Any]


def ask(
    url: str, username: str, password: str, certificate: str | None = None, timeout: float = 10, path: str = QUESTION
) -> ServerReply:
    """Send GET `path` to the server. The server needs MLflow and its database to answer the default path.

    With HTTPS, the certificate authority `certificate` (PEM) verifies the server. If `certificate` is an empty text,
    the authorities that this computer trusts verify the server. If `certificate` is None, the server is not verified,
    and the request is sent without the password.
    """
    context = ssl.create_default_context(cadata=certificate)
    if url.startswith("https:") and certificate is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return _get(url + path, {}, context, timeout)
    credentials = base64.b64encode(f"{username}:{password}".encode()).decode()
    return _get(url + path, {"Authorization": f"Basic {credentials}"}, context, timeout)


def unresolved(url: str) -> str:
    """Return the host name in `url` if this machine cannot resolve the name, otherwise an empty text."""
    name = urllib.parse.urlsplit(url).hostname or ""
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return name
    return ""


def ask_port_80(url: str, timeout: float = 10) -> ServerReply:
    """Return the boot status from port 80. A machine without a certificate cannot serve HTTPS."""
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
    """Wait for the first response 200 to a request with the password. Returns the response's Unix time.

    Logs each step that the machine reports. `alive` returns the instance's state. `certificate` returns the server's
    certificate, or None if the machine has not published it. Raises BootFailed if a boot step failed, the machine
    ended, the server refuses the password for more than 20 s, or `seconds` have passed.
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
            raise BootFailed(f"{url} refuses the password that the credentials parameter contains for {username}")
        message = str(answer.document.get("message", ""))
        if answer.status == 503 and message and message != told:
            told = message
            say(message)
        if now - looked > 2:
            looked = now
            if unverified:
                # If the data volume is new, the machine creates a new certificate authority.
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
    """Start and duration of a boot step. `after` is the time in seconds from RunInstances to the step's start."""

    step: str
    after: float
    seconds: float


def step_times(statuses: list[dict[str, Any]], run_instances: float) -> list[StepTime]:
    """Return start and duration of each boot step from the machine's status documents, ordered by start."""
    found = []
    for each in statuses:
        began = datetime.fromisoformat(each["started"]).timestamp()
        found.append(StepTime(each["step"], round(began - run_instances, 2), round(float(each.get("seconds") or 0), 2)))
    return sorted(found, key=lambda each: each.after)
