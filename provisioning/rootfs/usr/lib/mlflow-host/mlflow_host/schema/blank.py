"""An empty database of the image's schema, made and opened by its MLflow at bake, so that no boot has to.

    python -m mlflow_host.schema.blank FILE        as the OS user postgres; a dump in pg_dump's custom format

Running MLflow's migrations takes seconds of a launch and of the outage of a rollback; loading their result does not.
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

from mlflow_host import postgresql
from mlflow_host.schema import dumping
from mlflow_host.schema.cluster import Cluster, accepts, create_empty
from mlflow_host.schema.release import Image, release

FILE = Path("/usr/share/mlflow-host/blank.dump")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mlflow_host.schema.blank", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    (programs,) = Path("/usr/lib/postgresql").glob("*/bin")
    with tempfile.TemporaryDirectory(prefix="mlflow-host-blank-") as folder, private(Path(folder), programs) as cluster:
        print(f"blank: MLflow's schema {make(cluster, Image(Path(sys.executable), '', 0, ''), arguments.file)}")


def make(cluster: Cluster, image: Image, file: Path) -> str:
    """Write the dump, with the default experiment that MLflow gives an empty database; its migration head."""
    with release(cluster, image) as mlflow:
        found = mlflow.head()
        create_empty(cluster, cluster.database)
        mlflow.create(cluster.database, found)
        mlflow.answer(cluster.database)
    command = [cluster.program("pg_dump"), "--format=custom", f"--file={file}", *cluster.arguments, cluster.database]
    subprocess.run(command, check=True)
    return found


def load(cluster: Cluster, database: str, file: Path) -> None:
    """Make `database` anew from the dump. Raises dumping.DumpError, psycopg2.Error."""
    create_empty(cluster, database)
    with file.open("rb") as dump:
        dumping.load(cluster, database, dump)


@contextmanager
def private(folder: Path, programs: Path) -> Iterator[Cluster]:
    """A cluster that is gone when the block ends, reached through a socket in `folder`."""
    postgresql.make(folder / "data", programs)
    command = [str(programs / "postgres"), "-D", str(folder / "data"), "-c", "listen_addresses=", "-c", "fsync=off"]
    process = subprocess.Popen([*command, "-c", f"unix_socket_directories={folder}"], stdin=subprocess.DEVNULL)
    try:
        cluster = Cluster(host=str(folder), programs=programs)
        while not accepts(cluster):
            if process.poll() is not None:
                raise SystemExit(f"blank: PostgreSQL ended with exit status {process.returncode}")
            time.sleep(0.1)
        yield cluster
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
