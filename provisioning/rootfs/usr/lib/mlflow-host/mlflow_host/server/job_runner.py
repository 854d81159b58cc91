"""Start MLflow's job runner. The first server process calls this module if the stack enables job execution.

Jobs send HTTP requests to a host and a port, but the server processes listen on Unix sockets. Therefore the first
process also listens on a free port of the loopback interface. The process forwards connections from this port to its
own Unix socket, and passes the port's URL to the job runner.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from typing import Any

QUEUES_VARIABLE = "_MLFLOW_HUEY_STORAGE_PATH"
LOCAL_HOSTS = "127.0.0.1:*"
"""The Host header of requests from jobs. nginx rejects requests from other machines that have this Host header."""


def asked_for() -> bool:
    return os.environ.get("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "").lower() in ("true", "1")


def queues(folder: Path) -> dict[str, str]:
    """Create the folder of the job queues. Returns MLflow's environment variable with the path of this folder."""
    path = folder / "jobs"
    path.mkdir(mode=0o700, exist_ok=True)
    return {QUEUES_VARIABLE: str(path)}


async def start(uds: Path) -> tuple[asyncio.Server, subprocess.Popen[bytes]]:
    """Open the loopback port that forwards to the Unix socket `uds`, and start the job runner.

    The job runner ends when this process ends."""
    server = await asyncio.start_server(lambda *ends: _pass(uds, *ends), "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    return server, launch({"MLFLOW_TRACKING_URI": url, "MLFLOW_GATEWAY_URI": url})


def launch(variables: dict[str, str]) -> subprocess.Popen[bytes]:
    runner: subprocess.Popen[bytes] = launcher()(variables, os.getpid())
    return runner


def launcher() -> Any:
    """Return MLflow's function that starts the job runner, or raise ImportError or AttributeError if MLflow lacks
    it."""
    import mlflow.environment_variables as variables
    import mlflow.server.jobs.utils as utils

    known: Any = utils
    # MLflow before 3.17 has only one engine, which _launch_job_runner starts.
    has_engines = hasattr(variables, "MLFLOW_SERVER_JOB_EXECUTION_ENGINE")
    return known._launch_job_execution_runner if has_engines else known._launch_job_runner


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
