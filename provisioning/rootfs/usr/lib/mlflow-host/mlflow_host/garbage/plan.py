"""Read the deleted items from the database, and decide for each item whether it can be removed. Changes no data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote, urlsplit

from mlflow_host.garbage.references import ModelVersion, References, references
from mlflow_host.postgres import ownership
from mlflow_host.postgres.cluster import Cluster, connection, rows

DELETED_VERSION = "Deleted_Internal"
"""The stage of a deleted model version. MLflow keeps the row of a deleted version."""

RUN, MODEL, EXPERIMENT = "run", "logged model", "experiment"

SERVED = "mlflow-artifacts"
"""URI scheme of artifacts that are stored at the server's artifacts destination."""


@dataclass(frozen=True)
class Item:
    """A run, a logged model or an experiment that a user has deleted in MLflow."""

    kind: str
    """RUN, MODEL or EXPERIMENT."""
    id: str
    name: str
    experiment: str
    deleted: datetime
    paths: tuple[str, ...] = ()
    """The paths of the item's artifacts below the artifacts destination. Files with such a path can be in the bucket
    for artifacts and in the bucket for models."""
    kept: str = ""
    """The reason to keep the item, or "" if the item can be removed."""

    def __str__(self) -> str:
        return f"{self.kind} {self.id}" + (f" ({self.name})" if self.name else "")


@dataclass(frozen=True)
class OwnBuckets:
    """The buckets from which this server may remove objects."""

    buckets: frozenset[str]

    def path(self, location: str) -> str | None:
        """The path below the artifacts destination, or None if the location is not in this server's buckets."""
        uri = urlsplit(location)
        path = unquote(uri.path).strip("/")
        ours = (uri.scheme == SERVED and not uri.netloc) or (uri.scheme == "s3" and uri.netloc in self.buckets)
        return path if ours and path and ".." not in path.split("/") else None


@dataclass(frozen=True)
class Criteria:
    """The data that decides whether a deleted item can be removed."""

    references: References
    buckets: OwnBuckets
    cutoff: datetime
    """The start of the grace period. Items that were deleted after this time are not removed."""

    @property
    def cutoff_ms(self) -> int:
        return int(self.cutoff.timestamp() * 1000)


def plan(opened: Any, criteria: Criteria) -> list[Item]:
    """The deleted items in the order in which they are removed: runs, logged models, experiments."""
    items = [*runs(opened, criteria), *models(opened, criteria)]
    going = {(item.kind, item.id) for item in items if not item.kept}
    return [*items, *experiments(opened, criteria, going=going)]


def read_criteria(opened: Any, buckets: OwnBuckets, cutoff: datetime, waiting: Iterable[ModelVersion] = ()) -> Criteria:
    """Read which items the model versions use at present. `waiting` lists the model versions in kept databases."""
    sources = dict(rows(opened, "SELECT model_id, source_run_id FROM logged_models"))
    return Criteria(references([*versions(opened), *waiting], sources), buckets, cutoff)


def versions(opened: Any) -> list[ModelVersion]:
    """All model versions that are not deleted."""
    query = """
        SELECT v.name, v.version, v.source, v.storage_location, v.run_id, v.run_link,
               ARRAY(SELECT t.value FROM model_version_tags t WHERE t.name = v.name AND t.version = v.version)
        FROM model_versions v WHERE v.current_stage IS DISTINCT FROM %s"""
    return [
        ModelVersion(name, int(number), tuple(text for text in (*texts, *tags) if text))
        for name, number, *texts, tags in rows(opened, query, (DELETED_VERSION,))
    ]


def waiting_versions(cluster: Cluster) -> list[ModelVersion]:
    """The model versions in the kept databases. A kept database without data for a later upgrade is not read."""
    with connection(cluster, cluster.database) as opened:
        owner = ownership.read(opened, cluster.database)
        present = {name for (name,) in rows(opened, "SELECT datname FROM pg_database")}
    found: list[ModelVersion] = []
    for name in sorted(owner.needed & present) if owner else ():
        with connection(cluster, name) as opened:
            found += versions(opened)
    return found


_RUNS = """
SELECT run_uuid, coalesce(name, ''), experiment_id, artifact_uri, deleted_time FROM runs
WHERE lifecycle_stage = 'deleted' AND deleted_time <= %s"""


def runs(opened: Any, criteria: Criteria, only: str | None = None) -> list[Item]:
    """The runs that were deleted before the cutoff. If `only` is a run ID, return only this run, and lock its row."""
    return [
        judge(RUN, id, name, experiment, location, at, criteria, criteria.references.runs)
        for id, name, experiment, location, at in _those(opened, _RUNS, "run_uuid", criteria, only)
    ]


_MODELS = """
SELECT model_id, name, experiment_id, artifact_location, last_updated_timestamp_ms FROM logged_models
WHERE lifecycle_stage = 'deleted' AND last_updated_timestamp_ms <= %s"""


def models(opened: Any, criteria: Criteria, only: str | None = None) -> list[Item]:
    return [
        judge(MODEL, id, name, experiment, location, at, criteria, criteria.references.models)
        for id, name, experiment, location, at in _those(opened, _MODELS, "model_id", criteria, only)
    ]


_EXPERIMENTS = """
SELECT experiment_id, name, artifact_location, last_update_time FROM experiments
WHERE lifecycle_stage = 'deleted' AND last_update_time <= %s AND experiment_id <> 0"""


def _those(opened: Any, query: str, key: str, criteria: Criteria, only: str | None) -> list[tuple[Any, ...]]:
    if only is None:
        return rows(opened, f"{query} ORDER BY 1", (criteria.cutoff_ms,))
    return rows(opened, f"{query} AND {key} = %s FOR UPDATE", (criteria.cutoff_ms, only))


def judge(
    kind: str, id: str, name: str, experiment: Any, location: str, at: int, criteria: Criteria, named: Mapping[str, str]
) -> Item:
    """Return the Item of a run or of a logged model. `kept` is the reason to keep the item, or ""."""
    path = criteria.buckets.path(location or "")
    version = named.get(id) or (path and criteria.references.of_path(path))
    if version:
        kept = f"{version} uses it"
    elif path is None:
        kept = f"its artifacts are at {location}, which is not in the stack's buckets"
    elif id not in path.split("/"):
        kept = f"its artifacts are at {location}, a path that other items may also use"
    else:
        kept = ""
    return Item(kind, id, name, str(experiment), moment(at), (path,) if path else (), kept)


def experiments(
    opened: Any, criteria: Criteria, only: str | None = None, going: Iterable[tuple[str, str]] = ()
) -> list[Item]:
    those = _those(opened, _EXPERIMENTS, "experiment_id", criteria, only)
    return [experiment(opened, criteria, row, set(going)) for row in those]


def experiment(opened: Any, criteria: Criteria, row: tuple[Any, ...], gone: set[tuple[str, str]]) -> Item:
    """Return the Item of an experiment. An experiment can be removed only together with its content. The runs and
    logged models in `gone` are removed before the experiment. Traces are removed together with the experiment. A logged
    model is removed together with the experiment if it was deleted together with the experiment."""
    id, name, location, at = row
    left = [run for (run,) in rows(opened, "SELECT run_uuid FROM runs WHERE experiment_id = %s", (id,))]
    query = "SELECT model_id, artifact_location, lifecycle_stage, last_updated_timestamp_ms FROM logged_models"
    held = [
        model for model in rows(opened, f"{query} WHERE experiment_id = %s", (id,)) if (MODEL, model[0]) not in gone
    ]
    younger = [model for model, _, stage, touched in held if stage == "deleted" or touched > at]
    with_it = [
        judge(MODEL, model, "", id, where, at, criteria, criteria.references.models) for model, where, *_ in held
    ]
    traces, alien = trace_paths(opened, criteria.buckets, id, location or "")
    paths = (*(path for model in with_it for path in model.paths), *traces)
    reasons = [
        *(f"its run {run} is kept" for run in left if (RUN, run) not in gone),
        *(f"its logged model {model} is kept" for model in younger),
        *(f"its logged model {model.id} is kept: {model.kept}" for model in with_it if model.kept),
        *(f"it has traces at {where}, which is not in the stack's buckets" for where in alien),
        *(f"{version} uses {path} in it" for path in paths if (version := criteria.references.of_path(path))),
    ]
    return Item(EXPERIMENT, str(id), name, str(id), moment(at), paths, reasons[0] if reasons else "")


def trace_paths(opened: Any, buckets: OwnBuckets, experiment: int, location: str) -> tuple[list[str], list[str]]:
    """Return two lists for the trace files of an experiment: the paths of files in the stack's buckets, and the
    locations of files outside these buckets."""
    others = (
        "SELECT 1 FROM experiments WHERE experiment_id <> %s AND (artifact_location = %s OR artifact_location LIKE %s)"
    )
    alone = not rows(opened, others, (experiment, location, f"{location}/%"))
    if buckets.path(location) == str(experiment) and alone:
        return [f"{experiment}/traces"], []
    query = """
        SELECT t.request_id, g.value FROM trace_info t JOIN trace_tags g ON g.request_id = t.request_id
        WHERE t.experiment_id = %s AND g.key = 'mlflow.artifactLocation'"""
    named = [(trace, where, buckets.path(where)) for trace, where in rows(opened, query, (experiment,))]
    found = [path for trace, _, path in named if path and trace in path.split("/")]
    return found, [where for trace, where, path in named if not path or trace not in path.split("/")]


def moment(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
