"""Find the real tools: on PATH, or in build/tools, where `make prepare-tools` builds them."""

from __future__ import annotations

import shutil
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
BIN = CHECKOUT / "build/tools/bin"
PACKER_PLUGINS = CHECKOUT / "build/tools/packer-plugins"
"""What PACKER_PLUGIN_PATH names."""


def find_pulumi() -> Path | None:
    """Pulumi's CLI: the one on PATH, else the one that was built; None without either."""
    found = shutil.which("pulumi") or shutil.which("pulumi", path=str(BIN))
    return Path(found) if found else None
