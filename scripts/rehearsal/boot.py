"""Waiting for a machine to become a server, and telling where the time went."""

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

from rehearsal.errors import BootFailed

# Answers only through MLflow and PostgreSQL; /health is 200 with the database down.
QUESTION = "/api/2.0/mlflow/experiments/get?experiment_id=0"
POLL_SECONDS = 0.1
GRACE_SECONDS = 20
"""How long a refused password is put down to the machine that is being replaced."""


@dataclass(frozen=True)
class Answer:
    """What the server said: HTTP status, 0 when nothing answered, and the JSON document that came with it."""

    status: int
    document: dict[str, Any]


def ask(url: str, username: str, password: str, certificate: str | None = None, timeout: float = 10) -> Answer:
    """Puts one question that needs MLflow and its database to the server.

    Over HTTPS it is verified by `certificate` (PEM; empty for the authorities this machine trusts). While there is
    none the question goes without the password, for what the server says of its boot, and is believed unverified.
    """
    context = ssl.create_default_context(cadata=certificate)
    if url.startswith("https:") and certificate is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return _get(url, {}, context, timeout)
    credentials = base64.b64encode(f"{username}:{password}".encode()).decode()
    return _get(url, {"Authorization": f"Basic {credentials}"}, context, timeout)


def unresolved(url: str) -> str:
    """The host name in `url` when this machine knows no address of it, else empty."""
    name = urllib.parse.urlsplit(url).hostname or ""
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return name
    return ""


def ask_port_80(url: str, timeout: float = 10) -> Answer:
    """What the machine says of its boot where it says it first: before there is a certificate it serves no HTTPS."""
    return _get(url.replace("https:", "http:", 1), {}, ssl.create_default_context(), timeout)


def _get(url: str, headers: dict[str, str], context: ssl.SSLContext, timeout: float) -> Answer:
    request = urllib.request.Request(url + QUESTION, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(request, timeout=timeout) as response:
            return Answer(response.status, _json(response.read()))
    except urllib.error.HTTPError as error:
        return Answer(error.code, _json(error.read()))
    except (OSError, http.client.HTTPException):
        return Answer(0, {})


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
    """Asks until the first authenticated 200 and answers with its time (seconds since 1970).

    Says each step as the machine reports it. `alive` gives the instance's state, `certificate` what HTTPS is verified
    by, None until the machine has published it. Raises BootFailed when a step failed,
    the machine went away, the password is refused for good, or `seconds` have passed.
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
                # On a new data volume the machine makes another authority than the one published before.
                trusted = certificate()
            if answer.status == 0 and not told and (name := unresolved(url)):
                told = (
                    f"{name} cannot be resolved here: write it into /etc/hosts, beside the address that "
                    "`rehearse.py status --json` gives as public_ip"
                )
                say(told)
            if (state := alive()) not in ("pending", "running"):
                raise BootFailed(f"the machine is {state} instead of running; `rehearse.py logs` shows its console")
        if now - began > seconds:
            last = told or (f"HTTP status {answer.status}" if answer.status else "nothing answers")
            raise BootFailed(
                f"{url} gave no answer within {seconds:.0f} s; last heard: {last}; "
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
    """The machine's step status documents as times, in the order they began."""
    found = []
    for each in statuses:
        began = datetime.fromisoformat(each["started"]).timestamp()
        found.append(StepTime(each["step"], round(began - run_instances, 2), round(float(each.get("seconds") or 0), 2)))
    return sorted(found, key=lambda each: each.after)
