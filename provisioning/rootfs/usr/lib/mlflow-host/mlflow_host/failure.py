"""Run by systemd when a unit of the boot has failed: makes sure that the page says so, whatever ended the unit.

A step that fails by itself has said why. One that was killed (out of memory, a timeout) or is no program of ours
(PostgreSQL) has not, and would stay "running" on the page for ever.

    python -m mlflow_host.failure mlflow-host-postgresql.service
"""

from __future__ import annotations

import json
import subprocess
import sys

from mlflow_host import config
from mlflow_host.ready import last_words
from mlflow_host.status import Step


def main(unit: str) -> None:
    name = unit.removesuffix(".service").removeprefix("mlflow-host-")
    recorded = config.RUN / "status" / f"{name}.json"
    if recorded.exists() and json.loads(recorded.read_text())["state"] == "failed":
        return
    result = result_of(unit)
    if result == "success":
        return  # it was never started, because something it needs has failed and has said so
    Step(name, config.RUN).record("failed", f"{unit} ended with {result}: {last_words(unit)}")
    print(f"mlflow-host: {unit} ended with {result}", file=sys.stderr)


def result_of(unit: str) -> str:
    """systemd's word for how a unit ended, such as exit-code, oom-kill or timeout; success for one never started."""
    command = ["systemctl", "show", unit, "--property=Result", "--value"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main(sys.argv[1])
