"""Bake check: start the server process once with the installed MLflow, on a temporary database and socket.

    python -m mlflow_host.bake.check_release       prints the result as JSON and records fallbacks

The bake fails if the process cannot start, answer and stop. If the release does not support an optional feature of this
project, the check adds the feature to `fallbacks` in image.json, and the bake continues.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow_host.bake import fallbacks
from mlflow_host.bake.fallbacks import Fallback
from mlflow_host.garbage.removal import RemovalRefused
from mlflow_host.garbage.removal import check_release as check_removal
from mlflow_host.server import job_runner
from mlflow_host.server.environment import (
    BOOT_ID,
    artifacts_destination,
    direct_transfers,
    private_environment,
    variables,
)
from mlflow_host.server.fast_path.compatibility import SHORTCUTS, STORE, switched_off
from mlflow_host.server.mlflow_checks import WITHOUT, Refusal
from mlflow_host.server.process import APPLICATION, BACKGROUND_JOBS, CHECK_QUERY, GRACE_SECONDS

START_SECONDS = 120

SERVER_INFO = "/api/3.0/mlflow/server-info"


def main() -> int:
    try:
        result, found = check()
    except Refusal as refusal:
        print(f"mlflow-server: {refusal}", file=sys.stderr)
        return 2
    fallbacks.record("check_release", found)
    print(json.dumps(result))
    return 0


def check() -> tuple[dict[str, Any], list[Fallback]]:
    """Start the server process once, and compare its private variables with those of the installed `mlflow server`.

    Returns (result, fallbacks). The result contains the release, the seconds from the start to the first response, and
    the memory at that time (PSS, MB). The fallbacks are the features that the release does not support. Raises Refusal
    if the process cannot answer requests.
    """
    import mlflow

    with tempfile.TemporaryDirectory(prefix="mlflow-check-") as name:
        folder = Path(name)
        public = {
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db",
            "MLFLOW_ARTIFACTS_DESTINATION": artifacts_destination("check-artifacts", "check-models", "direct"),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            **direct_transfers("direct"),
        }
        with variables(public):
            create_database(public["MLFLOW_BACKEND_STORE_URI"])
            found = private_variables(private_environment(public))
            seconds, memory, said, info = start_once(folder / "server.sock")
    lines = [line.removeprefix(WITHOUT).removesuffix(")") for line in said if line.startswith(WITHOUT)]
    found += [Fallback(*line.split(" (", 1)) for line in lines]
    found += [*fast_path(Path(mlflow.__file__).parent), *advertised(info), *removal(), *jobs()]
    result = {
        "mlflow": mlflow.__version__,
        "application": APPLICATION,
        "start_seconds": seconds,
        "memory_mb": memory,
    }
    return result, found


def create_database(uri: str) -> None:
    """Create a database at `uri`. MLflow creates the tables of an empty database when it opens a store."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    untyped: Any = SqlAlchemyStore
    untyped(uri, "mlflow-artifacts:/").engine.dispose()


def fast_path(package: Path) -> list[Fallback]:
    """The endpoints that the fast path cannot answer, because a function or class of the installed MLflow differs from
    every release with which the fast path was compared."""
    off = switched_off(package)
    if off.keys() == set(SHORTCUTS):
        off = {"all endpoints": sorted(set().union(*off.values()))}
    return [
        Fallback(
            f"the fast path of {'metrics that handlers of MLflow log' if path == STORE else path}",
            f"fast_path/compatibility.py has no hash of {', '.join(sources)} in this release",
        )
        for path, sources in off.items()
    ]


def advertised(info: dict[str, Any]) -> list[Fallback]:
    """The direct transfers that MLflow's server-info does not offer. MLflow 3.18 and newer offer direct transfers in
    the server-info. In older releases, some of the server-info's keys are missing; a missing key causes no fallback."""
    refused = [name for name in ("uploads", "downloads") if info.get(f"multipart_{name}_enabled") is False]
    if not refused:
        return []
    what = f"direct {' and '.join(refused)} of artifacts: these transfers pass through the server"
    return [Fallback(what, f"{SERVER_INFO} offers none with {' and '.join(direct_transfers('direct'))}")]


def removal() -> list[Fallback]:
    try:
        check_removal()
    except RemovalRefused as refusal:
        return [Fallback("the weekly removal of deleted items: they stay until an image can remove them", str(refusal))]
    return []


def jobs() -> list[Fallback]:
    try:
        job_runner.launcher()
    except (ImportError, AttributeError) as error:
        return [Fallback(BACKGROUND_JOBS, f"{type(error).__name__}: {error}")]
    return []


def private_variables(ours: Mapping[str, str]) -> list[Fallback]:
    """The differences between `ours` and the private variables that `mlflow server` sets for its workers."""
    what = "settings that `mlflow server` passes to its workers: they may differ"
    try:
        problems = compare_with_cli(*what_cli_starts(), ours)
    except Refusal as refusal:
        problems = [str(refusal)]
    return [Fallback(what, "; ".join(problems))] if problems else []


def what_cli_starts() -> tuple[list[str], dict[str, str]]:
    """The command and environment variables with which `mlflow server` would start its workers. Raises Refusal if
    MLflow starts no worker, or does not use the expected function to start its workers."""
    import mlflow.cli
    import mlflow.server
    from click.testing import CliRunner

    started: list[tuple[list[str], dict[str, str]]] = []

    def record(command: list[str], *, extra_env: dict[str, str], **_: object) -> None:
        started.append((command, extra_env))
        raise SystemExit(0)

    if not hasattr(mlflow.server, "_exec_cmd"):
        raise Refusal(
            f"`mlflow server` {mlflow.__version__} has no function _exec_cmd, which starts the workers in other "
            f"releases"
        )
    untyped: Any = mlflow.server
    real, untyped._exec_cmd = untyped._exec_cmd, record
    try:
        result = CliRunner().invoke(mlflow.cli.cli, ["server"])
    finally:
        untyped._exec_cmd = real
    if not started:
        raise Refusal(f"`mlflow server` {mlflow.__version__} started no worker: {result.output.strip()[-300:]}")
    return started[0]


def compare_with_cli(command: list[str], variables: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """The differences between `ours` (set by `private_environment`) and the private variables that `mlflow server` sets
    for its workers. Public settings are not compared, because MLflow uses a setting's default if the setting is unset.
    """
    variables = {
        name: value for name, value in variables.items() if name.startswith("_") and not is_default(name, value)
    }
    problems = [] if command[-1] == APPLICATION else [f"it runs {command[-1]}, not {APPLICATION}"]
    problems += [f"it sets {name} = {variables[name]!r}" for name in sorted(variables.keys() - ours.keys())]
    problems += [f"it does not set {name}" for name in sorted(ours.keys() - variables.keys() - {BOOT_ID})]
    problems += [
        f"it sets {name} = {variables[name]!r}, not {ours[name]!r}"
        for name in sorted((variables.keys() & ours.keys()) - {BOOT_ID})
        if variables[name] != ours[name]
    ]
    return problems


def is_default(name: str, value: str) -> bool:
    """Whether MLflow also uses `value` if the variable is not set."""
    from mlflow import environment_variables

    variable = getattr(environment_variables, name, None)
    return variable is not None and str(variable.default).lower() == value.lower()


def start_once(uds: Path) -> tuple[float, float, list[str], dict[str, Any]]:
    """Start a server process on the Unix socket `uds`, send queries, and stop the process. Returns the seconds until
    the first response, the PSS in MB, the lines on stderr, and MLflow's server-info ({} if MLflow returns none).
    Raises Refusal if the process ends, or does not answer within `START_SECONDS`."""
    begun = time.monotonic()
    log = uds.with_name("server.log")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow_host.server.process", "--socket", str(uds)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            stderr=stderr,
        )
    try:
        while (answer := answer_or_none(uds)) is None:
            if process.poll() is not None:
                raise Refusal(
                    f"the server process ended with status {process.returncode} at start: see the lines above"
                )
            if time.monotonic() > begun + START_SECONDS:
                raise Refusal(f"the server process accepted no connection within {START_SECONDS} s")
            time.sleep(0.02)
        if b" 200 " not in answer.split(b"\r\n")[0] or b'"experiment_id": "0"' not in answer:
            raise Refusal(f"the server process answers {answer[:200]!r} to {CHECK_QUERY}")
        seconds = time.monotonic() - begun
        memory = pss_mb(process.pid)
        head, _, body = ask(uds, SERVER_INFO).partition(b"\r\n\r\n")
        info = json.loads(body) if b" 200 " in head.split(b"\r\n")[0] else {}
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=GRACE_SECONDS + 10)
        print(log.read_text(), end="", file=sys.stderr)
    if status not in (0, -signal.SIGTERM):
        raise Refusal(f"the server process ended with status {status} after SIGTERM")
    return round(seconds, 2), memory, log.read_text().splitlines(), info


def answer_or_none(uds: Path) -> bytes | None:
    """The response to CHECK_QUERY; None if the process does not listen on its socket yet."""
    try:
        return ask(uds, CHECK_QUERY)
    except (FileNotFoundError, ConnectionRefusedError):
        return None


def ask(uds: Path, target: str) -> bytes:
    """The complete response to a GET request, with its headers."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(uds))
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


def pss_mb(pid: int) -> float:
    """Memory of a process in MB: the proportional set size (PSS). PSS divides shared pages among their processes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1000, 1)


if __name__ == "__main__":
    sys.exit(main())
