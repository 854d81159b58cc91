"""Limit the artifact locations that this process opens to the stack's own two buckets.

A user can write any location into MLflow's tables: as an experiment's `artifact_location`, a model version's `source`
or a trace's tag. MLflow opens any location that a row names, with the server's credentials, so a writer could read the
backups bucket or write files onto the machine. Two checks stop that:

- `close` replaces every repository class in MLflow's registry of schemes, by which MLflow opens all locations. It
  covers existing rows and every route.
- `refuse_at_creation` returns 400 for a request that would store such a location.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from mlflow_host.server.request_limits import fields_of

RESOLVED_BY_MLFLOW = {"mlflow-artifacts", "runs", "models"}
"""Schemes that MLflow resolves to another location, which is then checked. They must not name a host."""

CREATES = {"/mlflow/experiments/create": "artifact_location", "/mlflow/model-versions/create": "source"}
"""End of the path of each route that stores a location, and the field with the location."""


@dataclass(frozen=True)
class Fence:
    """The allowed locations: below the artifacts destination, and in its two buckets."""

    destination: str
    buckets: frozenset[str]

    @classmethod
    def around(cls, destination: str) -> Fence:
        """`destination` as in `artifact_repository`: mlflow-host://<artifacts bucket>/<models bucket>[/prefix]"""
        uri = urlsplit(destination)
        return cls(destination.rstrip("/"), frozenset({uri.netloc, uri.path.lstrip("/").partition("/")[0]}))

    def problem(self, location: str) -> str | None:
        """One sentence why a location is not allowed; None if it is."""
        try:
            uri = urlsplit(location)
        except ValueError:
            return f"the artifact location {location!r} is not a URI"
        if uri.scheme in RESOLVED_BY_MLFLOW and not uri.netloc:
            return None
        if uri.scheme == "s3" and uri.netloc in self.buckets:
            return None
        if location == self.destination or location.startswith(f"{self.destination}/"):
            return None
        return (
            f"the artifact location {location!r} is outside this server: leave it out, or use mlflow-artifacts:/, "
            f"runs:/, models:/ or {' or '.join(f's3://{bucket}/' for bucket in sorted(self.buckets))}"
        )


def close(fence: Fence) -> None:
    """Check every artifact location before MLflow opens it in this process."""
    from mlflow.store.artifact.artifact_repository_registry import get_registered_artifact_repositories

    registered: dict[str, Any] = get_registered_artifact_repositories()
    for scheme, repository in list(registered.items()):
        registered[scheme] = checked(repository, fence)


def checked(repository: Callable[..., Any], fence: Fence) -> Callable[..., Any]:
    """`repository` with a check that raises MlflowException (400) for a location that is not allowed."""
    from mlflow.exceptions import MlflowException

    def opened(artifact_uri: str, *arguments: Any, **options: Any) -> Any:
        if problem := fence.problem(artifact_uri):
            raise MlflowException.invalid_parameter_value(problem)
        return repository(artifact_uri, *arguments, **options)

    return opened


def refuse_at_creation(flask_application: Any, fence: Fence) -> None:
    """Make MLflow's Flask application return 400 to requests that would store a location that is not allowed."""
    import flask

    @flask_application.before_request  # type: ignore[untyped-decorator]
    def refuse() -> Any:
        field = next((field for path, field in CREATES.items() if flask.request.path.endswith(path)), None)
        if field is None or flask.request.method != "POST":
            return None
        for name, location in fields_of(flask.request, flask.request.get_json(force=True, silent=True)):
            if name != field or not isinstance(location, str) or is_a_placeholder(location):
                continue  # MLflow refuses values of the wrong type
            if problem := fence.problem(location):
                answer = {"error_code": "INVALID_PARAMETER_VALUE", "message": problem}
                return flask.Response(json.dumps(answer), status=400, mimetype="application/json")
        return None


def is_a_placeholder(location: str) -> bool:
    """Whether the text is a word instead of a location: MLflow stores such words for prompts, which have no
    artifacts."""
    return location.replace("-", "").isalnum()
