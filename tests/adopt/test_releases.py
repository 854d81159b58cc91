"""adopt.py copies every value from databases and folders of older releases, and from other kinds of sources."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlflow_host.postgres.cluster import create_empty
from tests.adopt.mariadb import MariaDB
from tests.adopt.stack import Stack
from tests.adopt.test_adopt import NEWEST, Reported, counted, fill, reported  # noqa: F401
from tests.schema import environments

pytestmark = pytest.mark.service

OLD = {
    "1.30.0": ("sqlalchemy<2", "alembic<2", "pandas<2", "numpy<2", "flask<2.3", "werkzeug<2.3", "setuptools<70"),
    "2.9.2": ("sqlalchemy<2.1", "setuptools<70"),
    "2.22.0": ("sqlalchemy<2.1", "opentelemetry-sdk<1.30"),
    "3.1.0": ("sqlalchemy<2.1", "opentelemetry-sdk<1.30"),
    "3.9.0": ("flask-cors",),
}
"""The packages that each release needs in addition to `environments.STORES_NEED`. With a newer OpenTelemetry, the
clients of 2.22 and 3.1 log a warning and do not end their traces."""


def client_of(release: str) -> Path:
    """Return the Python interpreter of an environment with the client of `release`. The client is installed on first
    use, and again if `OLD` has changed."""
    folder = environments.folder() / f"mlflow-client-{release}"
    python = folder / "bin" / "python"
    named = {each.split("<")[0] for each in OLD[release]}
    packages = [*OLD[release], *(each for each in environments.STORES_NEED if each not in named)]
    packages += [f"mlflow-skinny=={release}", "boto3", "pymysql", "querystring-parser"]
    complete = folder / "complete"
    if not complete.exists() or complete.read_text() != "\n".join(packages):
        shutil.rmtree(folder, ignore_errors=True)
        environments._uv("venv", "--quiet", "--python", f"{sys.version_info[0]}.{sys.version_info[1]}", str(folder))
        environments._uv("pip", "install", "--quiet", "--python", str(python), *packages)
        complete.write_text("\n".join(packages))
    return python


@pytest.mark.slow
@pytest.mark.parametrize("release", OLD)
def test_sqlite_file_of_an_older_release_is_adopted(
    stack: Stack,
    reported: Reported,  # noqa: F811
    tmp_path: Path,
    release: str,
) -> None:
    made = fill(client_of(release), f"sqlite:///{tmp_path}/mlflow.db", f"file://{tmp_path}/artifacts")
    status, report = reported(tmp_path / "mlflow.db")
    assert (report["lost"], status) == (0, 0)
    assert counted(report)["metric points"] == 128 and counted(report)["model versions"] == 12
    assert f"1/{made['run']}/artifacts/model/data.bin" in stack.keys("artifacts")


@pytest.mark.slow
@pytest.mark.parametrize("release", OLD)
def test_postgresql_of_an_older_release_is_adopted_by_url_and_by_dump(
    stack: Stack,
    reported: Reported,  # noqa: F811
    tmp_path: Path,
    release: str,
) -> None:
    create_empty(stack.cluster, "old_release")
    uri = f"postgresql+psycopg2://{stack.cluster.user}@/old_release?host={stack.cluster.host}"
    fill(client_of(release), uri, f"file://{tmp_path}/artifacts")
    dump = tmp_path / "old.dump"
    command = [stack.cluster.program("pg_dump"), "--format=custom", *stack.cluster.client_arguments("old_release")]
    with dump.open("wb") as file:
        subprocess.run(command, check=True, stdout=file)
    status, report = reported(dump, "--name", "old")
    assert (report["lost"], status) == (0, 0)
    rows = stack.sql("SELECT count(*) FROM metrics")
    status, report = reported(uri.replace("+psycopg2", ""), "--name", "old")
    assert (report["lost"], status) == (0, 0)
    assert stack.sql("SELECT count(*) FROM metrics") == rows  # adopt.py recognizes the source by its name


@pytest.mark.slow
@pytest.mark.parametrize("release", [*OLD, "newest"])
def test_mariadb_of_each_release_is_adopted_by_url(
    stack: Stack,
    reported: Reported,  # noqa: F811
    mariadb: MariaDB,
    tmp_path: Path,
    release: str,
) -> None:
    uri = mariadb.database(f"old_{release.replace('.', '_')}")
    fill(NEWEST if release == "newest" else client_of(release), uri, f"file://{tmp_path}/artifacts")
    before = mariadb.checksums(uri)
    status, report = reported(uri.replace("+pymysql", ""))
    assert (report["lost"], status) == (0, 0)
    assert counted(report)["metric points"] == 128 and counted(report)["model versions"] == 12
    assert mariadb.checksums(uri) == before


@pytest.mark.slow
@pytest.mark.parametrize("release", [*OLD, "newest"])
def test_folder_mlruns_is_adopted(
    stack: Stack,
    reported: Reported,  # noqa: F811
    tmp_path: Path,
    release: str,
) -> None:
    made = fill(NEWEST if release == "newest" else client_of(release), f"file://{tmp_path}/mlruns", "")
    status, report = reported(tmp_path / "mlruns")
    assert (report["lost"], status) == (0, 0)
    assert counted(report)["metric points"] == 128
    assert counted(report)["model versions"] == (0 if release == "1.30.0" else 12)  # 1.30's FileStore has no registry
    number = report["experiments"][made["experiment"]]
    assert number < 2**31, "a FileStore's experiment IDs are longer than PostgreSQL's"
    assert f"{number}/{made['run']}/artifacts/notes.txt" in stack.keys("artifacts")
