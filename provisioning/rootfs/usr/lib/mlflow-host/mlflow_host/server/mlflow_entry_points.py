"""MLflow's entry points for the artifact repositories of this project, one function per URI scheme.

Every program that imports MLflow loads this module before MLflow's import is complete, so this module imports nothing
from MLflow at its top level.
"""

from __future__ import annotations

from typing import Any


def direct(artifact_uri: str, *arguments: Any, **options: Any) -> Any:
    """Return the repository for mlflow-host://<artifacts bucket>/<models bucket>. Clients get presigned URLs."""
    from mlflow_host.server.artifact_repository import DirectTwoBucketRepository

    return DirectTwoBucketRepository(artifact_uri, *arguments, **options)


def proxied(artifact_uri: str, *arguments: Any, **options: Any) -> Any:
    """Return the repository for mlflow-host-proxied://…. All bytes pass through the server."""
    from mlflow_host.server.artifact_repository import TwoBucketRepository

    return TwoBucketRepository(artifact_uri, *arguments, **options)
