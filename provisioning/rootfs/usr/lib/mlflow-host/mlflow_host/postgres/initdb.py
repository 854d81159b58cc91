"""Create an empty PostgreSQL cluster for MLflow. This module also defines the paths of PostgreSQL's programs and
configuration."""

from __future__ import annotations

import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from mlflow_host.machine import atomic_file, config
from mlflow_host.machine.status import StepFailed
from mlflow_host.postgres.pgbackrest import start_stanza

SETTINGS = config.RUN / "postgresql.conf"


def binaries(major: int) -> Path:
    return Path(f"/usr/lib/postgresql/{major}/bin")


def create_cluster(cluster: Path, programs: Path) -> None:
    """Create an empty cluster under a temporary name, and rename the cluster when it is complete. Therefore a crash
    cannot leave an incomplete cluster under the final name."""
    unfinished = cluster.with_name(f".{cluster.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    run_initdb(unfinished, programs)
    create_server_role(unfinished, programs)
    start_stanza(unfinished, datetime.now(UTC))
    unfinished.rename(cluster)
    atomic_file.sync(cluster.parent)


def run_initdb(cluster: Path, programs: Path) -> None:
    made = subprocess.run(
        [
            programs / "initdb",
            f"--pgdata={cluster}",
            "--username=postgres",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "--auth=peer",
            "--data-checksums",
            "--no-instructions",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if made.returncode:
        raise StepFailed(f"initdb could not create a cluster in {cluster}: {made.stdout.strip().splitlines()[-1]}")


def create_server_role(cluster: Path, programs: Path) -> None:
    """Create the role mlflow, which owns MLflow's database. The OS user mlflow logs in by peer authentication."""
    made = subprocess.run(
        [programs / "postgres", "--single", "-D", cluster, "postgres"],
        input="CREATE ROLE mlflow LOGIN\n",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if made.returncode or "ERROR" in made.stdout:
        raise StepFailed(f"the role mlflow could not be created in {cluster}: {made.stdout.strip().splitlines()[-1]}")
