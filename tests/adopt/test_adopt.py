"""adopt.py copies databases of other servers with every object, value and artifact."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlflow_host.postgres.cluster import create_empty
from scripts.adopting import verdict
from scripts.drilling.worker_client import WorkerClient
from tests.adopt import old_client
from tests.adopt.conftest import Adopt
from tests.adopt.stack import Stack

pytestmark = pytest.mark.service
NEWEST = Path(sys.executable)


@dataclass(frozen=True)
class Filled:
    """A database filled by old_client.py. `run` is the ID of a run with artifacts."""

    source: str
    run: str
    folder: Path


def fill(python: Path, uri: str, place: str) -> dict[str, str]:
    command = [str(python), "-W", "ignore", old_client.__file__, uri, place]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with every kind of object that the newest release writes, and a folder with the artifacts."""
    folder = tmp_path_factory.mktemp("everything")
    worker = WorkerClient(NEWEST, str(folder / "artifacts"))
    try:
        worker.write(f"sqlite:///{folder}/mlflow.db", "one")
        worker.write(f"sqlite:///{folder}/mlflow.db", "two")
    finally:
        worker.end()
    return folder / "mlflow.db"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    folder = tmp_path_factory.mktemp("small")
    made = fill(NEWEST, f"sqlite:///{folder}/mlflow.db", f"file://{folder}/artifacts")
    return Filled(str(folder / "mlflow.db"), made["run"], folder)


@pytest.fixture
def reported(adopt: Adopt, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run adopt.py and return its exit status and its report."""

    def run(*arguments: Any) -> tuple[int, dict[str, Any]]:
        status = adopt(*arguments, "--json")
        captured = capsys.readouterr()
        report: dict[str, Any] = dict(json.loads(captured.out)) if captured.out else {"said": captured.err}
        for kind in report.get("kinds", ()):
            print(kind["kind"], kind["there"], *kind["lines"], sep="\n  ", file=sys.stderr)
        print(
            *(f"{key}: {text}" for key, text in report.items() if key in ("said", "refused", "left")), file=sys.stderr
        )
        return status, report

    return run


Reported = Callable[..., tuple[int, dict[str, Any]]]


def counted(report: dict[str, Any]) -> dict[str, int]:
    return {kind["kind"]: kind["there"] for kind in report["kinds"]}


@pytest.mark.parametrize("machine_cluster", ["machine", pytest.param("rds", marks=pytest.mark.slow)], indirect=True)
def test_sqlite_file_with_everything_is_adopted(stack: Stack, reported: Reported, everything: Path) -> None:
    status, report = reported(everything, "--without-secrets")
    assert (report["lost"], status) == (0, 0)
    assert all(count > 0 for count in counted(report).values())
    readers = [WorkerClient(NEWEST, str(everything.parent)), WorkerClient(NEWEST, "")]
    try:
        before, after = readers[0].read(f"sqlite:///{everything}"), readers[1].read(stack.target.api.url)
    finally:
        for reader in readers:
            reader.end()
    assert before["runs"].keys() == after["runs"].keys()
    compared = 0
    for section in ("runs", "model_versions", "registered_models", "datasets", "scorers", "logged_models"):
        for key, was in before[section].items():
            assert without_places(after[section][key]) == without_places(was), (section, key)
            compared += 1
    for key, was in before["traces"].items():
        assert after["traces"][key]["spans"] == was["spans"], key
        compared += 1
    assert compared > 30


def without_places(thing: Any) -> Any:
    """Return `thing` without artifact locations. Numbers become text and NULL becomes empty text, because a server
    returns these values in another form than a database."""
    if isinstance(thing, dict):
        return {key: without_places(value) for key, value in thing.items() if key != "artifacts"}
    if isinstance(thing, list):
        return [without_places(each) for each in thing]
    if isinstance(thing, str):
        return re.sub(r"(file://|mlflow-artifacts:).*|\w+_STATE_UNSPECIFIED$", "", thing)
    return "" if thing is None else str(thing)


CHANGES_SINCE = """
import sys
from mlflow.tracking import MlflowClient
uri, experiment, run = sys.argv[1:]
client = MlflowClient(uri, uri)
(unfinished,) = client.search_runs(["0"], "status = 'RUNNING'")
client.set_terminated(unfinished.info.run_id, "KILLED", end_time=1_700_000_000_000)
client.create_run("0", tags={"mlflow.user": "eve"})
client.log_metric(run, "late", 7.0)
client.log_metric(run, "loss", 0.001, timestamp=1_600_000_000_120, step=120)
client.set_tag(run, "note", "changed since")
client.log_text(run, "new", "late.txt")
client.delete_run(client.search_runs([experiment], "attributes.status = 'FAILED'")[0].info.run_id)
client.rename_experiment(experiment, "renamed since")
client.delete_model_version("fraud", "1")
client.delete_registered_model_alias("fraud", "champion")
"""


@pytest.mark.slow
def test_second_run_carries_later_changes_and_copies_nothing_twice(
    stack: Stack, reported: Reported, tmp_path: Path
) -> None:
    uri, place = f"sqlite:///{tmp_path}/mlflow.db", f"file://{tmp_path}/artifacts"
    made = fill(NEWEST, uri, place)
    run = made["run"]
    assert reported(tmp_path / "mlflow.db")[0] == 0
    runs = stack.sql("SELECT count(*) FROM runs")
    stack.execute("INSERT INTO tags (key, value, run_uuid) SELECT 'ours', 'since', run_uuid FROM runs LIMIT 1")
    command = [str(NEWEST), "-W", "ignore", "-c", CHANGES_SINCE, uri, made["experiment"], run]
    subprocess.run(command, check=True)
    modified = {each["Key"]: each["LastModified"] for each in objects_of(stack)}
    status, report = reported(tmp_path / "mlflow.db")
    assert (report["lost"], status) == (0, 0)
    assert stack.sql("SELECT count(*) FROM runs") == runs + 1
    assert stack.sql("SELECT end_time FROM runs WHERE status = 'KILLED'") == 1_700_000_000_000
    assert stack.sql("SELECT lifecycle_stage FROM runs WHERE status = 'FAILED'") == "deleted"
    assert stack.sql(f"SELECT count(*) FROM metrics WHERE key = 'loss' AND run_uuid = '{run}'") == 121
    assert stack.sql(f"SELECT value FROM latest_metrics WHERE key = 'loss' AND run_uuid = '{run}'") == 0.001
    assert stack.sql(f"SELECT value FROM tags WHERE key = 'note' AND run_uuid = '{run}'") == "changed since"
    assert stack.sql("SELECT count(*) FROM tags WHERE key = 'ours'") == 1
    assert stack.sql(f"SELECT name FROM experiments WHERE experiment_id = {made['experiment']}") == "renamed since"
    assert stack.sql("SELECT current_stage FROM model_versions WHERE version = 1") == "Deleted_Internal"
    # Rows that were deleted at the source stay in the target, and the report contains their number.
    assert report["gone"] == {"registered_model_aliases": 1}
    assert stack.sql("SELECT count(*) FROM registered_model_aliases") == 1
    kept = sorted((stack.folder / "reports").glob("*-adoption-*.json"))
    assert [json.loads(file.read_text())["kinds"][0]["kind"] for file in kept] == ["experiments"] * 2
    assert {f"report-{file.name}" for file in kept} <= {key.rpartition("/")[2] for key in stack.keys("backups")}
    now = {each["Key"]: each["LastModified"] for each in objects_of(stack)}
    assert {key for key in now if key not in modified} == {f"1/{run}/artifacts/late.txt"}
    assert all(now[key] == at for key, at in modified.items())


@pytest.mark.slow
def test_value_that_changed_on_both_sides_stays_and_is_named(stack: Stack, reported: Reported, tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    run = fill(NEWEST, f"sqlite:///{path}", f"file://{tmp_path}/artifacts")["run"]
    assert reported(path)[0] == 0
    where = f"key = 'note' AND run_uuid = '{run}'"
    stack.execute(f"UPDATE tags SET value = 'ours' WHERE {where}")
    with closing(sqlite3.connect(path)) as opened, opened:
        opened.execute(f"UPDATE tags SET value = 'theirs' WHERE {where}")
    status, report = reported(path)
    assert (report["lost"], status) == (1, 1)
    assert f"run tags {run} / note is 'ours' instead of 'theirs'" in [
        line for kind in report["kinds"] for line in kind["lines"]
    ]
    assert stack.sql(f"SELECT value FROM tags WHERE {where}") == "ours"


@pytest.mark.slow
def test_second_run_recognizes_what_the_first_renamed(stack: Stack, reported: Reported, small: Filled) -> None:
    stack.target.api.post("/api/2.0/mlflow/experiments/create", name="churn ünïcode")
    stack.target.api.post("/api/2.0/mlflow/registered-models/create", name="fraud")
    query = (
        "SELECT (SELECT string_agg(name, ', ' ORDER BY name) FROM experiments) || "
        "(SELECT string_agg(name || version, ', ' ORDER BY name, version) FROM model_versions)"
    )
    assert reported(small.source, "--on-clash", "rename")[0] == 0
    names = stack.sql(query)
    status, report = reported(small.source, "--on-clash", "rename")
    assert (report["lost"], status) == (0, 0)
    assert stack.sql(query) == names and report["gone"] == {}


def objects_of(stack: Stack) -> list[Any]:
    return list(stack.store.client().list_objects_v2(Bucket=stack.target.buckets["artifacts"])["Contents"])


def test_postgresql_with_artifacts_in_s3_is_adopted_into_a_used_server(
    stack: Stack, reported: Reported, objects: Any, tmp_path: Path
) -> None:
    bucket = f"old-{tmp_path.name.lower().replace('_', '-')}"[:60]
    objects.client().create_bucket(Bucket=bucket)
    create_empty(stack.cluster, "old_server")
    made = fill(NEWEST, stack.cluster.uri("old_server").replace("role%3Dmlflow", "role%3Dpostgres"), f"s3://{bucket}/a")
    api = stack.target.api
    api.post("/api/2.0/mlflow/experiments/create", name="ours")
    api.post("/api/2.0/mlflow/experiments/create", name="churn ünïcode")
    own = api.post("/api/2.0/mlflow/runs/create", experiment_id="1", start_time=5)["run"]["info"]["run_id"]
    api.post("/api/2.0/mlflow/registered-models/create", name="fraud")
    before = own_rows(stack, own)
    source = f"postgresql://{stack.cluster.user}@/old_server?host={stack.cluster.host}&port={stack.cluster.port}"
    status, told = reported(source)
    assert status == 1 and {c["name"] for c in told["clashes"]} == {"churn ünïcode", "fraud"}
    assert own_rows(stack, own) == before and stack.sql("SELECT count(*) FROM runs") == 1
    status, report = reported(source, "--on-clash", "rename")
    assert (report["lost"], status) == (0, 0)
    assert own_rows(stack, own) == before
    new = report["experiments"][made["experiment"]]
    assert str(new) != made["experiment"]
    assert stack.sql(f"SELECT experiment_id FROM runs WHERE run_uuid = '{made['run']}'") == new
    assert stack.sql("SELECT count(*) FROM model_versions WHERE name = 'fraud-old-server'") == 2
    assert f"{new}/{made['run']}/artifacts/model/data.bin" in stack.keys("artifacts")
    assert f"{new}/models/{made['model']}/artifacts/MLmodel" in stack.keys("models")
    place = f"mlflow-artifacts:/{new}/{made['run']}/artifacts/model"
    assert stack.sql("SELECT DISTINCT source FROM model_versions WHERE name = 'fraud-old-server'") == place


def own_rows(stack: Stack, run: str) -> Any:
    query = "SELECT string_agg(e::text, ';' ORDER BY experiment_id) FROM experiments e WHERE experiment_id <= 2"
    models = "SELECT m::text FROM registered_models m WHERE name = 'fraud'"
    return stack.sql(query), stack.sql(models), stack.sql(f"SELECT r::text FROM runs r WHERE run_uuid = '{run}'")


@pytest.mark.slow
def test_prefix_avoids_clashes(stack: Stack, reported: Reported, small: Filled) -> None:
    stack.target.api.post("/api/2.0/mlflow/registered-models/create", name="fraud")
    status, report = reported(small.source, "--prefix", "team-a/")
    assert (report["lost"], status) == (0, 0)
    names = {each["name"] for each in stack.target.api.post(SEARCH, max_results=100, view_type="ALL")["experiments"]}
    assert {"Default", "team-a/Default", "team-a/churn ünïcode", "team-a/deleted"} <= names
    assert stack.sql("SELECT count(*) FROM registered_models WHERE name = 'team-a-fraud'") == 1


SEARCH = "/api/2.0/mlflow/experiments/search"


@pytest.mark.slow
def test_skip_leaves_out_conflicting_objects_with_their_content(
    stack: Stack, reported: Reported, small: Filled
) -> None:
    stack.target.api.post("/api/2.0/mlflow/experiments/create", name="churn ünïcode")
    status, report = reported(small.source, "--on-clash", "skip")
    assert (report["lost"], status) == (0, 0)
    assert {entry["table"] for entry in report["skipped"]} >= {"runs", "metrics", "params", "tags"}
    assert (
        stack.sql("SELECT count(*) FROM runs r JOIN experiments e USING (experiment_id) WHERE e.name LIKE 'churn%'")
        == 0
    )


@pytest.mark.slow
def test_dry_run_changes_nothing(stack: Stack, reported: Reported, small: Filled) -> None:
    before = stack.sql("SELECT last_value FROM experiments_experiment_id_seq"), stack.keys("artifacts")
    status, told = reported(small.source, "--dry-run")
    assert status == 0 and told["rows"]["runs"] == 6 and told["artifacts"]["files"] == 4
    assert (stack.sql("SELECT last_value FROM experiments_experiment_id_seq"), stack.keys("artifacts")) == before
    assert stack.sql("SELECT count(*) FROM runs") == 0


@pytest.mark.slow
def test_left_artifacts_keep_their_locations_and_the_needed_rights_are_named(
    stack: Stack, reported: Reported, small: Filled
) -> None:
    status, report = reported(small.source, "--leave-artifacts")
    assert (report["lost"], status) == (0, 0)
    place = stack.sql(f"SELECT artifact_uri FROM runs WHERE run_uuid = '{small.run}'")
    assert place == f"file://{small.folder}/artifacts/one/{small.run}/artifacts"
    assert report["left_places"] and not stack.keys("artifacts") | stack.keys("models")


def damaged(small: Filled, folder: Path) -> Path:
    """Return a copy of the source with values that SQLite accepts but PostgreSQL rejects."""
    path = folder / "damaged.db"
    path.write_bytes(Path(small.source).read_bytes())
    opened = sqlite3.connect(path)
    opened.execute("UPDATE runs SET source_name = ? WHERE run_uuid = ?", ("n" * 600, small.run))
    opened.execute("INSERT INTO params (key, value, run_uuid) VALUES ('orphan', 'x', 'no such run')")
    opened.execute("INSERT INTO tags (key, value, run_uuid) VALUES ('nul', ?, ?)", ("a\0b", small.run))
    opened.execute("UPDATE runs SET end_time = 'yesterday' WHERE run_uuid = ?", (small.run,))
    opened.commit()
    opened.close()
    return path


@pytest.mark.slow
def test_values_that_do_not_fit_are_named_and_stop_it(
    stack: Stack, reported: Reported, small: Filled, tmp_path: Path
) -> None:
    source = damaged(small, tmp_path)
    status, told = reported(source)
    left = {(entry["table"], entry["column"]): (entry["count"], entry["remedy"]) for entry in told["left"]}
    assert status == 1 and left == {
        ("runs", "source_name"): (1, "shortened"),
        ("runs", "end_time"): (1, "emptied"),
        ("params", None): (1, "left behind"),
        ("tags.value", None): (1, "removed"),
    }
    assert stack.sql("SELECT count(*) FROM runs") == 0
    status, _ = reported(source, "--lossy")
    assert status == 1 and stack.sql("SELECT count(*) FROM runs") == 6
    assert stack.sql("SELECT value FROM tags WHERE key = 'nul'") == "ab"


@pytest.mark.slow
def test_verdict_names_objects_lost_after_the_load(
    stack: Stack, reported: Reported, small: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_back = verdict.by_api

    def lose_first(*arguments: Any) -> Any:
        stack.execute(f"DELETE FROM metrics WHERE key = 'loss' AND step = 7 AND run_uuid = '{small.run}'")
        stack.execute(f"UPDATE params SET value = '0.1' WHERE key = 'lr' AND run_uuid = '{small.run}'")
        return read_back(*arguments)

    monkeypatch.setattr(verdict, "by_api", lose_first)
    status, report = reported(small.source)
    lines = [line for kind in report["kinds"] for line in kind["lines"]]
    assert status == 1 and report["lost"] == 2
    assert f"params {small.run} / lr is '0.1' instead of '1e-3'" in lines
    assert any(line.startswith(f"metric points {small.run} / loss / 0.125") for line in lines)


@pytest.mark.slow
def test_missing_artifact_is_a_line_of_the_report(stack: Stack, reported: Reported, tmp_path: Path) -> None:
    made = fill(NEWEST, f"sqlite:///{tmp_path}/mlflow.db", f"file://{tmp_path}/artifacts")
    for path in (tmp_path / "artifacts/one/models" / made["model"]).rglob("MLmodel"):
        path.unlink()
    status, report = reported(tmp_path / "mlflow.db")
    assert status == 0 and made["model"] in report["empty_places"][0]
