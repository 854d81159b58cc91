"""Whichever interpreter starts a script, the script runs with .venv's Python or prints one sentence with the reason."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.readme_commands import PATH, REPOSITORY

SCRIPTS = REPOSITORY / "scripts"
PROBE = """import sys
import enter_venv
import boto3
print(sys.prefix, sys.argv[1:])
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Create a checkout without .venv that contains the script `probe.py` and the modules that the script needs."""
    folder = tmp_path / "checkout" / "scripts"
    folder.mkdir(parents=True)
    for name in ("enter_venv.py", "invoker.py"):
        shutil.copy(SCRIPTS / name, folder)
    (folder / "probe.py").write_text(PROBE)
    return folder.parent


def bare_python(folder: Path) -> Path:
    """Create a Python without packages, in a virtual environment of the current interpreter, and return its path."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder / "bin" / "python"


def probe(python: Path | str, checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), str(checkout / "scripts" / "probe.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": PATH}, timeout=60)


@pytest.mark.long
def test_script_restarts_with_the_repositorys_python(checkout: Path, tmp_path: Path) -> None:
    (checkout / ".venv").symlink_to(Path(sys.prefix))
    done = probe(bare_python(tmp_path / "bare"), checkout, "--a", "b c")
    assert done.stdout.strip() == f"{checkout / '.venv'} ['--a', 'b c']", done.stderr


def test_without_an_environment_make_prepare_is_named(checkout: Path, tmp_path: Path) -> None:
    done = probe(bare_python(tmp_path / "bare"), checkout)
    assert done.returncode == 2
    assert done.stderr == f"probe: the Python packages are not installed: run `make prepare` in {checkout}\n"


def test_active_virtual_environment_is_used(checkout: Path) -> None:
    done = probe(sys.executable, checkout)
    assert done.returncode == 0, done.stderr


def test_invalid_venv_folder_does_not_loop(checkout: Path, tmp_path: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    wrapper = checkout / ".venv" / "bin" / "python"
    wrapper.write_text(f'#!/bin/sh\nexec {bare_python(tmp_path / "bare")} "$@"\n')
    wrapper.chmod(0o755)
    done = probe(bare_python(tmp_path / "bare"), checkout)
    assert done.returncode == 2
    assert "remove .venv and run `make prepare`" in done.stderr


def test_venv_with_a_missing_python_is_reported(checkout: Path, tmp_path: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to("/nonexistent/python3.10")
    done = probe(bare_python(tmp_path / "bare"), checkout)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "make prepare" in done.stderr


def test_old_python_prints_the_required_version(checkout: Path, tmp_path: Path) -> None:
    python, path = bare_python(tmp_path / "bare"), str(checkout / "scripts" / "probe.py")
    old = f"import sys; sys.version_info = (3, 9, 2); sys.argv = [{path!r}, {str(checkout / 'scripts')!r}]; "
    run = "import runpy; sys.path.insert(0, sys.argv[1]); runpy.run_path(sys.argv[0], None, '__main__')"
    done = subprocess.run([python, "-c", old + run], capture_output=True, text=True, env={"PATH": PATH})
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("probe: Python 3.11 or newer is needed, not 3.9 (")


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.name)
def test_a_python_that_is_too_old_can_read_the_scripts(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 8))


def test_every_script_imports_enter_venv_first() -> None:
    for path in SCRIPTS.glob("*.py"):
        if path.read_text().startswith("#!"):
            imports = [
                node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
            ]
            imports.sort(key=lambda node: node.lineno)
            names = [name.name for node in imports for name in node.names]
            assert next(name for name in names if name != "annotations") == "enter_venv", path.name
            assert os.access(path, os.X_OK), f"{path.name} is not executable"


def test_missing_package_is_one_error_sentence(checkout: Path) -> None:
    (checkout / "scripts" / "probe.py").write_text("import enter_venv\nimport package_that_is_not_there.part\n")
    done = probe(sys.executable, checkout)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("probe: the Python package package_that_is_not_there is not installed")
    assert "make prepare" in done.stderr and done.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback(checkout: Path) -> None:
    (checkout / "scripts" / "probe.py").write_text("import enter_venv\n1 / 0\n")
    done = probe(sys.executable, checkout)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "Traceback" in done.stderr


def test_the_repository_is_importable(checkout: Path) -> None:
    (checkout / "scripts" / "probe.py").write_text(
        "import enter_venv\nfrom scripts import invoker\nprint(invoker.__name__)\n"
    )
    done = probe(sys.executable, checkout)
    assert done.stdout == "scripts.invoker\n", done.stderr
