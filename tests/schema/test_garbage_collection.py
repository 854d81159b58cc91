"""In each release, garbage collection removes items that were deleted long ago, but no item that a model version
uses."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from mlflow_host.postgres.cluster import connection, create_empty, rows, run
from tests.schema.environments import environment, releases
from tests.schema.private_cluster import PrivateCluster
from tests.schema.rds_like import to_argument, uri
from tests.support.services import HOST_PACKAGE

HERE = Path(__file__).parent
INSTALLED = version("mlflow")
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in releases() if name != INSTALLED]

GOES = {"plain", "unregistered", "model-plain", "in-gone", "model-in-gone", "gone", "half-plain", "in-own"}
STAYS_FOR_A_VERSION = {
    *("by-run-id", "by-runs-uri", "by-proxy-uri", "by-proxy-uri-with-host", "by-bucket", "by-address", "by-link"),
    *("of-model", "model-registered", "model-of-runs-uri", "half-registered"),
}
IS_NOT_DELETED = {"active", "model-active", "model-of-plain", "live", "elsewhere", "own"}


@pytest.mark.parametrize("server", ["machine", pytest.param("rds", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("release", [INSTALLED, *OTHERS])
def test_nothing_that_a_model_version_uses_is_removed(server: PrivateCluster, tmp_path: Path, release: str) -> None:
    python = Path(sys.executable) if release == INSTALLED else environment(release)
    artifacts, reports = tmp_path / "artifacts", tmp_path / "reports"
    reports.mkdir()
    create_empty(server.cluster, "mlflow")
    ids = ask(python, "seed_deleted_items.py", uri(server.cluster), str(artifacts))
    with connection(server.cluster, "mlflow") as opened:
        make_old(opened, ids, days=31)

    def collect(**given: Any) -> dict[str, Any]:
        places = {"cluster": to_argument(server.cluster), "artifacts": str(artifacts), "reports": str(reports)}
        asked = {**places, "grace_days": 30, "delete": True, "meanwhile": [], **given}
        found: dict[str, Any] = ask(python, "run_collect.py", json.dumps(asked))
        return found

    before = everything(server, artifacts)
    planned = collect(delete=False)
    assert everything(server, artifacts) == before and not list(reports.iterdir())
    assert names(ids, planned["removed"]) == GOES - {"model-in-gone"} | {"late", "back", "broken"}
    assert names(ids, planned["kept"]) == STAYS_FOR_A_VERSION | {"half", "in-elsewhere"}

    done = collect(
        meanwhile=[
            f"UPDATE runs SET lifecycle_stage = 'active', deleted_time = NULL WHERE run_uuid = '{ids['back']}'",
            "INSERT INTO model_versions (name, version, creation_time, current_stage, source) "
            f"VALUES ('late', 1, 9999999999999, 'None', 'runs:/{ids['late']}/model')",
        ]
    )
    assert names(ids, done["removed"]) == GOES - {"model-in-gone"}
    assert names(ids, done["kept"]) == STAYS_FOR_A_VERSION | {"half", "in-elsewhere", "late", "back"}
    assert names(ids, done["failed"]) == {"broken"}, "its artifacts cannot be removed, so its row stays"
    assert done["dump"].endswith(".dump")

    left = {name for name, id in ids.items() if id in everything(server, artifacts)[0]}
    assert left == set(ids) - GOES
    assert IS_NOT_DELETED | STAYS_FOR_A_VERSION | {"young", "model-young"} <= left
    files = everything(server, artifacts)[1]
    for name in set(ids) - {"live", "gone", "half", "elsewhere", "own", "in-elsewhere", "broken"}:
        assert any(ids[name] in file for file in files) == (name not in GOES), name
    assert not any(file.startswith(f"{ids['gone']}/") for file in files)

    assert json.loads((reports / "garbage.json").read_text()) == done
    (text,) = reports.glob("*-garbage.txt")
    assert "by-link version 1 uses it" in text.read_text()


def make_old(opened: Any, ids: dict[str, str], days: int) -> None:
    """Make all deletion times `days` earlier, except those of the run and the model named "young"."""
    young = [ids["young"], ids["model-young"]]
    earlier = days * 24 * 3600 * 1000
    run(opened, "UPDATE runs SET deleted_time = deleted_time - %s WHERE NOT run_uuid = ANY(%s)", (earlier, young))
    run(opened, "UPDATE experiments SET last_update_time = last_update_time - %s", (earlier,))
    touched = "UPDATE logged_models SET last_updated_timestamp_ms = last_updated_timestamp_ms - %s"
    run(opened, f"{touched} WHERE NOT model_id = ANY(%s)", (earlier, young))


def everything(server: PrivateCluster, artifacts: Path) -> tuple[set[str], set[str]]:
    """Return the IDs of all items in the database, and the paths of all artifact files."""
    with connection(server.cluster, "mlflow") as opened:
        tables = (("runs", "run_uuid"), ("logged_models", "model_id"), ("experiments", "experiment_id::text"))
        found = {id for table, key in tables for (id,) in rows(opened, f"SELECT {key} FROM {table}")}
    return found, {str(path.relative_to(artifacts)) for path in artifacts.rglob("*") if path.is_file()}


def names(ids: dict[str, str], items: list[dict[str, Any]]) -> set[str]:
    known = {id: name for name, id in ids.items()}
    return {known[item["id"]] for item in items}


def ask(python: Path, script: str, *arguments: str) -> Any:
    """Run a script of this folder, and return the JSON in the last line of its output."""
    done = subprocess.run(
        [str(python), "-W", "ignore", str(HERE / script), *arguments],
        capture_output=True,
        text=True,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": f"{HOST_PACKAGE}:{HERE.parents[1]}",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
