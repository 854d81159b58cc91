"""Unit `mlflow-host-failure@`, started by OnFailure= of boot units: show the unit's failure on the status page.

A boot step that fails with an error records the reason itself. A step that was killed (out of memory, timeout) or that
executes another program (PostgreSQL) records no reason, so the status page would show the step as "running".

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
        return  # the unit never started, because a required unit failed, and that failure has its own report
    BootStep(name, config.RUN).record("failed", f"{unit} ended with {result}: {last_words(unit)}")
    print(f"mlflow-host: {unit} ended with {result}", file=sys.stderr)


def result_of(unit: str) -> str:
    """The property Result of a systemd unit, for example exit-code, oom-kill or timeout. For a unit that never started,
    Result is success."""
    command = ["systemctl", "show", unit, "--property=Result", "--value"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main(sys.argv[1])
