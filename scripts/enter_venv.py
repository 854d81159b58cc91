"""Run a script with the project's own packages. Every script in this folder imports this module first.

After the import of this module, a script can import `scripts`, `tests` and `mlflow_host` in any current folder.

If another Python runs the script, this module restarts the script with the repository's .venv/bin/python and the same
arguments. The restart works from any folder and with sudo. If .venv/bin/python is missing, this module prints one
sentence with the remedy, and the exit status is 2.

This module and the scripts that import it must compile with Python 3.8, so that an old Python prints a clear error.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import pwd
import sys
from pathlib import Path
from types import TracebackType
from typing import NoReturn

SCRIPTS = Path(__file__).resolve().parent
REPOSITORY = SCRIPTS.parent
HOST_PACKAGE = REPOSITORY / "provisioning/rootfs/usr/lib/mlflow-host"
"""The folder that contains the package `mlflow_host`. Scripts import only `mlflow_host.contract` from this package."""
VENV = REPOSITORY / ".venv"
OLDEST = (3, 11)
"""The oldest Python version that pyproject.toml allows."""
RESTARTED = "MLFLOW_AMI_RESTARTED"
"""The name of the environment variable with the ID of the restarted process."""
ROOT_BYTECODE = "/var/cache/mlflow-ami/bytecode"
"""The folder for root's bytecode files, if the checkout belongs to another user."""


def enter(name: str) -> None:
    """If .venv/bin/python runs this process, return; otherwise restart the script with .venv/bin/python, or exit.
    `name` is the script's name."""
    python = VENV / "bin" / "python"
    if Path(sys.prefix).resolve() != VENV.resolve() and os.access(python, os.X_OK):
        if os.environ.get(RESTARTED) == str(os.getpid()):
            refuse(name, f"{python} is not the Python of a virtual environment: remove .venv and run `make prepare`")
        os.environ[RESTARTED] = str(os.getpid())
        os.execv(python, [str(python), *sys.argv])
    os.environ.pop(RESTARTED, None)
    if sys.version_info < OLDEST:
        remove = "remove .venv and " if VENV.exists() else ""
        found = f"{sys.version_info[0]}.{sys.version_info[1]} ({sys.executable})"
        refuse(name, f"Python 3.11 or newer is needed, not {found}: install one, then {remove}run `make prepare`")
    if importlib.util.find_spec("boto3") is None:
        refuse(name, f"the Python packages are not installed: run `make prepare` in {REPOSITORY}")


def refuse(name: str, text: str) -> NoReturn:
    """Print the script's name and `text` to standard error, and exit with status 2."""
    sys.stderr.write(f"{name}: {text}\n")
    sys.stderr.flush()
    sys.exit(2)


def report_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught exception. If the user can fix the cause, print one sentence, else print the traceback."""
    name = Path(sys.argv[0]).stem
    if isinstance(error, KeyboardInterrupt):
        sys.exit(130)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.split(".")[0]
        if importlib.util.find_spec(package) is None:
            remedy = "run `make prepare`, or `make prepare-demo` for the local cloud"
            refuse(name, f"the Python package {package} is not installed in {sys.prefix}: {remedy}")
    if isinstance(error, PermissionError) and error.filename and os.geteuid():
        refuse(name, f"{error.filename} cannot be used by this user: use sudo, or the account of its owner")
    sys.__excepthook__(kind, error, trace)


def leave_nothing_of_root() -> None:
    """If the script runs as root, leave no files of root in the sudo user's home and checkout.

    Python writes its bytecode files to ROOT_BYTECODE. At the end of the script, the checkout's owner becomes the owner
    of all other new files in the checkout.
    """
    if os.geteuid():
        return
    if os.environ.get("SUDO_UID", "0") != "0":
        os.environ["HOME"] = pwd.getpwuid(0).pw_dir
    if REPOSITORY.stat().st_uid == 0:
        return
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = ROOT_BYTECODE
    from scripts import invoker

    atexit.register(invoker.give_back, REPOSITORY)


sys.path[:0] = [path for path in (str(REPOSITORY), str(HOST_PACKAGE)) if path not in sys.path]

_main = getattr(sys.modules["__main__"], "__file__", None)
if _main and Path(_main).resolve().parent == SCRIPTS:
    enter(Path(_main).stem)
    sys.excepthook = report_uncaught
    leave_nothing_of_root()
