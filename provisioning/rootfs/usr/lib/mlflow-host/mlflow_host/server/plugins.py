"""Entry points for MLflow: the artifact repository of each URI scheme of artifacts destinations.

Every program that imports MLflow loads this module while MLflow is only partly imported, so it imports nothing.
"""

from __future__ import annotations

from typing import Any


def direct(artifact_uri: str, *arguments: Any, **options: Any) -> Any:
    """mlflow-host://<artifacts bucket>/<models bucket>: clients get presigned URLs."""
    from mlflow_host.server.artifact_repository import DirectTwoBucketRepository

    return DirectTwoBucketRepository(artifact_uri, *arguments, **options)


def proxied(artifact_uri: str, *arguments: Any, **options: Any) -> Any:
    """mlflow-host-proxied://…: all bytes pass through the server."""
    from mlflow_host.server.artifact_repository import TwoBucketRepository

    return TwoBucketRepository(artifact_uri, *arguments, **options)
