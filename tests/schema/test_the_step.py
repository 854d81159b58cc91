"""The step as the boot runs it: quick with nothing to do, clear where it must refuse, a dump before any change."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow_host import database
from mlflow_host.schema import blank, dumping, flipping, record
from mlflow_host.schema.cluster import (
    Cluster,
    command,
    connection,
    copy_whole,
    create_empty,
    databases,
    drop,
    rows,
    run,
    value,
)
from mlflow_host.status import StepFailed
from moto.server import ThreadedMotoServer
from schema import step
from schema.environments import image, releases
from schema.journey import Journey
from schema.private_cluster import PrivateCluster, private_cluster

OLDER, NEWER = releases()[-3], releases()[-2]
ROOT = Path(__file__).parents[2]

FILL = "INSERT INTO experiment_tags SELECT 'key ' || n, repeat(md5(n::text), 90), 0 FROM generate_series(1, 9000) AS n"

At = Callable[[str, str], database.Settings]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """moto's S3: a stand-in for a bucket that speaks the API; what is uploaded is kept in memory."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def bucket(s3: str) -> Iterator[dumping.Bucket]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        made = dumping.Bucket("backups-of-the-tests", "eu-central-1", s3)
        dumping.client(made).create_bucket(
            Bucket=made.name, CreateBucketConfiguration={"LocationConstraint": made.region}
        )
        yield made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateCluster]:
    """A cluster with an empty database of each of the two releases, put aside under the release's name."""
    with private_cluster() as owned:
        for version in (OLDER, NEWER):
            settings = database.Settings(owned.cluster, image(version), tmp_path_factory.mktemp("made"), dump=None)
            database.bring(settings, print)
            command(owned.cluster, "ALTER DATABASE {} RENAME TO {}", owned.cluster.database, version)
        yield owned


@pytest.fixture
def at(made: PrivateCluster, tmp_path: Path) -> Iterator[At]:
    """at(version, image's version): a database of that release in service, and the settings of a step by that image."""
    cluster = made.cluster

    def put_in_service(version: str, by: str) -> database.Settings:
        copy_whole(cluster, version, cluster.database)
        with connection(cluster) as opened:
            found = record.read(opened, version)
            assert found
            record.write(opened, cluster.database, found)
        return database.Settings(cluster, image(by), tmp_path, dump=None)

    yield put_in_service
    for name in databases(cluster):
        if name.startswith(cluster.database):
            drop(cluster, name)


def test_a_database_at_this_schema_takes_less_than_a_second_and_no_mlflow(at: At) -> None:
    settings = at(NEWER, NEWER)
    started = time.monotonic()
    said = database.bring(replace(settings, image=replace(settings.image, python=Path("/nowhere/python"))), print)
    assert time.monotonic() - started < 1
    assert said.startswith("the database is at this image's schema")


def test_the_whole_step_at_this_schema_takes_less_than_a_second_of_this_machine(at: At) -> None:
    """Processor time, as other tests share the machine."""
    import resource

    settings = at(NEWER, NEWER)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    path = ":".join(str(ROOT / folder) for folder in ("tests", "provisioning/rootfs/usr/lib/mlflow-host"))
    where = (settings.cluster.host, settings.cluster.user, str(settings.reports), NEWER)
    subprocess.run([sys.executable, str(step.__file__), *where], env={"PYTHONPATH": path}, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_a_database_of_someone_else_is_refused_and_left_alone(at: At) -> None:
    settings = at(NEWER, NEWER)
    cluster = settings.cluster
    create_empty(cluster, cluster.database)
    with connection(cluster, cluster.database) as opened:
        run(opened, "CREATE TABLE accounts (id integer)")
    with pytest.raises(StepFailed, match=r"holds tables but none of MLflow's migrations.*move it aside"):
        database.bring(settings, print)
    with connection(cluster, cluster.database) as opened:
        assert value(opened, "SELECT count(*) FROM accounts") == 0


def test_a_schema_nobody_recorded_is_refused_with_the_way_out(at: At) -> None:
    settings = at(NEWER, NEWER)
    cluster = settings.cluster
    create_empty(cluster, cluster.database)
    with connection(cluster, cluster.database) as opened:
        run(
            opened,
            "CREATE TABLE alembic_version (version_num text); INSERT INTO alembic_version VALUES ('beefbeefbeef')",
        )
    with pytest.raises(StepFailed, match=r"migration beefbeefbeef, which MLflow .* does not know.*pin an image"):
        database.bring(settings, print)


def test_a_dump_comes_first_and_restores(at: At, bucket: dumping.Bucket) -> None:
    settings = at(OLDER, NEWER)
    cluster = settings.cluster
    with connection(cluster, cluster.database) as opened:
        run(
            opened,
            FILL,
        )
    settings = replace(settings, dump=dumping.into(cluster, bucket))
    database.bring(settings, print)
    report = json.loads(max(settings.reports.glob("*upgrade.json")).read_text())
    key = report["dump"].removeprefix(f"s3://{bucket.name}/")
    content = io.BytesIO()
    client = dumping.client(bucket)
    client.download_fileobj(bucket.name, key, content)
    assert client.head_object(Bucket=bucket.name, Key=key)["Metadata"]["head"] == image(OLDER).head
    assert content.tell() > 1000
    create_empty(cluster, "mlflow_restored")
    place = ["--host", cluster.host, "--username", cluster.user, "--dbname=mlflow_restored"]
    subprocess.run([cluster.program("pg_restore"), *place], input=content.getvalue(), check=True)
    for query in ("SELECT count(*), sum(length(value)) FROM experiment_tags", "SELECT * FROM alembic_version"):
        assert _answer(cluster, "mlflow_restored", query) == _answer(cluster, report["kept_database"], query)


def test_a_dump_that_breaks_off_is_never_completed_and_ends_the_step(at: At, bucket: dumping.Bucket) -> None:
    settings = at(OLDER, NEWER)
    cluster = settings.cluster
    absent = dumping.into(cluster, bucket)
    before = _objects(bucket)
    broken = replace(settings, dump=lambda _, key, metadata: absent("absent", key, metadata))
    with pytest.raises(StepFailed, match=r"the dump that comes before any change .*\"absent\" does not exist"):
        database.bring(broken, print)
    assert _objects(bucket) == before
    gone = replace(settings, dump=dumping.into(cluster, replace(bucket, name="no-such-bucket")))
    with pytest.raises(
        StepFailed, match=r"s3://no-such-bucket/dumps/.* could not be written.*check the backups bucket"
    ):
        database.bring(gone, print)
    assert database.look(cluster).head == image(OLDER).head
    assert [name for name in databases(cluster) if name.startswith("mlflow")] == ["mlflow"]


def test_a_full_volume_is_a_sentence_and_nothing_is_touched(at: At, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = at(OLDER, NEWER)
    monkeypatch.setattr(flipping, "room", lambda cluster: (100 << 20, 20 << 30))
    with pytest.raises(StepFailed, match=r"0\.1 GiB free, a copy of the database needs .*dataVolumeGib"):
        database.bring(settings, print)
    assert database.look(settings.cluster).head == image(OLDER).head


def test_a_kept_database_renamed_into_service_by_hand_takes_writes_again(at: At) -> None:
    settings = at(NEWER, NEWER)
    command(settings.cluster, "ALTER DATABASE {} SET default_transaction_read_only = on", settings.cluster.database)
    database.bring(settings, print)
    with connection(settings.cluster, settings.cluster.database) as opened:
        assert run(opened, "DELETE FROM experiments") == 1


def test_postgresql_killed_on_the_way_and_started_again_is_waited_for(at: At, made: PrivateCluster) -> None:
    settings = at(OLDER, NEWER)
    said: list[str] = []

    def say(message: str) -> None:
        said.append(message)
        if message.startswith("migrating") and not any(line.startswith("waiting") for line in said):
            made.kill()
            threading.Timer(1, made.start).start()

    assert database.bring_through_restarts(settings, say).startswith("upgrade from")
    assert any(line.startswith("waiting for PostgreSQL: PostgreSQL broke off") for line in said)
    assert said.count(f"migrating the copy to {image(NEWER).head}") == 2
    assert database.look(settings.cluster).head == image(NEWER).head


def test_a_cluster_that_ends_idle_transactions_does_not_end_the_step(at: At) -> None:
    """The locks and the snapshot are held by sessions that idle while others copy, longer than clients may."""
    settings = at(NEWER, OLDER)
    cluster = settings.cluster
    command(cluster, "ALTER SYSTEM SET idle_in_transaction_session_timeout = '2s'")
    with connection(cluster) as opened:
        run(opened, "SELECT pg_reload_conf()")
    try:
        assert database.bring(settings, print).startswith("carry back from")
    finally:
        command(cluster, "ALTER SYSTEM RESET idle_in_transaction_session_timeout")
        with connection(cluster) as opened:
            run(opened, "SELECT pg_reload_conf()")


def test_one_step_at_a_time(at: At) -> None:
    settings = at(OLDER, NEWER)
    with (
        database.alone(settings.cluster),
        pytest.raises(StepFailed, match="another database step has been running"),
        database.alone(settings.cluster, seconds=1),
    ):
        raise AssertionError("two at a time")


def test_a_half_dropped_database_and_a_report_that_never_came_true_are_cleared(at: At) -> None:
    settings = at(NEWER, NEWER)
    command(settings.cluster, "CREATE DATABASE {}", "mlflow_host_work_successor")
    (settings.reports / "x.json.pending").write_text('{"kept_database": "never"}')
    database.bring(settings, print)
    assert not [name for name in databases(settings.cluster) if "work" in name]
    assert not list(settings.reports.glob("*.pending"))


@pytest.fixture(scope="module")
def empty(made: PrivateCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the bake of an image with the older release writes."""
    file = tmp_path_factory.mktemp("bake") / "blank.dump"
    cluster = replace(made.cluster, database="blank")
    assert blank.make(cluster, image(OLDER), file) == image(OLDER).head
    yield file
    drop(made.cluster, "blank")


def test_a_first_database_comes_from_the_bake_and_is_what_mlflow_builds(
    made: PrivateCluster, at: At, empty: Path, tmp_path: Path
) -> None:
    cluster, began = made.cluster, time.time() * 1000
    nowhere = replace(image(OLDER), python=Path("/nowhere/python"))
    assert "create" in database.bring(database.Settings(cluster, nowhere, tmp_path, None, empty), print)
    assert _schema(cluster, cluster.database) == _schema(cluster, OLDER)
    query = "SELECT experiment_id, name, artifact_location, lifecycle_stage FROM experiments"
    assert _answer(cluster, cluster.database, query) == _answer(cluster, OLDER, query)
    ((created,),) = _answer(cluster, cluster.database, "SELECT creation_time FROM experiments")
    assert created >= int(began)


def test_a_rollback_fills_the_schema_of_the_bake(at: At, empty: Path) -> None:
    settings = replace(at(NEWER, OLDER), blank=empty)
    cluster = settings.cluster
    query = "SELECT count(*), max(value) FROM experiment_tags"
    with connection(cluster, cluster.database) as opened:
        run(opened, FILL)
    before = _answer(cluster, cluster.database, query)
    assert "carry back" in database.bring(settings, print)
    assert _schema(cluster, cluster.database) == _schema(cluster, OLDER)
    assert _answer(cluster, cluster.database, query) == before != [(0, None)]


def test_a_bake_that_built_another_schema_is_refused(at: At, empty: Path) -> None:
    settings = replace(at(NEWER, OLDER), blank=empty)
    drop(settings.cluster, settings.cluster.database)
    wrong = replace(settings, image=replace(settings.image, head="0123456789ab"))
    with pytest.raises(StepFailed, match="the image is not what it says"):
        database.bring(wrong, print)


@pytest.mark.slow
def test_a_chain_of_rollbacks_comes_back_link_by_link(on_the_way: Journey) -> None:
    """Newest, back twice, forward to the middle, back again, forward to the newest: writes at every stop."""
    oldest, middle, newest = releases()[1], releases()[4], releases()[-2]
    for version in (newest, middle, oldest, middle, oldest, newest):
        assert on_the_way.stop(image(version)) == []
    with connection(on_the_way.cluster) as opened:
        found = record.read(opened, on_the_way.cluster.database)
    assert found and found.waiting == () and found.mlflow_version == newest


def _schema(cluster: Cluster, name: str) -> list[str]:
    """As pg_dump words it, owners included, but for casts: PostgreSQL words those of a list anew once it was dumped."""
    command = [cluster.program("pg_dump"), "--schema-only", *cluster.arguments, name]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [re.sub(r"::(text|character varying)|\[\]|[()]", "", line) for line in said.splitlines()]
    # Each dump has a random word of its own in these.
    return [line for line in lines if not line.startswith(("\\restrict", "\\unrestrict"))]


def _objects(bucket: dumping.Bucket) -> list[str]:
    listed = dumping.client(bucket).list_objects_v2(Bucket=bucket.name)
    return [entry["Key"] for entry in listed.get("Contents", [])]


def _answer(cluster: Cluster, name: str, query: str) -> list[tuple[object, ...]]:
    with connection(cluster, name) as opened:
        return rows(opened, query)
