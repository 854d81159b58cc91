"""Test the boot step `postgresql` with real PostgreSQL: new clusters, their configuration and access, and refusals."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_host.boot import postgresql
from mlflow_host.contract import launch, sizing
from mlflow_host.machine import nginx
from mlflow_host.machine.status import BootStep, StepFailed

ROOTFS = Path(__file__).parents[2] / "provisioning" / "rootfs"
PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/nonexistent"))
MAJOR = int(PROGRAMS.parent.name) if PROGRAMS.parent.name.isdigit() else 0

pytestmark = [
    pytest.mark.service,
    pytest.mark.skipif(not MAJOR, reason="PostgreSQL is not installed (scripts/prepare.sh installs it)"),
]


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """Yield a folder that the OS user postgres can use. initdb refuses root, and pytest's folders are private."""
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
        "from mlflow_host.boot import postgresql; from mlflow_host.machine.status import BootStep\n"
        "home, major, programs = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])\n"
        "print(postgresql.prepare(home / 'clusters', major, programs, BootStep('postgresql', home)))"
    )
    # The interpreter of this test may be below /root, which the user postgres cannot read, so run /usr/bin/python3.
    done = as_postgres("/usr/bin/python3", "-c", code, home, str(MAJOR), PROGRAMS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(home / "clusters" / str(MAJOR))
    return home / "clusters" / str(MAJOR)


def rendered(machine: sizing.MachineSize) -> str:
    return nginx.render(
        "postgresql.conf.j2",
        ROOTFS / "usr/share/mlflow-host/templates",
        sizing=sizing.size(machine),
        postgres=launch.Postgres(),
        archives=False,
    )


def moved(text: str, home: Path) -> str:
    """Copy this checkout's files to paths that the user postgres can read, and return a configuration with these
    paths."""
    for name in ("pg_hba.conf", "pg_ident.conf"):
        shutil.copy(ROOTFS / "usr/share/mlflow-host" / name, home / name)
    return text.replace("/usr/share/mlflow-host/", f"{home}/").replace("/run/postgresql", f"{home}/status")


def test_only_a_complete_cluster_gets_its_name(cluster: Path, home: Path) -> None:
    assert (cluster / "PG_VERSION").read_text().strip() == str(MAJOR)
    assert [path.name for path in (home / "clusters").iterdir()] == [str(MAJOR)]


def test_cluster_has_checksums_and_a_collation_independent_of_the_distribution(cluster: Path) -> None:
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


def test_role_mlflow_can_log_in_and_has_no_other_privilege(cluster: Path) -> None:
    answer = single(
        cluster, "SELECT rolcanlogin, rolsuper, rolcreatedb, rolpassword FROM pg_authid WHERE rolname = 'mlflow'"
    )
    assert 'rolcanlogin = "t"' in answer
    assert 'rolsuper = "f"' in answer
    assert 'rolcreatedb = "f"' in answer
    assert 'rolpassword = "' not in answer


def test_postgresql_starts_with_the_configuration_and_uses_peer_authentication(cluster: Path, home: Path) -> None:
    """Start the real PostgreSQL once, and check its addresses, settings and access rules."""
    text = moved(rendered(sizing.MachineSize(1024, 1)), home)
    settings_file = home / "postgresql.conf"
    settings_file.write_text(text)
    limit = sizing.size(sizing.MachineSize(1024, 1)).process_limit_mb << 20
    server = subprocess.Popen(
        [PROGRAMS / "postgres", "-D", cluster, "-c", f"config_file={settings_file}"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        user="postgres" if os.getuid() == 0 else None,
        cwd="/",
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        log = ""
        while "ready to accept connections" not in log:
            line = server.stderr.readline()
            assert line, log
            log += line
        assert "listening on IP" not in log

        def ask(query: str, role: str = "postgres") -> subprocess.CompletedProcess[str]:
            return as_postgres(PROGRAMS / "psql", "-XAtqh", home / "status", "-U", role, "-c", query, "postgres")

        expected = sizing.size(sizing.MachineSize(1024, 1))
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
        # A dump is restored in a session of the role mlflow, which cannot change to another role.
        owner = ask("SELECT session_user, (SELECT rolsuper FROM pg_roles WHERE rolname = session_user)", role="mlflow")
        assert owner.stdout == "mlflow|f\n"
        assert "external program" in ask("RESET ROLE; COPY (SELECT 1) TO PROGRAM 'true'", role="mlflow").stderr
        mapped = ask("SELECT sys_name, pg_username FROM pg_ident_file_mappings ORDER BY 1, 2").stdout.split()
        assert mapped == ["mlflow|mlflow", "postgres|mlflow", "postgres|postgres"]
        assert ask("SELECT count(*) FROM pg_file_settings WHERE error IS NOT NULL").stdout.strip() == "0"
        assert (
            ask("SELECT count(*) FROM pg_hba_file_rules WHERE error IS NOT NULL OR auth_method <> 'peer'").stdout
            == "0\n"
        )
        assert ask("SELECT count(*) FROM pg_hba_file_rules WHERE type <> 'local'").stdout.strip() == "0"
        started = ask("SELECT pg_postmaster_start_time()").stdout
        greedy = ask("SELECT length(string_agg(repeat(n::text, 1000), '')) FROM generate_series(1, 100000) n")
        assert "out of memory" in greedy.stderr
        assert ask("SELECT pg_postmaster_start_time()").stdout == started
    finally:
        server.terminate()
        server.communicate(timeout=30)


def test_existing_cluster_is_not_changed(cluster: Path, home: Path) -> None:
    before = (cluster / "global" / "pg_control").read_bytes()
    assert postgresql.prepare(home / "clusters", MAJOR, Path("/nonexistent"), BootStep("postgresql", home)) == cluster
    assert (cluster / "global" / "pg_control").read_bytes() == before


def test_cluster_of_another_major_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "16").mkdir()
    with pytest.raises(StepFailed) as refused:
        postgresql.prepare(tmp_path, 15, Path("/nonexistent"), BootStep("postgresql", tmp_path))
    assert str(refused.value) == (
        "the data volume holds a PostgreSQL 16 cluster and this image runs PostgreSQL 15: nothing was changed; "
        "pin an image with PostgreSQL 16. To move the data to PostgreSQL 15, run `mlflow-host-dump` on that image, "
        "then pin this image and set restoreFrom to the name of the dump"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["16"]


def test_failed_initdb_leaves_no_cluster(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "initdb").write_text("#!/bin/sh\necho 'initdb: error: no space left on device'; exit 1\n")
    (programs / "initdb").chmod(0o755)
    clusters = tmp_path / "clusters"
    clusters.mkdir()
    for folder in ("status", "web"):
        (tmp_path / folder).mkdir()
    with pytest.raises(StepFailed, match="initdb: error: no space left on device"):
        postgresql.prepare(clusters, 15, programs, BootStep("postgresql", tmp_path))
    assert not (clusters / "15").exists()


@settings(max_examples=8)
@given(st.integers(900, 500_000), st.integers(1, 128))
def test_postgresql_accepts_the_settings_of_any_machine_size(memory_mb: int, cores: int) -> None:
    with tempfile.TemporaryDirectory(prefix="mlflow-settings-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        file = folder / "postgresql.conf"
        file.write_text(rendered(sizing.MachineSize(memory_mb, cores)))
        done = as_postgres(PROGRAMS / "postgres", "-D", folder, "-c", f"config_file={file}", "-C", "shared_buffers")
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) * 8 == sizing.size(sizing.MachineSize(memory_mb, cores)).shared_buffers_mb * 1024


def test_postgresql_major_is_read_from_image_json(tmp_path: Path) -> None:
    from mlflow_host.machine import config

    facts = tmp_path / "image.json"
    facts.write_text(json.dumps({"postgresql_major": 17}))
    assert config.postgresql_major(facts) == 17
    assert sys.version_info >= (3, 11)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path.resolve()


def lock_file(folder: Path, process: int) -> Path:
    path = folder / "postmaster.pid"
    path.write_text(f"{process}\n{folder}\n1764441600\n5432\n/run/postgresql\n\n  5432001 3\nready   \n")
    return path


def test_lock_file_of_an_earlier_boot_is_taken_over_though_its_process_id_is_used_again(folder: Path) -> None:
    with subprocess.Popen(["sleep", "60"], cwd=folder) as other:
        path = lock_file(folder, other.pid)
        before = path.read_text().split("\n", 1)[1]
        postgresql.take_over_lock_file(folder)
        other.kill()
    assert path.read_text() == f"{os.getpid()}\n{before}", "the key of the shared memory stays"


def test_lock_file_of_a_running_postmaster_stays(folder: Path) -> None:
    program = folder / "postgres"
    shutil.copy2("/usr/bin/sleep", program)
    with subprocess.Popen([program, "60"], cwd=folder) as running:
        path = lock_file(folder, running.pid)
        postgresql.take_over_lock_file(folder)
        left = path.read_text()
        running.kill()
    assert left.startswith(f"{running.pid}\n")


def test_without_a_readable_lock_file_nothing_is_written(folder: Path) -> None:
    postgresql.take_over_lock_file(folder)
    assert list(folder.iterdir()) == []
    (folder / "postmaster.pid").write_text("")
    postgresql.take_over_lock_file(folder)
    assert (folder / "postmaster.pid").read_text() == ""


STEP = (
    "import os, sys; from pathlib import Path; from mlflow_host.boot import postgresql\n"
    "cluster, sockets, program, taken_over = Path(sys.argv[1]), *sys.argv[2:]\n"
    "if taken_over == 'yes': postgresql.take_over_lock_file(cluster)\n"
    "os.execv(program, [program, '-D', str(cluster), '-k', sockets, '-c', 'listen_addresses='])"
)


@pytest.mark.service
def test_postgresql_starts_on_a_lock_file_that_names_another_process_of_its_user(cluster: Path, home: Path) -> None:
    """With this lock file, PostgreSQL refuses to start without the boot step. The boot step writes its own process ID
    to the lock file and starts PostgreSQL by execv, which keeps the process ID."""
    user = "postgres" if os.getuid() == 0 else None
    with subprocess.Popen(["sleep", "120"], user=user) as other:
        for taken_over, said in (("no", "Is another postmaster"), ("yes", "ready to accept connections")):
            lock_file(cluster, other.pid)
            shutil.chown(cluster / "postmaster.pid", user) if user else None
            start = ["timeout", "--signal=INT", "5", "/usr/bin/python3", "-c", STEP]
            done = as_postgres(*start, cluster, home / "status", PROGRAMS / "postgres", taken_over)
            assert said in done.stderr, done.stderr
        other.kill()
