"""What there is to remove, and what is kept and why, as the database tells. Reads only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote, urlsplit

from mlflow_host.garbage.references import References, Version, references
from mlflow_host.schema import record
from mlflow_host.schema.cluster import Cluster, connection, rows

DELETED_VERSION = "Deleted_Internal"
"""The stage MLflow gives a version that was deleted, in place of removing its row."""

RUN, MODEL, EXPERIMENT = "run", "logged model", "experiment"

SERVED = "mlflow-artifacts"
"""Scheme of what lies at the server's own artifacts destination."""


@dataclass(frozen=True)
class Item:
    """A run, a logged model or an experiment that its users deleted."""

    kind: str
    """RUN, MODEL or EXPERIMENT."""
    id: str
    name: str
    experiment: str
    deleted: datetime
    paths: tuple[str, ...] = ()
    """Below the artifacts destination, in both buckets."""
    kept: str = ""
    """Why it stays; "" for what may go."""

    def __str__(self) -> str:
        return f"{self.kind} {self.id}" + (f" ({self.name})" if self.name else "")


@dataclass(frozen=True)
class Places:
    """The buckets whose objects are this server's to remove."""

    buckets: frozenset[str]

    def path(self, location: str) -> str | None:
        """Where below the artifacts destination a location is; None for one that is not this server's."""
        found = urlsplit(location)
        path = unquote(found.path).strip("/")
        ours = (found.scheme == SERVED and not found.netloc) or (found.scheme == "s3" and found.netloc in self.buckets)
        return path if ours and path and ".." not in path.split("/") else None


@dataclass(frozen=True)
class Found:
    """What is known of one database at one moment."""

    references: References
    places: Places
    cutoff: datetime
    """What was deleted after it is within the grace period."""

    @property
    def cutoff_ms(self) -> int:
        return int(self.cutoff.timestamp() * 1000)


def plan(opened: Any, found: Found) -> list[Item]:
    """Runs first, then logged models, then experiments: the order to remove them in."""
    items = [*runs(opened, found), *models(opened, found)]
    going = {(item.kind, item.id) for item in items if not item.kept}
    return [*items, *experiments(opened, found, going=going)]


def look(opened: Any, places: Places, cutoff: datetime, waiting: Iterable[Version] = ()) -> Found:
    """What registered versions stand on now; `waiting` are versions of kept databases."""
    sources = dict(rows(opened, "SELECT model_id, source_run_id FROM logged_models"))
    return Found(references([*versions(opened), *waiting], sources), places, cutoff)


def versions(opened: Any) -> list[Version]:
    """All but the deleted ones."""
    query = """
        SELECT v.name, v.version, v.source, v.storage_location, v.run_id, v.run_link,
               ARRAY(SELECT t.value FROM model_version_tags t WHERE t.name = v.name AND t.version = v.version)
        FROM model_versions v WHERE v.current_stage IS DISTINCT FROM %s"""
    return [
        Version(name, int(number), tuple(text for text in (*texts, *tags) if text))
        for name, number, *texts, tags in rows(opened, query, (DELETED_VERSION,))
    ]


def waiting_versions(cluster: Cluster) -> list[Version]:
    """Those of kept databases whose content is to come back with a later upgrade."""
    with connection(cluster, cluster.database) as opened:
        owner = record.read(opened, cluster.database)
        present = {name for (name,) in rows(opened, "SELECT datname FROM pg_database")}
    found: list[Version] = []
    for entry in owner.waiting if owner else ():
        if entry.database in present:
            with connection(cluster, entry.database) as opened:
                found += versions(opened)
    return found


_RUNS = """
SELECT run_uuid, coalesce(name, ''), experiment_id, artifact_uri, deleted_time FROM runs
WHERE lifecycle_stage = 'deleted' AND deleted_time <= %s"""


def runs(opened: Any, found: Found, only: str | None = None) -> list[Item]:
    """Deleted before the cutoff; `only` the run of that ID, locked."""
    return [
        judged(RUN, id, name, experiment, location, at, found, found.references.runs)
        for id, name, experiment, location, at in _those(opened, _RUNS, "run_uuid", found, only)
    ]


_MODELS = """
SELECT model_id, name, experiment_id, artifact_location, last_updated_timestamp_ms FROM logged_models
WHERE lifecycle_stage = 'deleted' AND last_updated_timestamp_ms <= %s"""


def models(opened: Any, found: Found, only: str | None = None) -> list[Item]:
    return [
        judged(MODEL, id, name, experiment, location, at, found, found.references.models)
        for id, name, experiment, location, at in _those(opened, _MODELS, "model_id", found, only)
    ]


_EXPERIMENTS = """
SELECT experiment_id, name, artifact_location, last_update_time FROM experiments
WHERE lifecycle_stage = 'deleted' AND last_update_time <= %s AND experiment_id <> 0"""


def _those(opened: Any, query: str, key: str, found: Found, only: str | None) -> list[tuple[Any, ...]]:
    if only is None:
        return rows(opened, f"{query} ORDER BY 1", (found.cutoff_ms,))
    return rows(opened, f"{query} AND {key} = %s FOR UPDATE", (found.cutoff_ms, only))


def judged(
    kind: str, id: str, name: str, experiment: Any, location: str, at: int, found: Found, named: Mapping[str, str]
) -> Item:
    """A run or logged model, with the reason to keep it."""
    path = found.places.path(location or "")
    version = named.get(id) or (path and found.references.of_path(path))
    if version:
        kept = f"{version} stands on it"
    elif path is None:
        kept = f"its artifacts are at {location}, which is not this server's to remove"
    elif id not in path.split("/"):
        kept = f"its artifacts are at {location}, which it may share with others"
    else:
        kept = ""
    return Item(kind, id, name, str(experiment), moment(at), (path,) if path else (), kept)


def experiments(
    opened: Any, found: Found, only: str | None = None, going: Iterable[tuple[str, str]] = ()
) -> list[Item]:
    those = _those(opened, _EXPERIMENTS, "experiment_id", found, only)
    return [experiment(opened, found, row, set(going)) for row in those]


def experiment(opened: Any, found: Found, row: tuple[Any, ...], gone: set[tuple[str, str]]) -> Item:
    """An experiment goes once nothing in it stays; what is in `gone` is removed before it. Logged models that
    were not deleted one by one were deleted with it, and so were its traces."""
    id, name, location, at = row
    left = [run for (run,) in rows(opened, "SELECT run_uuid FROM runs WHERE experiment_id = %s", (id,))]
    query = "SELECT model_id, artifact_location, lifecycle_stage, last_updated_timestamp_ms FROM logged_models"
    held = [
        model for model in rows(opened, f"{query} WHERE experiment_id = %s", (id,)) if (MODEL, model[0]) not in gone
    ]
    younger = [model for model, _, stage, touched in held if stage == "deleted" or touched > at]
    with_it = [judged(MODEL, model, "", id, where, at, found, found.references.models) for model, where, *_ in held]
    traces, alien = trace_paths(opened, found.places, id, location or "")
    paths = (*(path for model in with_it for path in model.paths), *traces)
    reasons = [
        *(f"run {run} in it stays" for run in left if (RUN, run) not in gone),
        *(f"logged model {model} in it stays" for model in younger),
        *(f"logged model {model.id} in it stays: {model.kept}" for model in with_it if model.kept),
        *(f"traces in it are at {where}, which is not this server's to remove" for where in alien),
        *(f"{version} stands on {path} in it" for path in paths if (version := found.references.of_path(path))),
    ]
    return Item(EXPERIMENT, str(id), name, str(id), moment(at), paths, reasons[0] if reasons else "")


def trace_paths(opened: Any, places: Places, experiment: int, location: str) -> tuple[list[str], list[str]]:
    """Where an experiment's traces keep files, and locations of such that are not this server's."""
    others = (
        "SELECT 1 FROM experiments WHERE experiment_id <> %s AND (artifact_location = %s OR artifact_location LIKE %s)"
    )
    alone = not rows(opened, others, (experiment, location, f"{location}/%"))
    if places.path(location) == str(experiment) and alone:
        return [f"{experiment}/traces"], []
    query = """
        SELECT t.request_id, g.value FROM trace_info t JOIN trace_tags g ON g.request_id = t.request_id
        WHERE t.experiment_id = %s AND g.key = 'mlflow.artifactLocation'"""
    named = [(trace, where, places.path(where)) for trace, where in rows(opened, query, (experiment,))]
    found = [path for trace, _, path in named if path and trace in path.split("/")]
    return found, [where for trace, where, path in named if not path or trace not in path.split("/")]


def moment(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
