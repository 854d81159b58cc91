"""Crash-safe file writes. After a crash, a file has either its complete old content or its complete new content."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, content: str) -> None:
    """Replace a file atomically. When the function returns, the new content is on disk."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    sync(path.parent)


def replace(path: Path, content: str) -> None:
    """Replace a file atomically for other processes. The new content is not synced, so a power cut may lose it."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(content)
    new.replace(path)


def sync(folder: Path) -> None:
    """Write a folder's entries to disk, after the caller has created or renamed a file in the folder."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
