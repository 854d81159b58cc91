"""Sizing returns sensible figures for common instance types, and never assigns more than a machine has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlflow_host.contract import sizing
from mlflow_host.contract.sizing import MachineSize, Sizing, size

machines = st.builds(MachineSize, memory_mb=st.integers(900, 1_000_000), cores=st.integers(1, 192))


def claimed_mb(sized: Sizing) -> int:
    """Memory used without any request."""
    return sizing.SYSTEM_MB + sized.shared_buffers_mb + sized.server_processes * sizing.SERVER_MB


def test_small_machine_has_memory_to_spare() -> None:
    """t3.small has 2 GiB, of which about 1,900 MiB are usable."""
    sized = size(MachineSize(1900, 2))
    assert sized.server_processes == 2
    assert claimed_mb(sized) <= 1900 * 0.75
    assert 128 <= sized.shared_buffers_mb <= 512
    assert sized.request_threads >= 12
    assert sized.max_connections <= 200


def test_eight_cores_are_used() -> None:
    sized = size(MachineSize(31_500, 8))
    assert sized.server_processes == 8
    assert sized.shared_buffers_mb >= 7000
    assert sized.max_connections >= 8 * 2 * 16


def test_one_gibibyte_still_has_one_process() -> None:
    sized = size(MachineSize(930, 2))
    assert sized.server_processes == 1
    assert claimed_mb(sized) <= 930


@given(machines, st.booleans())
def test_pools_never_exhaust_postgresql(machine: MachineSize, jobs: bool) -> None:
    sized = size(machine, job_execution=jobs)
    pools = sized.server_processes * sizing.ENGINES_PER_PROCESS
    reserved = sizing.RESERVED_CONNECTIONS + (sizing.JOB_CONNECTIONS if jobs else 0)
    assert pools * (sized.pool_size + sized.pool_overflow) + reserved <= sized.max_connections


@given(machines)
def test_all_server_processes_at_their_limit_leave_memory_for_postgresql(machine: MachineSize) -> None:
    sized = size(machine)
    servers = sized.server_processes * (sized.server_limit_mb - sizing.STACKS_MB)
    assert sized.server_limit_mb >= sizing.SERVER_MB + sizing.STACKS_MB
    if machine.memory_mb > 2 * sizing.SERVER_MB + sizing.SYSTEM_MB:
        assert servers + sizing.SYSTEM_MB + sized.shared_buffers_mb <= machine.memory_mb


@given(machines)
def test_a_request_never_waits_for_a_connection(machine: MachineSize) -> None:
    """log_batch holds one database connection while it opens a second, so a smaller pool could cause a deadlock."""
    sized = size(machine)
    assert sized.pool_size + sized.pool_overflow >= 2 * sized.request_threads + sizing.SPARE_PER_POOL
    assert sized.request_threads >= 8


@given(machines)
def test_parts_never_exceed_the_machine(machine: MachineSize) -> None:
    sized = size(machine)
    assert claimed_mb(sized) <= machine.memory_mb
    assert sized.effective_cache_size_mb <= machine.memory_mb
    assert sized.maintenance_work_mem_mb <= machine.memory_mb // 8
    assert 1 <= sized.server_processes <= machine.cores


@given(machines, st.integers(0, 100_000), st.integers(0, 64))
@example(MachineSize(3542, 7), 554, 0)
def test_a_bigger_machine_never_gets_less(machine: MachineSize, memory: int, cores: int) -> None:
    small, big = size(machine), size(MachineSize(machine.memory_mb + memory, machine.cores + cores))
    assert big.server_processes >= small.server_processes
    assert big.shared_buffers_mb >= small.shared_buffers_mb
    assert big.maintenance_work_mem_mb >= small.maintenance_work_mem_mb


@given(machines)
def test_job_execution_takes_memory_from_the_server_processes(machine: MachineSize) -> None:
    without, with_jobs = size(machine), size(machine, job_execution=True)
    assert with_jobs.server_processes <= without.server_processes
    left = machine.memory_mb - sizing.SYSTEM_MB - with_jobs.shared_buffers_mb - sizing.JOBS_MB
    assert with_jobs.server_processes == 1 or with_jobs.server_processes * sizing.SERVER_MB <= left


def fake_root(tmp_path: Path, **files: str) -> Path:
    for name, content in {"proc/meminfo": "MemFree: 1 kB\nMemTotal:       16384000 kB\n", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "machine"),
    [
        ({}, MachineSize(16000, CORES)),
        ({"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, MachineSize(16000, CORES)),
        ({"sys/fs/cgroup/memory.max": "2147483648\n"}, MachineSize(2048, CORES)),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "1073741824\n"}, MachineSize(1024, CORES)),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, MachineSize(16000, CORES)),
        ({"sys/fs/cgroup/cpu.max": "100000 100000\n"}, MachineSize(16000, 1)),
        ({"sys/fs/cgroup/cpu.max": "20000 100000\n"}, MachineSize(16000, 1)),
        (
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            MachineSize(16000, 1),
        ),
        (
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            MachineSize(16000, CORES),
        ),
    ],
)
def test_control_group_limits_are_applied(files: dict[str, str], machine: MachineSize, tmp_path: Path) -> None:
    assert sizing.this_machine(fake_root(tmp_path, **files)) == machine


def test_current_machine_can_be_sized() -> None:
    machine = sizing.this_machine()
    assert 100 < machine.memory_mb <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    assert size(machine).server_processes >= 1
