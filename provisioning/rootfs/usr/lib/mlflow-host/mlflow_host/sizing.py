"""How much of the machine each part gets: one function from memory and cores to every figure that depends on them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

SYSTEM_MB = 300
"""Kernel, journald, nginx, SSM agent and the page cache they cannot do without."""

SERVER_MB = 400
"""One MLflow process at work: 254 MB after start (measured, 3.17.2), the rest for searches in large experiments."""

JOBS_MB = 600
"""MLflow's job runner and its scheduler at rest (370 MB measured, 3.17.2) and a job, when job execution is asked for.
Releases before 3.17 run a process for each kind of job instead, 1.4 GB in all."""

ENGINES_PER_PROCESS = 2
"""SQLAlchemy pools in one MLflow process: the tracking store and the model registry have one each."""

MOST_THREADS = 12
"""Request threads of one process. They share one interpreter, so more of them only take turns more often: at 8 clients
16 made 5 to 10 % fewer requests than 8. The rest are for those that wait for S3."""

SPARE_PER_POOL = 4
"""Connections a pool has beyond what the request threads can hold, for MLflow's background threads."""

RESERVED_CONNECTIONS = 25
"""For the database step, backups, health checks, read-only guests and a person with psql."""

JOB_CONNECTIONS = 60


@dataclass(frozen=True)
class Machine:
    memory_mb: int
    cores: int


@dataclass(frozen=True)
class Sizing:
    """Memory in MiB (PostgreSQL's MB).

    A request thread of MLflow holds at most two connections of a pool at once (log_batch does), so the server must
    run at most `request_threads` of them per process: then pool_size + pool_overflow is never waited for.
    """

    memory_mb: int
    cores: int
    server_processes: int
    request_threads: int
    pool_size: int
    pool_overflow: int
    max_connections: int
    shared_buffers_mb: int
    effective_cache_size_mb: int
    work_mem_mb: int
    maintenance_work_mem_mb: int


def size(machine: Machine, *, job_execution: bool = False) -> Sizing:
    """Python is what limits MLflow, so there is one server process per core, as far as memory goes, and the figures
    for PostgreSQL follow from how many connections those processes can open."""
    memory = machine.memory_mb
    shared_buffers = _within(32, memory // 8 if memory < 4096 else memory // 4, 16384)
    for_servers = memory - SYSTEM_MB - shared_buffers - (JOBS_MB if job_execution else 0)
    processes = _within(1, for_servers // SERVER_MB, machine.cores)
    pools = processes * ENGINES_PER_PROCESS
    reserved = RESERVED_CONNECTIONS + (JOB_CONNECTIONS if job_execution else 0)
    # A connection costs PostgreSQL some 5 to 10 MB once it has touched a few tables.
    affordable = _within(80, memory // 12, 600) - RESERVED_CONNECTIONS
    threads = _within(8, (affordable // pools - SPARE_PER_POOL) // 2, MOST_THREADS)
    max_connections = pools * (2 * threads + SPARE_PER_POOL) + reserved
    return Sizing(
        memory_mb=memory,
        cores=machine.cores,
        server_processes=processes,
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
    )


def this_machine(root: Path = Path("/")) -> Machine:
    """Memory and cores that this machine may really use: inside a container the kernel shows the host's, and the
    control group (v2 or v1) tells the limit."""
    kib = next(line.split()[1] for line in (root / "proc/meminfo").read_text().splitlines() if line[:9] == "MemTotal:")
    groups = root / "sys/fs/cgroup"
    limits = [_number(groups / name) for name in ("memory.max", "memory/memory.limit_in_bytes")]
    memory = min([int(kib) * 1024, *(limit for limit in limits if limit is not None)])
    cores = len(os.sched_getaffinity(0))
    quota = _cpu_quota(groups)
    return Machine(memory // 2**20, max(1, min(cores, math.ceil(quota))) if quota else cores)


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
