"""Fill a database and an artifacts folder with deleted runs, models and experiments.

Model versions use some of the deleted items. `seed_deleted_items.py <database URI> <folder>` runs with the Python of an
MLflow release, and prints the name and the ID of each item.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Registry
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as Tracking

SOURCES: dict[str, Callable[[str, str], dict[str, str]]] = {
    "by-run-id": lambda run, at: {"source": "/somewhere", "run_id": run},
    "by-runs-uri": lambda run, at: {"source": f"runs:/{run}/model"},
    "by-proxy-uri": lambda run, at: {"source": f"mlflow-artifacts:/{at}/model"},
    "by-proxy-uri-with-host": lambda run, at: {"source": f"mlflow-artifacts://example.com:443/{at}/model"},
    "by-bucket": lambda run, at: {"source": f"s3://artifacts/{at}/model"},
    "by-address": lambda run, at: {"source": f"https://example.com/api/2.0/mlflow-artifacts/artifacts/{at}/model"},
    "by-link": lambda run, at: {"source": "/somewhere", "run_link": f"https://example.com/#/runs/{run}"},
}
"""All ways in which a model version can name its run, as keyword arguments of `create_model_version`."""


def main(uri: str, folder: Path) -> None:
    mlflow.set_tracking_uri(uri)
    tracking: Any = Tracking(uri, "mlflow-artifacts:/")
    registry: Any = Registry(uri)
    ids: dict[str, str] = {}

    def run(name: str, experiment: str) -> str:
        info = tracking.create_run(experiment, "user", 0, [], name).info
        ids[name] = info.run_id
        put(info.artifact_uri, "model/MLmodel")
        return str(info.run_id)

    def model(name: str, experiment: str, source_run: str | None = None) -> str:
        made = tracking.create_logged_model(experiment, name, source_run)
        ids[name] = made.model_id
        put(made.artifact_location, "MLmodel")
        return str(made.model_id)

    def put(location: str, name: str) -> None:
        path = folder / location.removeprefix("mlflow-artifacts:/").removeprefix("s3://artifacts/") / name
        if location.startswith(("mlflow-artifacts:", "s3://artifacts/")):
            path.parent.mkdir(parents=True)
            path.write_text(name)

    def version(name: str, **how: Any) -> None:
        registry.create_registered_model(name)
        registry.create_model_version(name, **how)

    live = tracking.create_experiment("live")
    for name in ("active", "young", "plain", "late", "back", "broken", "unregistered", "of-model", *SOURCES):
        run(name, live)
    # The artifacts of the run "broken" cannot be removed, because the artifact repository rejects symbolic links.
    place = folder / live / ids["broken"] / "artifacts"
    place.rename(folder / "behind-a-link")
    place.symlink_to(folder / "behind-a-link")
    for name, how in SOURCES.items():
        version(name, **how(ids[name], f"{live}/{ids[name]}/artifacts"))
    version("unregistered", source=f"runs:/{ids['unregistered']}/model", run_id=ids["unregistered"])
    registry.delete_model_version("unregistered", "1")
    registry.create_registered_model("late")

    model("model-active", live)
    model("model-young", live)
    model("model-plain", live)
    model("model-of-plain", live, ids["plain"])
    model("model-of-runs-uri", live, ids["by-runs-uri"])
    registered = model("model-registered", live, ids["of-model"])
    version("of-model", source=f"models:/{registered}")

    gone = tracking.create_experiment("gone")
    run("in-gone", gone)
    model("model-in-gone", gone)
    put(f"mlflow-artifacts:/{gone}/traces/tr-1/artifacts", "traces.json")
    half = tracking.create_experiment("half")
    run("half-registered", half)
    run("half-plain", half)
    version("half", source=f"runs:/{ids['half-registered']}/model")
    elsewhere = tracking.create_experiment("elsewhere", artifact_location="s3://somebody-elses/place")
    run("in-elsewhere", elsewhere)
    own = tracking.create_experiment("own", artifact_location="s3://artifacts/own/place")
    run("in-own", own)

    for name in ids:
        if not name.startswith("model-") and name not in ("active", "in-gone", "half-registered", "half-plain"):
            tracking.delete_run(ids[name])
        elif name.startswith("model-") and name not in ("model-active", "model-in-gone", "model-of-plain"):
            tracking.delete_logged_model(ids[name])
    for experiment in (gone, half):
        tracking.delete_experiment(experiment)
    print(json.dumps({**ids, "live": live, "gone": gone, "half": half, "elsewhere": elsewhere, "own": own}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
