"""Bake: create an empty database with the image's MLflow, and dump the database, so that a boot can load the dump.

    python -m mlflow_host.bake.empty_database FILE        as the OS user postgres; writes pg_dump's custom format

MLflow's migrations would take several seconds of every first boot and of every rollback. Loading the dump takes less
than one second.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow_host.postgres import initdb
from mlflow_host.postgres.cluster import Cluster, accepts_connections, create_empty
from mlflow_host.schema.release import ImageSchema, release


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mlflow_host.bake.empty_database", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    (programs,) = Path("/usr/lib/postgresql").glob("*/bin")
    with tempfile.TemporaryDirectory(prefix="mlflow-host-blank-") as folder, private(Path(folder), programs) as cluster:
        head = make(cluster, ImageSchema(Path(sys.executable), "", 0, ""), arguments.file)
        print(f"empty database: MLflow's schema {head}")


def make(cluster: Cluster, image: ImageSchema, file: Path) -> str:
    """Create the empty database, and write its dump, which includes MLflow's default experiment. Returns the migration
    head."""
    with release(cluster, image) as mlflow:
        found = mlflow.head()
        create_empty(cluster, cluster.database)
        mlflow.create(cluster.database, found)
        mlflow.query_stores(cluster.database)
    program, options = cluster.program("pg_dump"), ["--format=custom", f"--file={file}"]
    subprocess.run([program, *options, *cluster.client_arguments(cluster.database)], check=True)
    return found


@contextmanager
def private(folder: Path, programs: Path) -> Iterator[Cluster]:
    """A temporary cluster whose socket is in `folder`. The cluster is stopped at the end of the `with` block."""
    initdb.create_cluster(folder / "data", programs)
    command = [str(programs / "postgres"), "-D", str(folder / "data"), "-c", "listen_addresses=", "-c", "fsync=off"]
    process = subprocess.Popen([*command, "-c", f"unix_socket_directories={folder}"], stdin=subprocess.DEVNULL)
    try:
        cluster = Cluster(host=str(folder), programs=programs)
        while not accepts_connections(cluster):
            if process.poll() is not None:
                raise SystemExit(f"empty database: PostgreSQL ended with exit status {process.returncode}")
            time.sleep(0.1)
        yield cluster
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
