"""Divide the machine's memory and cores among its programs. `size` computes all settings that depend on the machine."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

SYSTEM_MB = 300
"""Memory for the kernel, journald, nginx and the SSM agent, and for the page cache that these programs need."""

SERVER_MB = 400
"""Memory of one busy MLflow process: 254 MB after the start (measured with MLflow 3.17.2), and the rest for searches in
large experiments."""

STACKS_MB = 128
"""Address space of the thread stacks of one MLflow process. The threads use little of this address space."""

JOBS_MB = 600
"""Memory for job execution: one job, and MLflow's idle job runner and scheduler (370 MB, measured with MLflow 3.17.2).
MLflow before 3.17 runs one process per kind of job, and these processes use 1.4 GB together."""

ENGINES_PER_PROCESS = 2
"""Number of SQLAlchemy connection pools in one MLflow process: the tracking store's and the model registry's pool."""

MOST_THREADS = 12
"""Maximum number of request threads of one MLflow process. The threads share Python's interpreter lock. With 8 clients,
16 threads handled 5 to 10 % fewer requests than 8 threads. More than 8 threads help only if requests wait for S3."""

SPARE_PER_POOL = 4
"""Additional connections of a pool, for MLflow's background threads."""

RESERVED_CONNECTIONS = 25
"""Connections for the boot step `database`, backups, health checks, the role mlflow_reader and psql."""

JOB_CONNECTIONS = 60

PROGRAM_MB = 256
"""Address space of an idle PostgreSQL process for the program, libraries and shared memory, without shared_buffers."""


@dataclass(frozen=True)
class MachineSize:
    memory_mb: int
    cores: int


@dataclass(frozen=True)
class Sizing:
    """The sizes for one machine. Memory is in MiB, which PostgreSQL's settings call MB.

    A request thread of MLflow holds at most two connections of one pool at a time (log_batch holds two). Therefore a
    process with `request_threads` threads never has to wait for one of its pool_size + pool_overflow connections.
    """

    memory_mb: int
    cores: int
    server_processes: int
    server_limit_mb: int
    """Limit of the data segment of one MLflow process. A request that needs more memory fails with status 400. Without
    the limit, the kernel would kill a process, and other requests would fail too."""
    request_threads: int
    pool_size: int
    pool_overflow: int
    max_connections: int
    shared_buffers_mb: int
    effective_cache_size_mb: int
    work_mem_mb: int
    maintenance_work_mem_mb: int
    process_limit_mb: int
    """Limit of the address space of one PostgreSQL process. A query that needs more memory fails with "out of memory".
    Without the limit, the kernel would kill the process, and PostgreSQL would then end every session."""


def size(machine: MachineSize, *, job_execution: bool = False) -> Sizing:
    """Compute the sizes. Python limits MLflow's throughput, so each core gets a server process if the memory suffices.
    PostgreSQL's memory settings depend on the number of connections that the server processes can open."""
    memory = machine.memory_mb
    # shared_buffers is 1/8 of the memory on machines with up to 4 GiB of memory, and 1/4 of the memory from 6 GiB on.
    # Between 4 and 6 GiB, shared_buffers grows linearly with the memory, because a sudden increase would leave less
    # memory for server processes on the larger machine.
    shared_buffers = _within(32, min(memory // 4, max(memory // 8, memory // 2 - 1536)), 16384)
    for_servers = memory - SYSTEM_MB - shared_buffers - (JOBS_MB if job_execution else 0)
    processes = _within(1, for_servers // SERVER_MB, machine.cores)
    pools = processes * ENGINES_PER_PROCESS
    reserved = RESERVED_CONNECTIONS + (JOB_CONNECTIONS if job_execution else 0)
    # A PostgreSQL connection uses 5 to 10 MB of memory after it has read a few tables.
    affordable = _within(80, memory // 12, 600) - RESERVED_CONNECTIONS
    threads = _within(8, (affordable // pools - SPARE_PER_POOL) // 2, MOST_THREADS)
    max_connections = pools * (2 * threads + SPARE_PER_POOL) + reserved
    return Sizing(
        memory_mb=memory,
        cores=machine.cores,
        server_processes=processes,
        server_limit_mb=max(SERVER_MB, for_servers // processes) + STACKS_MB,
        request_threads=threads,
        pool_size=threads,
        pool_overflow=threads + SPARE_PER_POOL,
        max_connections=max_connections,
        shared_buffers_mb=shared_buffers,
        effective_cache_size_mb=max(
            64, shared_buffers + (memory - SYSTEM_MB - shared_buffers - processes * SERVER_MB) // 2
        ),
        work_mem_mb=_within(4, memory // 2 // max_connections, 64),
        maintenance_work_mem_mb=_within(32, memory // 16, 2048),
        process_limit_mb=shared_buffers + PROGRAM_MB + max(256, memory // 4),
    )


def this_machine(root: Path = Path("/")) -> MachineSize:
    """Memory and cores that this machine can use. In a container, /proc shows the memory of the host, so the limits are
    read from the control group (v2 or v1)."""
    kib = next(line.split()[1] for line in (root / "proc/meminfo").read_text().splitlines() if line[:9] == "MemTotal:")
    groups = root / "sys/fs/cgroup"
    limits = [_number(groups / name) for name in ("memory.max", "memory/memory.limit_in_bytes")]
    memory = min([int(kib) * 1024, *(limit for limit in limits if limit is not None)])
    cores = len(os.sched_getaffinity(0))
    quota = _cpu_quota(groups)
    return MachineSize(memory // 2**20, max(1, min(cores, math.ceil(quota))) if quota else cores)


def _cpu_quota(groups: Path) -> float | None:
    try:
        quota, period = (groups / "cpu.max").read_text().split()
    except (OSError, ValueError):
        quota, period = (str(_number(groups / f"cpu/cpu.cfs_{name}_us") or "max") for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _within(lowest: int, wanted: int, highest: int) -> int:
    return max(lowest, min(wanted, highest))
