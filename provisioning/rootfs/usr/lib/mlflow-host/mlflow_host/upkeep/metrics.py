"""Measure the machine for the stack's alarms and dashboard, by the metrics' names in `contract.alarms`.

A measurement that cannot be made yet, or has no meaning (a certificate without TLS), is left out.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mlflow_host.contract import alarms
from mlflow_host.machine import config

ACCESS_LOG = Path("/var/log/nginx/access.log")
MEMORY = Path("/proc/meminfo")
HISTORY = Path("/var/lib/mlflow-host-monitor/history.json")
"""The minutes that `mlflow-host-monitor` plots on the page /mlflow-host/, each as a list: its start in minutes since
the epoch, requests, errors, median and 95th percentile of the latency in milliseconds, use of the data volume."""
HEALTH = "/healthz"
"""nginx answers 200 only after a process of MLflow has queried PostgreSQL."""
SECONDS = 15
WINDOW = timedelta(minutes=1)
"""Age of the requests that are counted; equal to the timer's interval."""
LOG_BYTES = 16 << 20
"""End of the access log that is read. A line has about 200 bytes, so this is the last minute at 1,000 requests/s."""
FEW_REQUESTS = 20
"""With fewer requests, the percentage is of this number, so that one error at night sets off no alarm."""
WITH_ALARMS_OF_THEIR_OWN = {"mlflow-host-room.service", "mlflow-host-backups-check.service"}
"""Units whose failure another metric already reports."""


def measured(wanted: set[str], now: datetime | None = None) -> dict[str, float]:
    """The values of the metrics in `wanted` that can be measured now."""
    at = now or datetime.now(UTC)
    measures: dict[str, Callable[[], float | None]] = {
        "ServerAnswers": answers,
        "DiskUsedPercent": lambda: reported("room.json", "used_percent"),
        "BackupProblems": lambda: reported("backups.json", "problems"),
        "MemoryUsedPercent": memory_used,
        "ServerErrorPercent": lambda: error_percent(ACCESS_LOG, at),
        "CertificateDaysLeft": lambda: certificate_days(at),
        "FailedUnits": failed_units,
        alarms.REQUESTS: lambda: last_minute(HISTORY, 1, at, per=60),
        alarms.MEDIAN: lambda: last_minute(HISTORY, 3, at),
        alarms.SLOW: lambda: last_minute(HISTORY, 4, at),
    }
    found = {}
    for name in sorted(wanted & measures.keys()):
        try:
            value = measures[name]()
        except Exception as error:  # one failed measurement does not stop the others
            print(f"mlflow-host: {name} cannot be measured: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        if value is not None:
            found[name] = value
    return found


def answers() -> float:
    """1 if the health check passes through nginx, MLflow and PostgreSQL, else 0."""
    encrypted = config.load().launch.web.tls != "off"
    try:
        if encrypted:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                "127.0.0.1", timeout=SECONDS, context=unverified()
            )
        else:
            connection = http.client.HTTPConnection("127.0.0.1", timeout=SECONDS)
        connection.request("GET", HEALTH)
        return float(connection.getresponse().status == 200)
    except (OSError, http.client.HTTPException):
        return 0.0


def unverified() -> ssl.SSLContext:
    """TLS settings for the machine's own nginx, whose certificate names its public address."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def reported(file: str, key: str) -> float | None:
    """A number in a report of another timer, or the length of a list; None before the first report."""
    try:
        value = json.loads((config.RUN / "web" / file).read_text())[key]
    except (OSError, ValueError, KeyError):
        return None
    return float(len(value) if isinstance(value, list) else value)


def memory_used() -> float:
    """Per cent of the memory that is neither free nor a cache that the kernel can drop."""
    lines = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines())
    total, available = (int(lines[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    return round(100 * (1 - available / total), 1)


def error_percent(log: Path, now: datetime) -> float | None:
    """Per cent of the requests of the last minute with a status of 500 or above; None if the log cannot be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    statuses = []
    for line in reversed(lines):
        try:
            at = datetime.fromisoformat(line.split(" ", 1)[0])
            # '… "GET /path" 200 1234 …': nginx escapes a quotation mark in the path.
            status = int(line.split('" ', 1)[1].split(" ", 1)[0])
        except (ValueError, IndexError):
            continue
        if at < now - WINDOW:
            break
        statuses.append(status)
    return round(100 * sum(status >= 500 for status in statuses) / max(len(statuses), FEW_REQUESTS), 1)


def last_minute(history: Path, column: int, now: datetime, per: int = 1) -> float | None:
    """A column of the last minute on the page, divided by `per`; None if the page has no minute that ended just now."""
    try:
        minute = json.loads(history.read_text())["minutes"][-1]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    return float(minute[column]) / per if now.timestamp() // 60 - minute[0] <= 2 else None


def certificate_days(now: datetime) -> float | None:
    """Days until the certificate that nginx serves ends; None without TLS or while nginx does not answer."""
    from cryptography import x509

    if config.load().launch.web.tls == "off":
        return None
    try:
        with (
            socket.create_connection(("127.0.0.1", 443), timeout=SECONDS) as plain,
            unverified().wrap_socket(plain) as encrypted,
        ):
            served = encrypted.getpeercert(binary_form=True)
    except OSError:
        return None
    if served is None:
        return None
    left = x509.load_der_x509_certificate(served).not_valid_after_utc - now
    return round(left / timedelta(days=1), 1)


def failed_units() -> float:
    """Number of units of systemd in the state `failed`."""
    command = ["systemctl", "list-units", "--state=failed", "--plain", "--no-legend", "--no-pager"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout
    failed = {line.split()[0] for line in shown.splitlines() if line.strip()}
    return float(len(failed - WITH_ALARMS_OF_THEIR_OWN))
