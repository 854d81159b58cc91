"""Artifact locations: find the old locations of adopted objects, and replace them with locations on this server.

Runs, logged models and traces get the same location that MLflow on this server would give them. If the source of a
model version is inside a run or logged model, the source moves with the run or logged model. Any other source of a
model version moves to its own folder. `runs:/` and `models:/` addresses are not locations, and stay unchanged.
"""

from __future__ import annotations

import hashlib
import posixpath
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from psycopg2.extras import execute_values

from mlflow_host.postgres.catalog import Catalog
from mlflow_host.postgres.cluster import rows, run

ROOT = "mlflow-artifacts:/"
CARRIED = ("", "file", "s3", "mlflow-artifacts", "http", "https")
"""Schemes of locations from which adopt.py can copy artifacts. Artifacts at other locations are not copied."""
TRACE_TAG = "mlflow.artifactLocation"


@dataclass(frozen=True)
class Place:
    """The old and new location of one object's artifacts. `kind` is "run", "logged model", "trace" or "model version",
    and `key` is the object's ID."""

    kind: str
    key: str
    source: str
    target: str


def find(opened: Any, catalog: Catalog) -> tuple[list[Place], list[str]]:
    """(artifacts to copy, locations whose artifacts cannot be copied because of their scheme)."""
    found = [
        Place("run", run_id, uri, f"{ROOT}{experiment}/{run_id}/artifacts")
        for run_id, uri, experiment in rows(opened, "SELECT run_uuid, artifact_uri, experiment_id FROM runs")
        if uri
    ]
    if "logged_models" in catalog.tables:
        query = "SELECT model_id, artifact_location, experiment_id FROM logged_models"
        found += [
            Place("logged model", model, uri, f"{ROOT}{experiment}/models/{model}/artifacts")
            for model, uri, experiment in rows(opened, query)
            if uri
        ]
    if "trace_tags" in catalog.tables:
        query = (
            "SELECT t.request_id, t.value, i.experiment_id FROM trace_tags t JOIN trace_info i USING (request_id) "
            "WHERE t.key = %s"
        )
        found += [
            Place("trace", trace, uri, f"{ROOT}{experiment}/traces/{trace}/artifacts")
            for trace, uri, experiment in rows(opened, query, (TRACE_TAG,))
            if uri
        ]
    copied = [place for place in found if carried(place.source)]
    targets = {place.source.rstrip("/"): place.target for place in copied}
    seen = {place.source for place in copied}
    for name, version, *places in _versions(opened, catalog):
        for source in places:
            if _names_a_place(source) and carried(source) and source not in seen and _inside(source, targets) is None:
                seen.add(source)
                folder = hashlib.sha256(source.encode()).hexdigest()[:16]
                copied.append(Place("model version", f"{name}/{version}", source, f"{ROOT}adopted/{folder}"))
    others = {place.source for place in found if not carried(place.source)}
    return copied, sorted({f"{urlsplit(source).scheme}://{urlsplit(source).netloc}" for source in others})


def carried(uri: str) -> bool:
    return urlsplit(uri).scheme.lower() in CARRIED


def rewrite(opened: Any, catalog: Catalog, places: list[Place]) -> None:
    """Write the new locations into all rows that contain the old locations."""
    targets = {place.source.rstrip("/"): place.target for place in places}
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for place in places:
        by_kind.setdefault(place.kind, []).append((place.key, place.target))
    _set(opened, "runs", "artifact_uri", "run_uuid", by_kind.get("run", []))
    _set(opened, "logged_models", "artifact_location", "model_id", by_kind.get("logged model", []))
    _set(opened, "trace_tags", "value", "request_id", by_kind.get("trace", []), f"t.key = '{TRACE_TAG}'")
    here = [
        (number, f"{ROOT}{number}")
        for number, uri in rows(opened, "SELECT experiment_id, artifact_location FROM experiments")
        if carried(uri or "")
    ]
    with opened.cursor() as cursor:
        execute_values(
            cursor,
            "UPDATE experiments t SET artifact_location = m.new FROM (VALUES %s) AS m (id, new) "
            "WHERE t.experiment_id = m.id",
            here or [(-1, "")],
        )
    for name, version, *old in _versions(opened, catalog):
        new = [_moved(source, targets) for source in old]
        if new != list(old):
            columns = _version_columns(catalog)
            listed = ", ".join(f"{column} = %s" for column in columns)
            run(
                opened,
                f"UPDATE model_versions SET {listed} WHERE name = %s AND version = %s",
                (*new[: len(columns)], name, version),
            )


def _moved(source: str | None, targets: dict[str, str]) -> str | None:
    if not _names_a_place(source) or source is None:
        return source
    inside = _inside(source, targets)
    return source if inside is None else inside


def _inside(source: str, targets: dict[str, str]) -> str | None:
    """The new location of a path below one of the old locations. If several old locations match, the longest old
    location is used. None if no old location matches."""
    path, rest = source.rstrip("/"), ""
    while path:
        if path in targets:
            return posixpath.join(targets[path], rest) if rest else targets[path]
        path, slash, last = path.rpartition("/")
        if not slash:
            return None
        rest = f"{last}/{rest}" if rest else last
    return None


def _names_a_place(source: str | None) -> bool:
    """Whether the source of a model version is a location. For a version of a prompt, the source has no slash and is
    not a location."""
    return "/" in (source or "") and urlsplit(source or "").scheme not in ("runs", "models")


def _version_columns(catalog: Catalog) -> list[str]:
    return [name for name in ("source", "storage_location") if name in catalog.tables["model_versions"]]


def _versions(opened: Any, catalog: Catalog) -> list[tuple[Any, ...]]:
    """(name, version, source, storage location) of all model versions that are not deleted."""
    columns = ", ".join(_version_columns(catalog))
    return rows(
        opened, f"SELECT name, version, {columns} FROM model_versions WHERE current_stage <> 'Deleted_Internal'"
    )


def _set(opened: Any, table: str, column: str, key: str, pairs: list[tuple[str, str]], condition: str = "true") -> None:
    if pairs:
        with opened.cursor() as cursor:
            execute_values(
                cursor,
                f"UPDATE {table} t SET {column} = m.new FROM (VALUES %s) AS m (id, new) "
                f"WHERE t.{key} = m.id AND {condition}",
                pairs,
                page_size=1000,
            )
