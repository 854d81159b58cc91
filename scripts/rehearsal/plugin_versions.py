"""Versions of the provider plug-ins that the installed Pulumi packages require."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path


def provider_versions() -> dict[str, str]:
    """Return plug-in → version, from the file pulumi-plugin.json of each installed Pulumi package."""
    found = {}
    for path in Path(sysconfig.get_path("purelib")).glob("pulumi_*/pulumi-plugin.json"):
        document = json.loads(path.read_text())
        if document.get("resource"):
            found[str(document["name"])] = str(document["version"]).removeprefix("v")
    return dict(sorted(found.items()))
