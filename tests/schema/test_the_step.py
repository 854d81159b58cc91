"""The step as the boot runs it: quick with nothing to do, clear where it must refuse, a dump before any change."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow_host import database
from mlflow_host.schema import dumping, flipping, record
from mlflow_host.schema.cluster import Cluster, command, connection, create_empty, databases, rows, run, value
from mlflow_host.status import StepFailed
from moto.server import ThreadedMotoServer
from schema import step
from schema.environments import image, releases
from schema.journey import Journey
from schema.private_cluster import PrivateCluster

OLDER, NEWER = releases()[-3], releases()[-2]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """moto's S3: a stand-in for a bucket that speaks the API; what is uploaded is kept in memory."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> dumping.Bucket:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    made = dumping.Bucket("backups-of-the-tests", "eu-central-1", s3)
    dumping.client(made).create_bucket(Bucket=made.name, CreateBucketConfiguration={"LocationConstraint": made.region})
    return made


def test_a_database_at_this_schema_takes_less_than_a_second_and_no_mlflow(on_the_way: Journey) -> None:
    on_the_way.stop(image(NEWER), write=False)
    started = time.monotonic()
    said = database.bring(on_the_way.settings(replace(image(NEWER), python=Path("/nowhere/bin/python"))), print)
    assert time.monotonic() - started < 1
    assert said.startswith("the database is at this image's schema")


def test_the_whole_step_at_this_schema_takes_less_than_a_second_of_this_machine(
    on_the_way: Journey, tmp_path: Path
) -> None:
    """Processor time, as other tests share the machine."""
    import resource

    on_the_way.stop(image(NEWER), write=False)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    path = ":".join(str(ROOT / folder) for folder in ("tests", "provisioning/rootfs/usr/lib/mlflow-host"))
    where = (on_the_way.cluster.host, on_the_way.cluster.user, str(tmp_path), NEWER)
    subprocess.run([sys.executable, str(step.__file__), *where], env={"PYTHONPATH": path}, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_a_database_of_someone_else_is_refused_and_left_alone(server: PrivateCluster, tmp_path: Path) -> None:
    cluster = server.cluster
    create_empty(cluster, cluster.database)
    with connection(cluster, cluster.database) as opened:
        run(opened, "CREATE TABLE accounts (id integer)")
    with pytest.raises(StepFailed, match=r"holds tables but none of MLflow's migrations.*move it aside"):
        database.bring(database.Settings(cluster, image(NEWER), tmp_path, dump=None), print)
    with connection(cluster, cluster.database) as opened:
        assert value(opened, "SELECT count(*) FROM accounts") == 0


def test_a_schema_nobody_recorded_is_refused_with_the_way_out(server: PrivateCluster, tmp_path: Path) -> None:
    cluster = server.cluster
    create_empty(cluster, cluster.database)
    with connection(cluster, cluster.database) as opened:
        run(
            opened,
            "CREATE TABLE alembic_version (version_num text); INSERT INTO alembic_version VALUES ('beefbeefbeef')",
        )
    settings = database.Settings(cluster, image(NEWER), tmp_path, dump=None)
    with pytest.raises(StepFailed, match=r"migration beefbeefbeef, which MLflow .* does not know.*pin an image"):
        database.bring(settings, print)


def test_a_dump_comes_first_and_restores(on_the_way: Journey, bucket: dumping.Bucket) -> None:
    assert on_the_way.stop(image(OLDER)) == []
    settings = replace(on_the_way.settings(image(NEWER)), dump=dumping.into(on_the_way.cluster, bucket))
    database.bring(settings, print)
    report = json.loads(max(settings.reports.glob("*upgrade.json")).read_text())
    key = report["dump"].removeprefix(f"s3://{bucket.name}/")
    content = io.BytesIO()
    client = dumping.client(bucket)
    client.download_fileobj(bucket.name, key, content)
    assert client.head_object(Bucket=bucket.name, Key=key)["Metadata"]["head"] == image(OLDER).head
    create_empty(on_the_way.cluster, "restored")
    place = ["--host", on_the_way.cluster.host, "--username", on_the_way.cluster.user, "--dbname=restored"]
    subprocess.run([on_the_way.cluster.program("pg_restore"), *place], input=content.getvalue(), check=True)
    for query in ("SELECT count(*) FROM metrics", "SELECT version_num FROM alembic_version"):
        kept = report["kept_database"]
        assert _answer(on_the_way.cluster, "restored", query) == _answer(on_the_way.cluster, kept, query)


def test_a_dump_that_breaks_off_is_never_completed_and_ends_the_step(
    on_the_way: Journey, bucket: dumping.Bucket
) -> None:
    on_the_way.stop(image(OLDER), write=False)
    absent = dumping.into(replace(on_the_way.cluster, database="absent"), bucket)
    settings = on_the_way.settings(image(NEWER))
    broken = replace(settings, dump=lambda _, key, metadata: absent("absent", key, metadata))
    with pytest.raises(StepFailed, match=r"the dump that comes before any change .*\"absent\" does not exist"):
        database.bring(broken, print)
    listed = dumping.client(bucket).list_objects_v2(Bucket=bucket.name)
    assert not [entry for entry in listed.get("Contents", []) if entry["Size"] == 0]
    gone = replace(settings, dump=dumping.into(on_the_way.cluster, replace(bucket, name="no-such-bucket")))
    with pytest.raises(
        StepFailed, match=r"s3://no-such-bucket/dumps/.* could not be written.*check the backups bucket"
    ):
        database.bring(gone, print)
    assert database.look(on_the_way.cluster).head == image(OLDER).head
    assert [name for name in databases(on_the_way.cluster) if name.startswith("mlflow")] == ["mlflow"]


def test_a_full_volume_is_a_sentence_and_nothing_is_touched(
    on_the_way: Journey, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_way.stop(image(OLDER), write=False)
    monkeypatch.setattr(flipping, "room", lambda cluster: (100 << 20, 20 << 30))
    with pytest.raises(StepFailed, match=r"0\.1 GiB free, a copy of the database needs .*dataVolumeGib"):
        database.bring(on_the_way.settings(image(NEWER)), print)
    assert database.look(on_the_way.cluster).head == image(OLDER).head


def test_a_half_dropped_database_and_a_report_that_never_came_true_are_cleared(on_the_way: Journey) -> None:
    on_the_way.stop(image(NEWER), write=False)
    command(on_the_way.cluster, "CREATE DATABASE {}", "mlflow_host_work_successor")
    settings = on_the_way.settings(image(NEWER))
    (settings.reports / "x.json.pending").write_text('{"kept_database": "never"}')
    database.bring(settings, print)
    assert not [name for name in databases(on_the_way.cluster) if "work" in name]
    assert not list(settings.reports.glob("*.pending"))


@pytest.mark.slow
def test_a_chain_of_rollbacks_comes_back_link_by_link(on_the_way: Journey) -> None:
    """Newest, back twice, forward to the middle, back again, forward to the newest: writes at every stop."""
    oldest, middle, newest = releases()[1], releases()[4], releases()[-2]
    for version in (newest, middle, oldest, middle, oldest, newest):
        assert on_the_way.stop(image(version)) == []
    with connection(on_the_way.cluster) as opened:
        found = record.read(opened, on_the_way.cluster.database)
    assert found and found.waiting == () and found.mlflow_version == newest


def _answer(cluster: Cluster, name: str, query: str) -> list[tuple[object, ...]]:
    with connection(cluster, name) as opened:
        return rows(opened, query)
