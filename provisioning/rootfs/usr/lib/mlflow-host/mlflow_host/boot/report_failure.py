"""Unit `mlflow-host-failure@`: show the failure of a boot unit on the status page. systemd runs it by OnFailure=.

A step that fails records its own reason. A step that was killed (out of memory, timeout) or that runs another program
(PostgreSQL) does not, and would stay "running" on the page.

    python -m mlflow_host.boot.report_failure mlflow-host-postgresql.service
"""

from __future__ import annotations

import json
import subprocess
import sys

from mlflow_host.boot.ready import last_words
from mlflow_host.machine import config
from mlflow_host.machine.status import BootStep


def main(unit: str) -> None:
    name = unit.removesuffix(".service").removeprefix("mlflow-host-")
    recorded = config.RUN / "status" / f"{name}.json"
    if recorded.exists() and json.loads(recorded.read_text())["state"] == "failed":
        return
    result = result_of(unit)
    if result == "success":
        return  # the unit never started, because a unit that it requires has failed and is reported itself
    BootStep(name, config.RUN).record("failed", f"{unit} ended with {result}: {last_words(unit)}")
    print(f"mlflow-host: {unit} ended with {result}", file=sys.stderr)


def result_of(unit: str) -> str:
    """systemd's Result of a unit, such as exit-code, oom-kill or timeout; success if it never started."""
    command = ["systemctl", "show", unit, "--property=Result", "--value"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main(sys.argv[1])
