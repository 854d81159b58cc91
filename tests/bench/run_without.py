"""Run the image's server process without some of its shortcuts: `python run_without.py NAME[,NAME…] --socket PATH`.

The production code has no switch for a shortcut, so this script removes the shortcut before the process starts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def without_patch(target: str) -> Callable[[], None]:
    def remove() -> None:
        from mlflow_host.server import mlflow_patches

        for group in ("BEFORE_IMPORT", "AFTER_IMPORT"):
            left = [patch for patch in getattr(mlflow_patches, group) if patch.target != target]
            setattr(mlflow_patches, group, tuple(left))

    return remove


def without(name: str) -> Callable[[], None]:
    """Return a function that replaces `name` of `server.process`. The replacement returns the application unchanged."""

    def remove() -> None:
        from mlflow_host.server import process

        def unchanged(application: Any, *_: Any, **__: Any) -> Any:
            return application

        assert hasattr(process, name)
        setattr(process, name, unchanged)

    return remove


def without_connections() -> None:
    from mlflow_host.server import db_connections

    db_connections.through_plugin = lambda uri: uri


SHORTCUTS: dict[str, Callable[[], None]] = {
    "fast path": without("answered"),
    "Flask shortcut": without("short_cut"),
    "connections": without_connections,
    "ParseDict": without_patch("google.protobuf.json_format:ParseDict"),
    "compact JSON": without_patch("mlflow.utils.proto_json_utils:json"),
}

if __name__ == "__main__":
    for each in filter(None, sys.argv[1].split(",")):
        SHORTCUTS[each]()
    from mlflow_host.server.process import main

    sys.exit(main(sys.argv[2:]))
