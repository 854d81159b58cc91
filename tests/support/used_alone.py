"""One test session at a time uses a local cloud; the leftovers of a killed session are not used."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def used_alone(state_dir: Path) -> Iterator[bool]:
    """During the block no other session uses the cloud in `state_dir`; the test fails if one does. Yields whether the
    previous session was killed before it could stop its machines.
    """
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
