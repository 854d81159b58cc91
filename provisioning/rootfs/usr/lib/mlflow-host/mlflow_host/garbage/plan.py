"""Read the deleted items from the database, and decide which can be removed and which are kept. Changes nothing."""

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
"""The stage of a deleted model version; MLflow keeps its row."""

RUN, MODEL, EXPERIMENT = "run", "logged model", "experiment"

SERVED = "mlflow-artifacts"
"""URI scheme of artifacts at the server's own artifacts destination."""


@dataclass(frozen=True)
class Item:
    """A run, a logged model or an experiment that a user deleted."""

    kind: str
    """RUN, MODEL or EXPERIMENT."""
    id: str
    name: str
    experiment: str
    deleted: datetime
    paths: tuple[str, ...] = ()
    """Its paths below the artifacts destination, in both buckets."""
    kept: str = ""
    """Why it is kept; "" if it can be removed."""

    def __str__(self) -> str:
        return f"{self.kind} {self.id}" + (f" ({self.name})" if self.name else "")


@dataclass(frozen=True)
class OwnBuckets:
    """The buckets from which this server may remove objects."""

    buckets: frozenset[str]

    def path(self, location: str) -> str | None:
        """The path of a location below the artifacts destination; None for a location outside this server's buckets."""
        uri = urlsplit(location)
        path = unquote(uri.path).strip("/")
        ours = (uri.scheme == SERVED and not uri.netloc) or (uri.scheme == "s3" and uri.netloc in self.buckets)
        return path if ours and path and ".." not in path.split("/") else None


@dataclass(frozen=True)
class Criteria:
    """The criteria by which a deleted item can be removed."""

    references: References
    buckets: OwnBuckets
    cutoff: datetime
    """Items deleted after this time are within the grace period."""

    @property
    def cutoff_ms(self) -> int:
        return int(self.cutoff.timestamp() * 1000)


def plan(opened: Any, criteria: Criteria) -> list[Item]:
    """The deleted items in the order of removal: runs, then logged models, then experiments."""
    items = [*runs(opened, criteria), *models(opened, criteria)]
    going = {(item.kind, item.id) for item in items if not item.kept}
    return [*items, *experiments(opened, criteria, going=going)]


def read_criteria(opened: Any, buckets: OwnBuckets, cutoff: datetime, waiting: Iterable[ModelVersion] = ()) -> Criteria:
    """Read which items model versions use now; `waiting` are the versions in kept databases."""
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
    """The model versions in kept databases that hold the only copy of something."""
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
    """Runs deleted before the cutoff. With the run ID `only`, at most that run, and its row is locked."""
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
    """The item of a run or logged model, with the reason to keep it, if any."""
    path = criteria.buckets.path(location or "")
    version = named.get(id) or (path and criteria.references.of_path(path))
    if version:
        kept = f"{version} uses it"
    elif path is None:
        kept = f"its artifacts are at {location}, which is not in the stack's buckets"
    elif id not in path.split("/"):
        kept = f"its artifacts are at {location}, which other items may use too"
    else:
        kept = ""
    return Item(kind, id, name, str(experiment), moment(at), (path,) if path else (), kept)


def experiments(
    opened: Any, criteria: Criteria, only: str | None = None, going: Iterable[tuple[str, str]] = ()
) -> list[Item]:
    those = _those(opened, _EXPERIMENTS, "experiment_id", criteria, only)
    return [experiment(opened, criteria, row, set(going)) for row in those]


def experiment(opened: Any, criteria: Criteria, row: tuple[Any, ...], gone: set[tuple[str, str]]) -> Item:
    """The item of an experiment. It can be removed when everything in it is removed: items in `gone` are removed first;
    logged models and traces that were deleted with the experiment are removed with it."""
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
    """(paths of the files of an experiment's traces, locations of such files outside the stack's buckets)."""
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
