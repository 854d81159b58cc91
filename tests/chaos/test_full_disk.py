"""The data volume becomes full at several moments of an upgrade, a carry back and a merge, as if another program filled
it. The database step fails with an error message and without a loss of data. The next run of the step succeeds.

Normally, the database step refuses to begin if the free space is too small. The tests switch off the check of the free
space."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.test_killed_database_step import OPERATIONS, Prepared, _sums, check_and_finish, prepare
from tests.schema.private_cluster import private_cluster

pytestmark = [
    pytest.mark.service,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root"),
]
MEBIBYTES = 2048


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    with private_cluster(MEBIBYTES) as server, prepare(server, tmp_path_factory.mktemp("full")) as ready:
        yield ready


@pytest.fixture(scope="module")
def needed(prepared: Prepared) -> dict[str, int]:
    """Operation → the maximum number of bytes of disk space that the database step uses for this operation."""
    found = {}
    for operation in OPERATIONS:
        prepared.reset(operation)
        least, before, ended = [free(prepared.server.folder)], free(prepared.server.folder), threading.Event()

        def look(least: list[int] = least, ended: threading.Event = ended) -> None:
            while not ended.wait(0.02):
                least[0] = min(least[0], free(prepared.server.folder))

        looking = threading.Thread(target=look)
        looking.start()
        _, stderr = prepared.start(operation).communicate(timeout=300)
        ended.set()
        looking.join()
        found[operation] = before - least[0]
        assert found[operation] > 2**22, stderr
    return found


def free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


@pytest.mark.parametrize("share", [0.02, 0.2, 0.4, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_full_disk_loses_nothing_and_the_next_run_finishes(
    prepared: Prepared, needed: dict[str, int], operation: str, share: float
) -> None:
    prepared.reset(operation)
    before = {name: _sums(prepared.cluster, name) for name in prepared.aside[operation]}
    filler = prepared.server.folder / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free(prepared.server.folder) - int(share * needed[operation]))
    try:
        process = prepared.start(operation, "--without-space-check")
        _, stderr = process.communicate(timeout=300)
    finally:
        filler.unlink()
    if process.returncode:
        assert (process.returncode, "Traceback" in stderr) == (2, False), stderr
        print(f"{operation} with {share:.0%} of {needed[operation] >> 20} MiB: {stderr.strip()}")
    server = prepared.server.process
    if server and server.poll() is not None:  # PostgreSQL ends if it cannot write its WAL
        prepared.server.start()
    check_and_finish(prepared, operation, before, f"{operation} with {share:.0%} of the space: {stderr}")
