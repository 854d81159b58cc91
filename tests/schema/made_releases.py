"""Invented MLflow releases: copies of the newest release's environment with changes to the package.

The files of a copy are hard links, so copying takes a second and no disk space. A change replaces a file in the copy
and leaves the original file unchanged.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from mlflow_host.schema.release import ImageSchema
from mlflow_host.schema.revisions import known_revisions
from tests.schema.environments import releases


class MadeRelease:
    """A copy of an environment. `python` is the interpreter of the copy, and `package` is its folder mlflow."""

    def __init__(self, original: Path, folder: Path) -> None:
        """Copy the environment of the interpreter `original` to `folder`, which must not exist."""
        subprocess.run(["cp", "--archive", "--link", original.parent.parent, folder], check=True)
        self.python = folder / "bin/python"
        (self.package,) = folder.glob("lib/python*/site-packages/mlflow")

    def replace(self, file: str, pattern: str, text: str) -> None:
        """Replace all matches of a regular expression in a file of the package. At least one match must exist."""
        path = self.package / file
        changed, found = re.subn(pattern, text, path.read_text(), flags=re.MULTILINE)
        assert found, f"{file} of MLflow {releases()[-1]} has no {pattern}: adapt the test"
        self.write(file, changed)

    def append(self, file: str, text: str) -> None:
        self.write(file, f"{(self.package / file).read_text()}\n\n{text}")

    def rename(self, old: str, new: str, *files: str) -> None:
        """Replace the name `old` by `new` in `files`: the file that defines it, and the files that use it."""
        for file in files:
            self.replace(file, rf"\b{old}\b", new)

    def write(self, file: str, text: str) -> None:
        path = self.package / file
        path.unlink(missing_ok=True)
        path.write_text(text)
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()

    def migration(self, revision: str, follows: str | tuple[str, ...], upgrade: str = "pass") -> None:
        lines = "\n".join(f"    {line}" for line in upgrade.splitlines())
        self.write(
            f"store/db_migrations/versions/{revision}_made.py",
            f"import sqlalchemy as sa\nfrom alembic import op\n\nrevision = {revision!r}\ndown_revision = {follows!r}\n"
            f"branch_labels = None\ndepends_on = None\n\n\ndef upgrade():\n{lines}\n\n\ndef downgrade():\n    pass\n",
        )

    def image(self, version: str) -> ImageSchema:
        order = known_revisions(self.python)
        return ImageSchema(self.python, order[-1], len(order), version, f"stand-in-{version}")

    def remove(self) -> None:
        shutil.rmtree(self.python.parent.parent)
