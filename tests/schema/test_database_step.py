"""The database step is fast if the schema is unchanged, explains each refusal with a clear error, and writes a dump
before any change."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlflow_host.bake import empty_database
from mlflow_host.boot import database
from mlflow_host.machine.status import StepFailed
from mlflow_host.postgres import dump_file, flip, ownership
from mlflow_host.postgres.cluster import (
    Cluster,
    command,
    connection,
    copy_database,
    create_empty,
    databases,
    drop,
    password_file,
    rows,
    run,
    value,
)
from mlflow_host.schema import change, state
from tests.schema import run_step
from tests.schema.environments import image, releases
from tests.schema.journey import Journey
from tests.schema.private_cluster import PrivateCluster, private_cluster
from tests.schema.rds_like import cluster_at, to_argument
from tests.support.moto_server import moto_server

OLDER, NEWER = releases()[-3], releases()[-2]
ROOT = Path(__file__).parents[2]

FILL = "INSERT INTO experiment_tags SELECT 'key ' || n, repeat(md5(n::text), 90), 0 FROM generate_series(1, 9000) AS n"

At = Callable[[str, str], state.ChangeSettings]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Yield the address of moto's S3 server, which stands in for S3 and keeps uploads in memory."""
    with moto_server() as address:
        yield address


@pytest.fixture(scope="module")
def bucket(s3: str) -> Iterator[dump_file.Bucket]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        made = dump_file.Bucket("backups-of-the-tests", "eu-central-1", s3)
        dump_file.s3_client(made).create_bucket(
            Bucket=made.name, CreateBucketConfiguration={"LocationConstraint": made.region}
        )
        yield made


KILLED = "test_killed_step_leaves_the_database_in_service_and_the_next_step_finishes"
ON_RDS = (
    KILLED,
    "test_step_without_a_change_takes_less_than_a_second_of_processor_time",
    "test_step_waits_for_a_killed_postgresql_and_runs_again",
    "test_first_database_is_loaded_from_the_baked_dump_and_equals_one_built_by_mlflow",
    "test_leftover_databases_and_pending_reports_are_removed",
)
"""`make test` runs these tests on both kinds of clusters, and `make test-schema` runs the others."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = metafunc.function.__name__
    if "made" in metafunc.fixturenames:
        on_rds = pytest.param("rds", marks=() if name in ON_RDS else pytest.mark.slow)
        # On the machine's own cluster, tests/chaos/test_killed_database_step.py kills the step.
        places = [on_rds] if name == KILLED else ["machine", on_rds]
        metafunc.parametrize("made", places, indirect=True, scope="module")


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateCluster]:
    """Yield a cluster with one empty database per MLflow release. The release number is the name of the database."""
    with cluster_at(request.param) as owned:
        for version in (OLDER, NEWER):
            settings = state.ChangeSettings(owned.cluster, image(version), tmp_path_factory.mktemp("made"), dump=None)
            database.bring(settings, print)
            command(owned.cluster, "ALTER DATABASE {} RENAME TO {}", owned.cluster.database, version)
        yield owned


@pytest.fixture
def at(made: PrivateCluster, tmp_path: Path) -> Iterator[At]:
    """Yield a function at(version, by). It puts a database of the MLflow release `version` in service, and returns the
    settings for the database step of an image with the release `by`."""
    cluster = made.cluster

    def put_in_service(version: str, by: str) -> state.ChangeSettings:
        copy_database(cluster, version, cluster.database)
        with connection(cluster) as opened:
            found = ownership.read(opened, version)
            assert found
            ownership.write(opened, cluster.database, found)
        return state.ChangeSettings(cluster, image(by), tmp_path, dump=None)

    yield put_in_service
    for name in databases(cluster):
        if name.startswith(cluster.database):
            drop(cluster, name)


def test_step_without_a_change_takes_less_than_a_second_and_does_not_run_mlflow(at: At) -> None:
    settings = at(NEWER, NEWER)
    started = time.monotonic()
    said = database.bring(replace(settings, image=replace(settings.image, python=Path("/nowhere/python"))), print)
    assert time.monotonic() - started < 1
    assert said.startswith("the database is at this image's schema")


def test_step_without_a_change_takes_less_than_a_second_of_processor_time(at: At) -> None:
    """The test measures processor time instead of elapsed time, because other tests run in parallel."""
    import resource

    settings = at(NEWER, NEWER)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    path = ":".join(str(ROOT / folder) for folder in (".", "provisioning/rootfs/usr/lib/mlflow-host"))
    where = (to_argument(settings.cluster), str(settings.reports), NEWER)
    subprocess.run([sys.executable, str(run_step.__file__), *where], env={"PYTHONPATH": path}, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_database_without_mlflow_migrations_is_refused_and_unchanged(at: At) -> None:
    settings = at(NEWER, NEWER)
    cluster = settings.cluster
    create_empty(cluster, cluster.database)
    with connection(cluster, cluster.database) as opened:
        run(opened, "CREATE TABLE accounts (id integer)")
    with pytest.raises(StepFailed, match=r"holds tables but none of MLflow's migrations.*rename it"):
        database.bring(settings, print)
    with connection(cluster, cluster.database) as opened:
        assert value(opened, "SELECT count(*) FROM accounts") == 0


def test_unknown_migration_without_ownership_record_is_refused_with_a_remedy(at: At) -> None:
    settings = at(NEWER, NEWER)
    cluster = settings.cluster
    create_empty(cluster, cluster.database)
    with connection(cluster, cluster.database) as opened:
        run(
            opened,
            "CREATE TABLE alembic_version (version_num text); INSERT INTO alembic_version VALUES ('beefbeefbeef')",
        )
    with pytest.raises(StepFailed, match=r"migration beefbeefbeef, which MLflow .* does not have.*pin an image"):
        database.bring(settings, print)


def test_upgrade_takes_a_dump_first_and_the_dump_restores(at: At, bucket: dump_file.Bucket) -> None:
    settings = at(OLDER, NEWER)
    cluster = settings.cluster
    with connection(cluster, cluster.database) as opened:
        run(
            opened,
            FILL,
        )
    settings = replace(settings, dump=dump_file.dumper_to(cluster, bucket))
    database.bring(settings, print)
    report = json.loads(max(settings.reports.glob("*upgrade.json")).read_text())
    key = report["dump"].removeprefix(f"s3://{bucket.name}/")
    content = io.BytesIO()
    client = dump_file.s3_client(bucket)
    client.download_fileobj(bucket.name, key, content)
    assert client.head_object(Bucket=bucket.name, Key=key)["Metadata"]["head"] == image(OLDER).head
    assert content.tell() > 1000
    create_empty(cluster, "mlflow_restored")
    content.seek(0)
    dump_file.load(cluster, "mlflow_restored", content)
    for query in ("SELECT count(*), sum(length(value)) FROM experiment_tags", "SELECT * FROM alembic_version"):
        assert _answer(cluster, "mlflow_restored", query) == _answer(cluster, report["kept_database"], query)


def test_a_dump_is_restored_with_the_rights_of_its_owner() -> None:
    """The statements of a dump run unchanged, so a RESET ROLE in a dump must not get the rights of a superuser."""
    with private_cluster() as made:
        cluster = made.cluster
        create_empty(cluster, "mlflow_planted")
        create_empty(cluster, "mlflow_target")
        with connection(cluster, "mlflow_planted") as opened:
            run(
                opened,
                "CREATE FUNCTION became() RETURNS text LANGUAGE sql AS $$ SELECT session_user || ' ' || "
                "(SELECT rolsuper FROM pg_roles WHERE rolname = session_user) $$;"
                "CREATE TABLE planted AS SELECT became() AS role; CREATE MATERIALIZED VIEW who AS SELECT became()",
            )
        command_line = dump_file.dump_command(cluster, "mlflow_planted")
        content = io.BytesIO(subprocess.run(command_line, check=True, capture_output=True).stdout)
        dump_file.load(cluster, "mlflow_target", content)
        assert _answer(cluster, "mlflow_target", "SELECT became FROM who") == [("mlflow false",)]


def test_failed_dump_fails_the_step_and_leaves_no_object_in_the_bucket(at: At, bucket: dump_file.Bucket) -> None:
    settings = at(OLDER, NEWER)
    cluster = settings.cluster
    absent = dump_file.dumper_to(cluster, bucket)
    before = _objects(bucket)
    broken = replace(settings, dump=lambda _, key, metadata: absent("absent", key, metadata))
    with pytest.raises(StepFailed, match=r"the dump before the schema change failed: .*\"absent\" does not exist"):
        database.bring(broken, print)
    assert _objects(bucket) == before
    gone = replace(settings, dump=dump_file.dumper_to(cluster, replace(bucket, name="no-such-bucket")))
    with pytest.raises(
        StepFailed, match=r"s3://no-such-bucket/dumps/.* could not be written.*check the backups bucket"
    ):
        database.bring(gone, print)
    assert state.read_state(cluster).head == image(OLDER).head
    assert [name for name in databases(cluster) if name.startswith("mlflow")] == ["mlflow"]


def test_full_volume_is_reported_and_nothing_is_changed(at: At, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = at(OLDER, NEWER)
    monkeypatch.setattr(flip, "disk_space", lambda cluster: (100 << 20, 20 << 30))
    with pytest.raises(
        StepFailed, match=r"0\.1 GiB free, a copy of the database needs .*(dataVolume|databaseStorage)Gib"
    ):
        database.bring(settings, print)
    assert state.read_state(settings.cluster).head == image(OLDER).head


def test_kept_database_renamed_into_service_by_hand_accepts_writes_again(at: At) -> None:
    settings = at(NEWER, NEWER)
    command(settings.cluster, "ALTER DATABASE {} SET default_transaction_read_only = on", settings.cluster.database)
    database.bring(settings, print)
    with connection(settings.cluster, settings.cluster.database) as opened:
        assert run(opened, "DELETE FROM experiments") == 1


def test_step_waits_for_a_killed_postgresql_and_runs_again(at: At, made: PrivateCluster) -> None:
    settings = at(OLDER, NEWER)
    said: list[str] = []

    def say(message: str) -> None:
        said.append(message)
        if message.startswith("migrating") and not any(line.startswith("waiting") for line in said):
            made.kill()
            threading.Timer(1, made.start).start()

    assert database.bring_with_retries(settings, say).startswith("upgrade from")
    assert any(line.startswith("waiting for PostgreSQL: the connection to PostgreSQL was lost") for line in said)
    assert said.count(f"migrating the copy to {image(NEWER).head}") == 2
    assert state.read_state(settings.cluster).head == image(NEWER).head


def test_killed_step_leaves_the_database_in_service_and_the_next_step_finishes(at: At) -> None:
    settings = at(OLDER, NEWER)
    path = ":".join(str(ROOT / folder) for folder in (".", "provisioning/rootfs/usr/lib/mlflow-host"))
    where = (to_argument(settings.cluster), str(settings.reports), NEWER)
    process = subprocess.Popen(
        [sys.executable, str(run_step.__file__), *where],
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process as step:
        assert step.stdout and any(line.startswith("migrating") for line in step.stdout)
        os.killpg(step.pid, signal.SIGKILL)
    assert "mlflow_host_work_successor" in databases(settings.cluster)
    assert state.read_state(settings.cluster).head == image(OLDER).head
    assert database.bring(settings, print).startswith("upgrade from")
    (kept,) = [name for _, name in flip.kept_databases(settings.cluster)]
    report = json.loads(max(settings.reports.glob("*upgrade.json")).read_text())
    assert (report["kept_database"], report["to_head"]) == (kept, image(NEWER).head)


def test_idle_in_transaction_timeout_of_the_cluster_does_not_end_the_step(at: At, made: PrivateCluster) -> None:
    """While other sessions copy rows, the sessions with the locks and the snapshot are idle longer than the timeout."""
    settings, cluster = at(NEWER, OLDER), made.superuser
    command(cluster, "ALTER SYSTEM SET idle_in_transaction_session_timeout = '2s'")
    with connection(cluster) as opened:
        run(opened, "SELECT pg_reload_conf()")
    try:
        assert database.bring(settings, print).startswith("carry back from")
    finally:
        command(cluster, "ALTER SYSTEM RESET idle_in_transaction_session_timeout")
        with connection(cluster) as opened:
            run(opened, "SELECT pg_reload_conf()")


def test_second_step_is_refused_while_one_runs(at: At) -> None:
    settings = at(OLDER, NEWER)
    with (
        database.step_lock(settings.cluster),
        pytest.raises(StepFailed, match="another database step has been running"),
        database.step_lock(settings.cluster, seconds=1),
    ):
        raise AssertionError("two steps ran at a time")


def test_leftover_databases_and_pending_reports_are_removed(at: At) -> None:
    settings = at(NEWER, NEWER)
    command(settings.cluster, "CREATE DATABASE {}", "mlflow_host_work_successor")
    (settings.reports / "x.json.pending").write_text('{"kept_database": "never"}')
    database.bring(settings, print)
    assert not [name for name in databases(settings.cluster) if "work" in name]
    assert not list(settings.reports.glob("*.pending"))


@pytest.fixture(scope="module")
def empty(made: PrivateCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the dump of an empty database, as the bake of an image with the older release writes it."""
    file = tmp_path_factory.mktemp("bake") / "blank.dump"
    cluster = replace(made.superuser, database="blank")
    assert empty_database.make(cluster, image(OLDER), file) == image(OLDER).head
    yield file
    drop(made.cluster, "blank")


def test_first_database_is_loaded_from_the_baked_dump_and_equals_one_built_by_mlflow(
    made: PrivateCluster, at: At, empty: Path, tmp_path: Path
) -> None:
    cluster, began = made.cluster, time.time() * 1000
    nowhere = replace(image(OLDER), python=Path("/nowhere/python"))
    assert "create" in database.bring(state.ChangeSettings(cluster, nowhere, tmp_path, None, empty), print)
    assert _schema(cluster, cluster.database) == _schema(cluster, OLDER)
    query = "SELECT experiment_id, name, artifact_location, lifecycle_stage FROM experiments"
    assert _answer(cluster, cluster.database, query) == _answer(cluster, OLDER, query)
    ((created,),) = _answer(cluster, cluster.database, "SELECT creation_time FROM experiments")
    assert created >= int(began)


def test_rollback_carries_into_the_baked_empty_database(at: At, empty: Path) -> None:
    settings = replace(at(NEWER, OLDER), blank=empty)
    cluster = settings.cluster
    query = "SELECT count(*), max(value) FROM experiment_tags"
    with connection(cluster, cluster.database) as opened:
        run(opened, FILL)
    before = _answer(cluster, cluster.database, query)
    assert "carry back" in database.bring(settings, print)
    assert _schema(cluster, cluster.database) == _schema(cluster, OLDER)
    assert _answer(cluster, cluster.database, query) == before != [(0, None)]


def test_baked_dump_with_another_migration_head_is_refused(at: At, empty: Path) -> None:
    settings = replace(at(NEWER, OLDER), blank=empty)
    drop(settings.cluster, settings.cluster.database)
    wrong = replace(settings, image=replace(settings.image, head="0123456789ab"))
    with pytest.raises(StepFailed, match=r"image\.json names migration head 0123456789ab, but .* bake the image again"):
        database.bring(wrong, print)


@pytest.mark.slow
@pytest.mark.parametrize("beside", [0, change.BESIDE], ids=["large", "small"])
def test_chained_rollbacks_are_merged_back_one_by_one(
    on_the_way: Journey, beside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stops are newest, middle, oldest, middle, oldest and newest release, and each release writes data. A large
    kept database is prepared for the merge in parallel with the migration."""
    monkeypatch.setattr(change, "BESIDE", beside)
    oldest, middle, newest = releases()[1], releases()[4], releases()[-2]
    for version in (newest, middle, oldest, middle, oldest, newest):
        assert on_the_way.stop(image(version)) == []
    with connection(on_the_way.cluster) as opened:
        found = ownership.read(opened, on_the_way.cluster.database)
    assert found and found.waiting == () and found.mlflow_version == newest


def _schema(cluster: Cluster, name: str) -> list[str]:
    """Return pg_dump's schema with owners, without casts, because PostgreSQL rewrites casts of lists at a restore."""
    with password_file(cluster) as login:
        command = [cluster.program("pg_dump"), "--schema-only", *cluster.client_arguments(name, login.path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, pass_fds=login.descriptors)
    lines = [re.sub(r"::(text|character varying)|\[\]|[()]", "", line) for line in done.stdout.splitlines()]
    # The lines `\restrict` and `\unrestrict` contain a key that pg_dump generates for each dump.
    return [line for line in lines if not line.startswith(("\\restrict", "\\unrestrict"))]


def _objects(bucket: dump_file.Bucket) -> list[str]:
    listed = dump_file.s3_client(bucket).list_objects_v2(Bucket=bucket.name)
    return [entry["Key"] for entry in listed.get("Contents", [])]


def _answer(cluster: Cluster, name: str, query: str) -> list[tuple[Any, ...]]:
    with connection(cluster, name) as opened:
        return rows(opened, query)
