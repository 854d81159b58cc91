"""What MLflow finds through this package's entry points: which class serves which kind of artifacts destination.

Every program that imports MLflow loads this module, while MLflow itself is half imported; so it imports nothing.
"""

from __future__ import annotations

from typing import Any


def direct(artifact_uri: str, *arguments: Any, **options: Any) -> Any:
    """mlflow-host://<artifacts bucket>/<models bucket>: clients are offered presigned addresses."""
    from mlflow_host.artifacts import DirectTwoBucketRepository

    return DirectTwoBucketRepository(artifact_uri, *arguments, **options)


def proxied(artifact_uri: str, *arguments: Any, **options: Any) -> Any:
    """mlflow-host-proxied://…: all bytes pass the server."""
    from mlflow_host.artifacts import TwoBucketRepository

    return TwoBucketRepository(artifact_uri, *arguments, **options)
