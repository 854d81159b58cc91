"""Only one test session at a time uses a local cloud. A test session does not use machines that a killed session left
behind."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def used_alone(state_dir: Path) -> Iterator[bool]:
    """Lock the cloud in `state_dir` during the block. If another session has the lock, the test fails. Yields whether
    the previous session was killed before it could stop its machines."""
    path = state_dir.with_name(f"{state_dir.name}.session")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pytest.fail(f"other tests (process {file.read().strip()}) use {state_dir}: wait for them", pytrace=False)
        killed = path.stat().st_size > 0
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield killed
        file.truncate(0)
