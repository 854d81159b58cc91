"""Crash-safe file writes: after a crash, a file has the old or the new content, never a part."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, content: str) -> None:
    """Replace a file atomically. When this returns, the new content is on disk."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    sync(path.parent)


def replace(path: Path, content: str) -> None:
    """Replace a file atomically for other processes and for later ones, but not for a power cut: nothing is synced."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(content)
    new.replace(path)


def sync(folder: Path) -> None:
    """Write a folder's entries to disk, after a file in it was created or renamed."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
