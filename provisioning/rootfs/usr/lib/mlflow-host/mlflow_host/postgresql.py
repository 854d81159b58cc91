"""PostgreSQL on the data volume: made on first use, refused when it is another major's, then this process becomes it.

The cluster holds data only. Its settings, and who may connect, come with the image and from `configure`, so the same
cluster runs under any image of its major. The locale is C.UTF-8 of the C library: its order is that of code points and
never changes between distributions, where ICU's and other locales' do and would break indexes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from mlflow_host import config, durable, reader
from mlflow_host.backups.repository import begin_history, stanza_of
from mlflow_host.status import Step, StepFailed, finish

SETTINGS = config.RUN / "postgresql.conf"


def main(arguments: list[str]) -> None:
    major = config.postgresql_major()
    if arguments == ["--started"]:
        reader.started()
        return finish("postgresql", f"PostgreSQL {major} accepts connections")
    s = Step("postgresql", config.RUN)
    with s.reporting():
        cluster = prepare(config.CLUSTERS, major, binaries(major), s)
        s.say(f"starting PostgreSQL {major}")
    program = binaries(major) / "postgres"
    os.execv(program, [str(program), "-D", str(cluster), "-c", f"config_file={SETTINGS}"])


def binaries(major: int) -> Path:
    return Path(f"/usr/lib/postgresql/{major}/bin")


def prepare(clusters: Path, major: int, programs: Path, s: Step) -> Path:
    """The cluster of this major, made if the volume has none. Raises StepFailed when it has another major's."""
    others = sorted(path.name for path in clusters.iterdir() if path.name.isdigit() and path.name != str(major))
    cluster = clusters / str(major)
    if others and not cluster.exists():
        raise StepFailed(
            f"the data volume holds a PostgreSQL {others[-1]} cluster and this image runs PostgreSQL {major}: nothing "
            f"was changed; pin an image with PostgreSQL {others[-1]}, or move by dump and restore: take a dump there "
            "with `mlflow-host-dump`, and set restoreFrom to its name with this image"
        )
    if not cluster.exists():
        s.say(f"creating a PostgreSQL {major} cluster")
        make(cluster, programs)
    if stanza_of(cluster) is None:
        begin_history(cluster, datetime.now(UTC))
    return cluster


def make(cluster: Path, programs: Path) -> None:
    """An empty cluster, whole before it has its name."""
    unfinished = cluster.with_name(f".{cluster.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    create(unfinished, programs)
    add_role(unfinished, programs)
    begin_history(unfinished, datetime.now(UTC))
    unfinished.rename(cluster)
    durable.sync(cluster.parent)


def create(cluster: Path, programs: Path) -> None:
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
        raise StepFailed(f"initdb could not make a cluster in {cluster}: {made.stdout.strip().splitlines()[-1]}")


def add_role(cluster: Path, programs: Path) -> None:
    """The role that owns MLflow's database; OS user mlflow logs in as it by peer authentication."""
    made = subprocess.run(
        [programs / "postgres", "--single", "-D", cluster, "postgres"],
        input="CREATE ROLE mlflow LOGIN\n",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if made.returncode or "ERROR" in made.stdout:
        raise StepFailed(f"the role mlflow could not be made in {cluster}: {made.stdout.strip().splitlines()[-1]}")


if __name__ == "__main__":
    main(sys.argv[1:])
