"""Read the commands in the READMEs, and run commands in the shell of a new user."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PATH = "/usr/local/bin:/usr/bin:/bin" + (":/usr/local/sbin:/usr/sbin:/sbin" if os.geteuid() == 0 else "")


def commands() -> list[str]:
    """Return the commands in the READMEs' console blocks, in order, without duplicates and without comments."""
    readmes = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("*/README.md")), REPOSITORY / "tests/bench/README.md"]
    text = "\n".join(path.read_text() for path in readmes)
    blocks = re.findall(r"^ *```console\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    typed = [re.sub(r"\s+#\s.*$", "", line[2:]) for line in lines if line.startswith(("$ ", "# "))]
    return list(dict.fromkeys(typed))


def clone(folder: Path) -> Path:
    """Copy the current files of this checkout to another folder, with a link to this checkout's .venv."""
    target = folder / "mlflow-ami"
    target.mkdir()
    listed = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (REPOSITORY / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((REPOSITORY / name).read_bytes())
            (target / name).chmod((REPOSITORY / name).stat().st_mode & 0o777)
    (target / ".venv").unlink(missing_ok=True)
    (target / ".venv").symlink_to((REPOSITORY / ".venv").resolve())
    return target


def run(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command like a new user, with only HOME, Debian's PATH and the given variables in the environment."""
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    given = {"HOME": str(home), "PATH": PATH, **environment}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=given, capture_output=True, text=True, timeout=600)
