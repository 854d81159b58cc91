"""Make this process reject artifact locations outside the stack's artifacts bucket and models bucket.

A user can write any location into MLflow's tables: as an experiment's `artifact_location`, a model version's `source`
or a trace's tag. MLflow opens a stored location with the server's credentials. Without a check, a user could therefore
read the backups bucket or write files to the machine. This module has two checks:

- `check_when_opened` adds a check to every repository class in MLflow's registry. MLflow opens all locations through
  this registry, so the check covers every API route and all locations that are already stored.
- `refuse_at_creation` returns 400 for a request that would store a location outside the two buckets.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from mlflow_host.server.request_limits import fields_of

RESOLVED_BY_MLFLOW = {"mlflow-artifacts", "runs", "models"}
"""URI schemes that MLflow resolves to another location, which `check_when_opened` checks too. A URI with one of these
schemes must not have a host."""

CREATES = {"/mlflow/experiments/create": "artifact_location", "/mlflow/model-versions/create": "source"}
"""The routes that store a location: the end of each route's path, and the field with the location."""


@dataclass(frozen=True)
class AllowedLocations:
    """The allowed locations: all URIs below the artifacts destination, and all s3:// URIs in the two buckets."""

    destination: str
    buckets: frozenset[str]

    @classmethod
    def below(cls, destination: str) -> AllowedLocations:
        """`destination` is mlflow-host://<artifacts bucket>/<models bucket>[/prefix] (see `artifact_repository`)."""
        uri = urlsplit(destination)
        return cls(destination.rstrip("/"), frozenset({uri.netloc, uri.path.lstrip("/").partition("/")[0]}))

    def problem(self, location: str) -> str | None:
        """Return a sentence with the reason if `location` is not allowed, or None if `location` is allowed."""
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
            f"the artifact location {location!r} is outside this server: omit the location, or use mlflow-artifacts:/, "
            f"runs:/, models:/ or {' or '.join(f's3://{bucket}/' for bucket in sorted(self.buckets))}"
        )


def check_when_opened(allowed: AllowedLocations) -> None:
    """Check every artifact location before MLflow opens it in this process."""
    from mlflow.store.artifact.artifact_repository_registry import get_registered_artifact_repositories

    registered: dict[str, Any] = get_registered_artifact_repositories()
    for scheme, repository in list(registered.items()):
        registered[scheme] = checked(repository, allowed)


def checked(repository: Callable[..., Any], allowed: AllowedLocations) -> Callable[..., Any]:
    """Return `repository` with a check that raises MlflowException (400) for a location that is not allowed."""
    from mlflow.exceptions import MlflowException

    def opened(artifact_uri: str, *arguments: Any, **options: Any) -> Any:
        if problem := allowed.problem(artifact_uri):
            raise MlflowException.invalid_parameter_value(problem)
        return repository(artifact_uri, *arguments, **options)

    return opened


def refuse_at_creation(flask_application: Any, allowed: AllowedLocations) -> None:
    """Make MLflow's Flask application return 400 to requests that would store a location that is not allowed."""
    import flask

    @flask_application.before_request  # type: ignore[untyped-decorator]
    def refuse() -> Any:
        field = next((field for path, field in CREATES.items() if flask.request.path.endswith(path)), None)
        if field is None or flask.request.method != "POST":
            return None
        for name, location in fields_of(flask.request, flask.request.get_json(force=True, silent=True)):
            if name != field or not isinstance(location, str) or is_a_placeholder(location):
                continue  # MLflow itself rejects values of the wrong type
            if problem := allowed.problem(location):
                answer = {"error_code": "INVALID_PARAMETER_VALUE", "message": problem}
                return flask.Response(json.dumps(answer), status=400, mimetype="application/json")
        return None


def is_a_placeholder(location: str) -> bool:
    """Return true if `location` is a single word. MLflow stores such a word as the location of a prompt, because a
    prompt has no artifacts."""
    return location.replace("-", "").isalnum()
