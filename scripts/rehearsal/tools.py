"""Find Packer's and Pulumi's programs on PATH or in build/tools, where `make prepare-tools` builds them."""

from __future__ import annotations

import shutil
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
BIN = CHECKOUT / "build/tools/bin"
PACKER_PLUGINS = CHECKOUT / "build/tools/packer-plugins"
"""The value of the environment variable PACKER_PLUGIN_PATH."""


def find_pulumi() -> Path | None:
    """Return the path of Pulumi's CLI on PATH, or else in build/tools. Returns None if the CLI is in neither."""
    found = shutil.which("pulumi") or shutil.which("pulumi", path=str(BIN))
    return Path(found) if found else None
