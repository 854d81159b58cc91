"""Invented future releases pass the bake's check: the server starts, the role reader gets no access to a new route, and
the check reports the fallbacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.schema.environments import environment, image, releases, server_environment
from tests.schema.journey import Journey
from tests.schema.made_releases import MadeRelease
from tests.schema.test_fallbacks_of_releases import check

HANDLERS = "server/handlers.py"
STORE = "store/tracking/sqlalchemy_store.py"


@pytest.fixture
def release(tmp_path: Path) -> Iterator[MadeRelease]:
    """Yield a copy of the newest MLflow release, with the packages of a server."""
    made = MadeRelease(server_environment(releases()[-1]), tmp_path / "release")
    yield made
    made.remove()


def test_new_and_renamed_routes_are_closed_to_readers(release: MadeRelease) -> None:
    release.append(
        "server/__init__.py",
        "@app.route('/api/4.0/mlflow/dreams/<name>', methods=['GET', 'POST', 'PUT', 'PATCH', 'DELETE', 'BREW'])\n"
        "def _dreams(name):\n    return {}\n",
    )
    release.append(
        "server/fastapi_app.py",
        "app.add_api_route('/ajax-api/4.0/mlflow/sleep', lambda: {}, methods=['GET', 'POST', 'DELETE'])\n",
    )
    release.replace("protos/service_pb2.py", "runs/search", "runs/seekit")  # the message is serialized: keep the length
    _, found = check(release.python)
    (reason,) = found.values()
    for route in (
        *(
            "BREW /api/4.0/mlflow/dreams/<name>",
            "POST /api/4.0/mlflow/dreams/<name>",
            "POST /ajax-api/4.0/mlflow/sleep",
        ),
        *("POST /api/2.0/mlflow/runs/seekit", "POST /ajax-api/2.0/mlflow/runs/seekit"),
    ):
        assert route in reason
    assert list(found) == ["5 routes for readers: only writers and administrators may call them"]


def test_changed_sources_switch_off_the_answers_that_rest_on_them(release: MadeRelease) -> None:
    release.replace(HANDLERS, r"^def _search_runs\(", "@(lambda handler: handler)\ndef _search_runs(")
    release.rename("_log_metrics_once", "_log_metrics_here", STORE)
    _, found = check(release.python)
    assert found.keys() == {
        "the fast path of /runs/search",
        "the fast path of /runs/log-metric",
        "the fast path of /runs/log-batch",
        "the fast path of metrics that handlers of MLflow log",
    }
    assert found["the fast path of /runs/search"].endswith("handlers._search_runs in this release")


def test_changed_model_of_the_database_switches_off_the_whole_fast_path(release: MadeRelease) -> None:
    release.replace("store/tracking/dbmodels/models.py", r"^class SqlRun\(Base\):", "class SqlRun(Base):  # altered")
    _, found = check(release.python)
    assert found == {
        "the fast path of all endpoints": "fast_path/compatibility.py has no hash of models.SqlRun in this release"
    }


def test_new_and_missing_private_variables_and_functions_are_named(release: MadeRelease) -> None:
    release.replace(
        "server/__init__.py",
        r"^( +)env_map\[_MLFLOW_SGI_NAME.name\] = \"uvicorn\"",
        r"\1env_map['_MLFLOW_SERVER_DREAMS'] = 'on'",
    )
    release.rename("_hard_delete_run", "_really_delete_run", STORE)
    release.rename("_launch_job_execution_runner", "_begin_jobs", "server/jobs/utils.py", "server/__init__.py")
    release.rename("artifact_router", "file_router", "server/artifact_router.py", "server/fastapi_app.py")
    (release.package / "server/artifact_router.py").rename(release.package / "server/file_router.py")
    _, found = check(release.python)
    by_feature = {what.split(": ")[0]: why for what, why in found.items()}
    variables = by_feature.pop("settings that `mlflow server` passes to its workers")
    assert "it sets _MLFLOW_SERVER_DREAMS = 'on'" in variables and "it does not set _MLFLOW_SGI_NAME" in variables
    assert by_feature.keys() == {
        "background jobs",
        "streamed artifacts",
        "the weekly removal of deleted items",
    }


def test_merged_heads_and_new_tables_and_columns_are_upgraded_to_and_rolled_back_from(
    on_the_way: Journey, tmp_path: Path
) -> None:
    newest = image(releases()[-1])
    made = MadeRelease(environment(releases()[-1]), tmp_path / "release")
    made.migration("aaaa00000001", newest.head, "op.add_column('runs', sa.Column('mood', sa.String(20)))")
    made.migration(
        "aaaa00000002",
        newest.head,
        "op.add_column('experiments', sa.Column('rank', sa.Integer(), nullable=False, server_default='7'))\n"
        "op.create_table('dreams', sa.Column('id', sa.Integer(), primary_key=True),\n"
        "    sa.Column('run_uuid', sa.String(32), sa.ForeignKey('runs.run_uuid')))",
    )
    made.migration(
        "aaaa00000003",
        ("aaaa00000001", "aaaa00000002"),
        "op.alter_column('params', 'value', type_=sa.Text())\n"
        "op.create_unique_constraint('one_name', 'registered_models', ['workspace', 'name', 'creation_time'])",
    )
    to_come = made.image("3.99.0")
    assert to_come.count == newest.count + 3
    for stop in (newest, to_come, newest, to_come):
        assert on_the_way.stop(stop) == []
    assert on_the_way.stop(newest, write=False) == []
    made.remove()
