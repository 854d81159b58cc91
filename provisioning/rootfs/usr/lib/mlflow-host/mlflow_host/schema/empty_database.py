"""Load the dump that the bake wrote (`bake.empty_database`): an empty database with the image's schema."""

from __future__ import annotations

from pathlib import Path

from mlflow_host.postgres import dump_file
from mlflow_host.postgres.cluster import Cluster, create_empty

FILE = Path("/usr/share/mlflow-host/blank.dump")


def load(cluster: Cluster, database: str, file: Path) -> None:
    """Replace `database` with the content of the dump `file`. Raises dump_file.DumpError, psycopg2.Error."""
    create_empty(cluster, database)
    with file.open("rb") as dump:
        dump_file.load(cluster, database, dump)
