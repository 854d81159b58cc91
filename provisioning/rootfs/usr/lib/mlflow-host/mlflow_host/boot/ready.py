"""Boot step `ready`: wait until every MLflow process has answered a request that reads from PostgreSQL."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from mlflow_host.machine import config
from mlflow_host.machine.status import StepFailed, step

QUERY = "/api/2.0/mlflow/experiments/search?max_results=1"
"""MLflow reads from the database to answer this request, but not to answer /health."""

PATIENCE_SECONDS = 300


def main() -> None:
    with step("ready") as s:
        processes = config.load().sizing.server_processes
        for n in range(1, processes + 1):
            s.say(f"waiting for MLflow process {n} of {processes} to answer")
            wait_for(n)
        s.say(f"MLflow answers at {config.load().url}")


def wait_for(n: int, patience: float = PATIENCE_SECONDS) -> None:
    """Wait until the MLflow process number `n` answers a request. Raises StepFailed if the unit of the process fails,
    or if the process has not answered after `patience` seconds."""
    unit = f"mlflow-server@{n}.service"
    give_up = time.monotonic() + patience
    check_unit = time.monotonic() + 2
    while not answers(config.SERVER_SOCKETS / f"server-{n}.sock"):
        if time.monotonic() > check_unit:
            check_unit += 2
            if has_failed(unit):
                raise StepFailed(f"MLflow process {n} does not start: {last_words(unit)}")
        if time.monotonic() > give_up:
            raise StepFailed(f"MLflow process {n} has not answered within {patience:.0f} s: {last_words(unit)}")
        time.sleep(0.05)


def answers(uds: Path) -> bool:
    request = f"GET {QUERY} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(uds))
            connection.sendall(request.encode())
            return connection.recv(64).startswith(b"HTTP/1.1 200 ")
    except OSError:
        return False


def has_failed(unit: str, systemctl: Callable[..., str] = lambda *a: _output("systemctl", *a)) -> bool:
    """Whether a unit has failed, or has been restarted at least three times by systemd."""
    shown = systemctl("show", unit, "--property=ActiveState,NRestarts")
    values = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    return values.get("ActiveState") == "failed" or int(values.get("NRestarts") or 0) >= 3


def last_words(unit: str) -> str:
    """The unit's last line in the journal, which usually states the reason for a failure."""
    lines = _output("journalctl", f"_SYSTEMD_UNIT={unit}", "--output=cat", "--lines=1", "--quiet").splitlines()
    return lines[-1][:300] if lines else f"see `journalctl -u {unit}`"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
