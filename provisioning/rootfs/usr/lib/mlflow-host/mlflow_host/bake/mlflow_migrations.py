"""Bake: read the migrations of the installed MLflow with Alembic, without importing MLflow."""

from __future__ import annotations

from importlib import metadata

from alembic.config import Config
from alembic.script import ScriptDirectory


def directory() -> ScriptDirectory:
    """Alembic's view of MLflow's migrations."""
    config = Config()
    location = metadata.distribution("mlflow").locate_file("mlflow/store/db_migrations")
    config.set_main_option("script_location", str(location))
    return ScriptDirectory.from_config(config)


def titles() -> list[dict[str, str]]:
    """All migrations, from the first to the newest. `title` is the first line of the migration's description."""
    every = reversed(list(directory().walk_revisions()))
    return [{"revision": each.revision, "title": (each.doc or "").partition("\n")[0].strip()} for each in every]
