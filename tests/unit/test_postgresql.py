"""The cluster that an image makes on a new volume, and the one that it refuses to touch. Real PostgreSQL."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow_host import launch, postgresql, sizing, web
from mlflow_host.status import Step, StepFailed

ROOTFS = Path(__file__).parents[2] / "provisioning" / "rootfs"
PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/nonexistent"))
MAJOR = int(PROGRAMS.parent.name) if PROGRAMS.parent.name.isdigit() else 0

pytestmark = pytest.mark.skipif(not MAJOR, reason="PostgreSQL is not installed (scripts/prepare.sh does)")


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder that PostgreSQL's user may use: initdb refuses root, and pytest's folders are closed to others."""
    with tempfile.TemporaryDirectory(prefix="mlflow-postgresql-") as name:
        Path(name).chmod(0o755)
        clusters = Path(name, "clusters")
        clusters.mkdir(mode=0o700)
        for folder in ("status", "web"):
            Path(name, folder).mkdir()
        if os.getuid() == 0:
            for path in Path(name).iterdir():
                shutil.chown(path, "postgres")
        yield Path(name)


def as_postgres(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        user="postgres" if os.getuid() == 0 else None,
        cwd="/",
        env={"PYTHONPATH": str(ROOTFS / "usr/lib/mlflow-host"), "PATH": os.environ["PATH"]},
    )


@pytest.fixture(scope="module")
def cluster(home: Path) -> Path:
    code = (
        "import sys; from pathlib import Path\n"
        "from mlflow_host import postgresql; from mlflow_host.status import Step\n"
        "home, major, programs = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])\n"
        "print(postgresql.prepare(home / 'clusters', major, programs, Step('postgresql', home)))"
    )
    # The interpreter's own folder may be closed to postgres (/root), so the system's is used.
    done = as_postgres("/usr/bin/python3", "-c", code, home, str(MAJOR), PROGRAMS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(home / "clusters" / str(MAJOR))
    return home / "clusters" / str(MAJOR)


def rendered(machine: sizing.Machine) -> str:
    return web.render(
        "postgresql.conf.j2",
        ROOTFS / "usr/share/mlflow-host/templates",
        sizing=sizing.size(machine),
        postgres=launch.Postgres(),
        archives=False,
    )


def moved(text: str, home: Path) -> str:
    """The settings with our files where they are in this checkout, readable by PostgreSQL's user."""
    for name in ("pg_hba.conf", "pg_ident.conf"):
        shutil.copy(ROOTFS / "usr/share/mlflow-host" / name, home / name)
    return text.replace("/usr/share/mlflow-host/", f"{home}/").replace("/run/postgresql", f"{home}/status")


def test_cluster_is_whole_before_it_has_its_name(cluster: Path, home: Path) -> None:
    assert (cluster / "PG_VERSION").read_text().strip() == str(MAJOR)
    assert [path.name for path in (home / "clusters").iterdir()] == [str(MAJOR)]


def test_cluster_has_checksums_and_an_order_that_no_distribution_changes(cluster: Path) -> None:
    control = as_postgres(PROGRAMS / "pg_controldata", cluster).stdout
    assert "Data page checksum version:           1" in control
    answer = single(
        cluster, "SELECT datcollate, datctype, pg_encoding_to_char(encoding), datcollversion FROM pg_database"
    )
    assert answer.count('datcollate = "C.UTF-8"') == 3
    assert answer.count('pg_encoding_to_char = "UTF8"') == 3
    assert "datcollversion =" not in answer.split("----")[1]


def single(cluster: Path, query: str) -> str:
    done = subprocess.run(
        [PROGRAMS / "postgres", "--single", "-D", cluster, "postgres"],
        input=query + "\n",
        capture_output=True,
        text=True,
        user="postgres" if os.getuid() == 0 else None,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_role_of_the_server_logs_in_and_is_nothing_more(cluster: Path) -> None:
    answer = single(
        cluster, "SELECT rolcanlogin, rolsuper, rolcreatedb, rolpassword FROM pg_authid WHERE rolname = 'mlflow'"
    )
    assert 'rolcanlogin = "t"' in answer
    assert 'rolsuper = "f"' in answer
    assert 'rolcreatedb = "f"' in answer
    assert 'rolpassword = "' not in answer


def test_server_runs_with_the_settings_and_knows_people_by_their_os_user(cluster: Path, home: Path) -> None:
    """One real start: what it listens on, and who gets in."""
    text = moved(rendered(sizing.Machine(1024, 1)), home)
    settings_file = home / "postgresql.conf"
    settings_file.write_text(text)
    server = subprocess.Popen(
        [PROGRAMS / "postgres", "-D", cluster, "-c", f"config_file={settings_file}"],
        user="postgres" if os.getuid() == 0 else None,
        cwd="/",
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        said = ""
        while "ready to accept connections" not in said:
            line = server.stderr.readline()
            assert line, said
            said += line
        assert "listening on IP" not in said

        def ask(query: str, role: str = "postgres") -> subprocess.CompletedProcess[str]:
            return as_postgres(PROGRAMS / "psql", "-XAtqh", home / "status", "-U", role, "-c", query, "postgres")

        expected = sizing.size(sizing.Machine(1024, 1))
        shown = {
            "listen_addresses": "",
            "max_connections": str(expected.max_connections),
            "shared_buffers": f"{expected.shared_buffers_mb}MB",
            "synchronous_commit": "on",
            "fsync": "on",
            "data_checksums": "on",
            "log_min_error_statement": "panic",
            "log_min_duration_statement": "-1",
        }
        assert {name: ask(f"SHOW {name}").stdout.strip() for name in shown} == shown
        refused = ask("SELECT 1", role="mlflow")
        assert 'Peer authentication failed for user "mlflow"' in refused.stderr
        assert ask("SELECT count(*) FROM pg_file_settings WHERE error IS NOT NULL").stdout.strip() == "0"
        assert (
            ask("SELECT count(*) FROM pg_hba_file_rules WHERE error IS NOT NULL OR auth_method <> 'peer'").stdout
            == "0\n"
        )
        assert ask("SELECT count(*) FROM pg_hba_file_rules WHERE type <> 'local'").stdout.strip() == "0"
    finally:
        server.terminate()
        server.communicate(timeout=30)


def test_cluster_that_is_there_is_taken_as_it_is(cluster: Path, home: Path) -> None:
    before = (cluster / "global" / "pg_control").read_bytes()
    assert postgresql.prepare(home / "clusters", MAJOR, Path("/nonexistent"), Step("postgresql", home)) == cluster
    assert (cluster / "global" / "pg_control").read_bytes() == before


def test_another_major_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "16").mkdir()
    with pytest.raises(StepFailed) as refused:
        postgresql.prepare(tmp_path, 15, Path("/nonexistent"), Step("postgresql", tmp_path))
    assert str(refused.value) == (
        "the data volume holds a PostgreSQL 16 cluster and this image runs PostgreSQL 15: nothing was changed; "
        "pin an image with PostgreSQL 16, or move by dump and restore: take a dump there with `mlflow-host-dump`, and "
        "set restoreFrom to its name with this image"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["16"]


def test_initdb_that_fails_leaves_no_cluster_behind(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "initdb").write_text("#!/bin/sh\necho 'initdb: error: no space left on device'; exit 1\n")
    (programs / "initdb").chmod(0o755)
    clusters = tmp_path / "clusters"
    clusters.mkdir()
    for folder in ("status", "web"):
        (tmp_path / folder).mkdir()
    with pytest.raises(StepFailed, match="initdb: error: no space left on device"):
        postgresql.prepare(clusters, 15, programs, Step("postgresql", tmp_path))
    assert not (clusters / "15").exists()


@settings(max_examples=8, deadline=None)
@given(st.integers(900, 500_000), st.integers(1, 128))
def test_settings_for_any_machine_are_ones_postgresql_accepts(memory_mb: int, cores: int) -> None:
    with tempfile.TemporaryDirectory(prefix="mlflow-settings-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        file = folder / "postgresql.conf"
        file.write_text(rendered(sizing.Machine(memory_mb, cores)))
        done = as_postgres(PROGRAMS / "postgres", "-D", folder, "-c", f"config_file={file}", "-C", "shared_buffers")
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) * 8 == sizing.size(sizing.Machine(memory_mb, cores)).shared_buffers_mb * 1024


def test_major_of_the_image_is_read_from_its_facts(tmp_path: Path) -> None:
    from mlflow_host import config

    facts = tmp_path / "image.json"
    facts.write_text(json.dumps({"postgresql_major": 17}))
    assert config.postgresql_major(facts) == 17
    assert sys.version_info >= (3, 11)
