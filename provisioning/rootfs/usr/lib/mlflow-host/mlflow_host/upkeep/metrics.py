"""Measure the metrics for the stack's alarms and dashboard. `contract.alarms` lists the metrics' names.

A metric is omitted if it cannot be measured yet, or if it has no meaning (CertificateDaysLeft if TLS is off).
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
"""The data for the graphs on the page /mlflow-host/. The entry of each minute is a list: minutes since the epoch,
requests, errors, median and 95th percentile of the latency in milliseconds, and the data volume's used space."""
HEALTH = "/healthz"
"""nginx returns 200 for this path only after an MLflow process has queried PostgreSQL."""
SECONDS = 15
WINDOW = timedelta(minutes=1)
"""Only requests of the last minute are counted, because the timer's interval is one minute."""
LOG_BYTES = 16 << 20
"""Number of bytes to read from the end of the access log. The number is enough for one minute with 1,000 requests per
second and 200 bytes per line."""
FEW_REQUESTS = 20
"""The error percentage is the number of errors divided by the number of requests, or by FEW_REQUESTS if a minute has
fewer requests. So one error among few requests at night causes no alarm."""
WITH_ALARMS_OF_THEIR_OWN = {"mlflow-host-room.service", "mlflow-host-backups-check.service"}
"""Units that are not counted as failed, because another metric reports their failure."""


def measured(wanted: set[str], now: datetime | None = None) -> dict[str, float]:
    """Measure the metrics in `wanted`. Returns the values by name, without metrics that cannot be measured now."""
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
        except Exception as error:  # after a failed measurement, the other metrics are still measured
            print(f"mlflow-host: {name} cannot be measured: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        if value is not None:
            found[name] = value
    return found


def answers() -> float:
    """Return 1 if the health check succeeds (nginx, MLflow and PostgreSQL respond), else 0."""
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
    """Return TLS settings that do not verify nginx's certificate. The certificate is not valid for 127.0.0.1."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def reported(file: str, key: str) -> float | None:
    """Return a number, or the length of a list, from another timer's report. Returns None before the first report."""
    try:
        value = json.loads((config.RUN / "web" / file).read_text())[key]
    except (OSError, ValueError, KeyError):
        return None
    return float(len(value) if isinstance(value, list) else value)


def memory_used() -> float:
    """Return the used memory in per cent. Free memory and caches that the kernel can drop are not counted as used."""
    lines = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines())
    total, available = (int(lines[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    return round(100 * (1 - available / total), 1)


def error_percent(log: Path, now: datetime) -> float | None:
    """Return the percentage of the last minute's requests with status 500 or above, or None if `log` is unreadable."""
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
            # A line contains '"GET /path" 200'. nginx escapes quotation marks in the path, so '" ' ends the path.
            status = int(line.split('" ', 1)[1].split(" ", 1)[0])
        except (ValueError, IndexError):
            continue
        if at < now - WINDOW:
            break
        statuses.append(status)
    return round(100 * sum(status >= 500 for status in statuses) / max(len(statuses), FEW_REQUESTS), 1)


def last_minute(history: Path, column: int, now: datetime, per: int = 1) -> float | None:
    """Return one value of the history's last minute, divided by `per`. Returns None if the last minute is too old."""
    try:
        minute = json.loads(history.read_text())["minutes"][-1]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    return float(minute[column]) / per if now.timestamp() // 60 - minute[0] <= 2 else None


def certificate_days(now: datetime) -> float | None:
    """Return the number of days until nginx's certificate expires, or None if TLS is off or nginx does not respond."""
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
    """Return the number of systemd units in the state `failed`, without units that another metric reports."""
    command = ["systemctl", "list-units", "--state=failed", "--plain", "--no-legend", "--no-pager"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout
    failed = {line.split()[0] for line in shown.splitlines() if line.strip()}
    return float(len(failed - WITH_ALARMS_OF_THEIR_OWN))
