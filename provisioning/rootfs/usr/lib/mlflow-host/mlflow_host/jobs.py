"""MLflow's job runner beside the server processes, where the stack asks for job execution.

`mlflow server` starts it next to its workers and gives it their address. Jobs speak HTTP to a host and a port, and the
processes here listen on Unix sockets, so the first process also takes connections on a free port of the loopback
interface and passes them to its own socket.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from typing import Any

QUEUES_VARIABLE = "_MLFLOW_HUEY_STORAGE_PATH"
LOCAL_HOSTS = "127.0.0.1:*"
"""The Host header of jobs; nginx lets no request with it in."""


def asked_for() -> bool:
    return os.environ.get("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "").lower() in ("true", "1")


def queues(folder: Path) -> dict[str, str]:
    """What every server process and the runner must agree on: where the queues are."""
    path = folder / "jobs"
    path.mkdir(mode=0o700, exist_ok=True)
    return {QUEUES_VARIABLE: str(path)}


async def start(uds: Path) -> tuple[asyncio.Server, subprocess.Popen[bytes]]:
    """Open the way to `uds` for jobs and start the runner, which ends when this process does."""
    server = await asyncio.start_server(lambda *ends: _pass(uds, *ends), "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    return server, launch({"MLFLOW_TRACKING_URI": url, "MLFLOW_GATEWAY_URI": url})


def launch(variables: dict[str, str]) -> subprocess.Popen[bytes]:
    import mlflow.server.jobs.utils as utils

    known: Any = utils
    start = getattr(known, "_launch_job_execution_runner", None) or known._launch_job_runner  # the latter before 3.17
    runner: subprocess.Popen[bytes] = start(variables, os.getpid())
    return runner


async def _pass(uds: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    to_reader, to_writer = await asyncio.open_unix_connection(str(uds))
    await asyncio.gather(_copy(reader, to_writer), _copy(to_reader, writer), return_exceptions=True)


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(2**16):
            sink.write(data)
            await sink.drain()
    finally:
        sink.close()
