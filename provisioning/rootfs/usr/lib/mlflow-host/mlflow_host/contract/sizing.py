"""Divide the machine's memory and cores among its parts: one function computes every figure that depends on them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

SYSTEM_MB = 300
"""Kernel, journald, nginx, SSM agent and the page cache they need."""

SERVER_MB = 400
"""One busy MLflow process: 254 MB after start (measured, 3.17.2), the rest for searches in large experiments."""

STACKS_MB = 128
"""Stacks of the threads of one MLflow process, which are reserved and hardly used."""

JOBS_MB = 600
"""With job execution: MLflow's job runner and scheduler, idle (370 MB measured, 3.17.2), and one job. Releases before
3.17 run one process per kind of job instead, 1.4 GB in all."""

ENGINES_PER_PROCESS = 2
"""SQLAlchemy connection pools in one MLflow process: one of the tracking store, one of the model registry."""

MOST_THREADS = 12
"""Maximum number of request threads of one process. They share one interpreter lock: with 8 clients, 16 threads handled
5 to 10 % fewer requests than 8. Threads beyond 8 are for requests that wait for S3."""

SPARE_PER_POOL = 4
"""Connections of a pool beyond those of the request threads, for MLflow's background threads."""

RESERVED_CONNECTIONS = 25
"""For the database step, backups, health checks, mlflow_reader and psql."""

JOB_CONNECTIONS = 60

PROGRAM_MB = 256
"""Address space of an idle PostgreSQL process without shared_buffers: program, libraries, other shared memory."""


@dataclass(frozen=True)
class MachineSize:
    memory_mb: int
    cores: int


@dataclass(frozen=True)
class Sizing:
    """Memory in MiB (PostgreSQL's MB).

    A request thread of MLflow holds at most two connections of a pool at once (log_batch does). A process with at most
    `request_threads` of them therefore never waits for pool_size + pool_overflow connections.
    """

    memory_mb: int
    cores: int
    server_processes: int
    server_limit_mb: int
    """Data of one MLflow process. A request that needs more fails alone with 400; without the limit the kernel kills a
    process of the machine."""
    request_threads: int
    pool_size: int
    pool_overflow: int
    max_connections: int
    shared_buffers_mb: int
    effective_cache_size_mb: int
    work_mem_mb: int
    maintenance_work_mem_mb: int
    process_limit_mb: int
    """Address space of one PostgreSQL process. A query that needs more fails alone with "out of memory"; without the
    limit the kernel kills its process, and PostgreSQL then ends every session."""


def size(machine: MachineSize, *, job_execution: bool = False) -> Sizing:
    """Python limits MLflow's throughput, so there is one server process per core if memory allows. PostgreSQL's figures
    follow from the number of connections that those processes can open."""
    memory = machine.memory_mb
    # An eighth of the memory up to 4 GiB, a quarter from 6 GiB on, and linear between: with a jump, a machine with more
    # memory would get fewer server processes.
    shared_buffers = _within(32, min(memory // 4, max(memory // 8, memory // 2 - 1536)), 16384)
    for_servers = memory - SYSTEM_MB - shared_buffers - (JOBS_MB if job_execution else 0)
    processes = _within(1, for_servers // SERVER_MB, machine.cores)
    pools = processes * ENGINES_PER_PROCESS
    reserved = RESERVED_CONNECTIONS + (JOB_CONNECTIONS if job_execution else 0)
    # A connection takes 5 to 10 MB of memory in PostgreSQL once it has read a few tables.
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
    """Memory and cores that this machine can use. In a container, /proc shows the host's; the limit is in the control
    group (v2 or v1)."""
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
