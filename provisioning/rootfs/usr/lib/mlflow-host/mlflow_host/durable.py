"""What is on the data volume for good: there after a crash whole, or as it was before."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, content: str) -> None:
    """Replace a file; once this returns, the new one is on disk."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Have the names in a folder on disk, after one of them was given or changed."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
