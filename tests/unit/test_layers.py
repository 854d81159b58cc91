"""Each folder of the image's package has the name of the part that calls its code, and imports only lower layers."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LIBRARY = REPOSITORY / "provisioning/rootfs/usr/lib/mlflow-host"
PACKAGE = LIBRARY / "mlflow_host"

BELOW = {
    "contract": set(),
    "machine": {"contract"},
    "postgres": {"contract", "machine"},
    "schema": {"contract", "machine", "postgres"},
    "server": {"contract", "machine", "postgres"},
    "backups": {"contract", "machine", "postgres"},
    "garbage": {"contract", "machine", "postgres", "server", "backups"},
    "upkeep": {"contract", "machine", "postgres", "backups"},
    "monitor": {"contract", "machine", "postgres", "backups"},
    "logs": {"contract", "machine"},
    "boot": {"contract", "machine", "postgres", "schema", "server", "backups"},
    "adopt": {"contract", "machine", "postgres", "schema"},
    "bake": {"contract", "machine", "postgres", "schema", "server", "backups", "garbage"},
}
"""Folder of mlflow_host → the other folders that this folder may import."""


def imported(file: Path, package: str, *, at_import_only: bool = False) -> list[str]:
    """Return the modules of `package` that a file imports, as dotted names without the name of the package."""
    names = all_imported(file, at_import_only)
    return [name.removeprefix(f"{package}.") for name in names if name.split(".")[0] == package]


@functools.cache
def all_imported(file: Path, at_import_only: bool) -> list[str]:
    tree = ast.parse(file.read_text())
    names: list[str] = []
    for node in tree.body if at_import_only else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_folder_of_the_package_has_a_layer() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(BELOW)
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("folder", BELOW)
def test_a_folder_imports_only_those_below_it(folder: str) -> None:
    allowed = BELOW[folder] | {folder}
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        for name in imported(path, "mlflow_host")
        if name.split(".")[0] not in allowed
    ]
    assert not wrong


def test_imports_have_no_cycle() -> None:
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in modules()}
    graph = {
        name: {
            target
            for found in imported(path, "mlflow_host", at_import_only=True)
            for target in (found, found.rpartition(".")[0])
            if target in names
        }
        for name, path in names.items()
    }
    assert len(list(TopologicalSorter(graph).static_order())) >= len(names)


def test_the_contract_needs_the_standard_library_alone() -> None:
    names = [f"mlflow_host.contract.{path.stem}" for path in (PACKAGE / "contract").glob("*.py")]
    code = f"import sys, importlib; sys.path.insert(0, {str(LIBRARY)!r}); [importlib.import_module(n) for n in {names}]"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@pytest.mark.parametrize("top", ["infra", "scripts"])
def test_infra_and_scripts_import_only_the_contract(top: str) -> None:
    wrong = [
        f"{path.relative_to(REPOSITORY)} imports {name}"
        for path in sorted((REPOSITORY / top).rglob("*.py"))
        for name in imported(path, "mlflow_host")
        if name.split(".")[0] != "contract"
    ]
    assert not wrong


def test_image_imports_neither_infra_nor_scripts() -> None:
    outside = {"infra", "scripts", "tests", "pulumi", "pulumi_aws", "moto"}
    wrong = [
        f"{path.relative_to(REPOSITORY)} imports {name}"
        for path in sorted((REPOSITORY / "provisioning").rglob("*.py"))
        for package in outside
        for name in imported(path, package)
    ]
    assert not wrong


BOOT_IMPORTS = {"jinja2", "boto3", "botocore", "psycopg2", "mlflow", "sqlalchemy", "alembic"}


@pytest.mark.parametrize("module", ["configure", "data_volume", "ready", "report_failure"])
def test_early_boot_steps_import_no_slow_package(module: str) -> None:
    """Other boot steps wait for the early boot steps, and the import of a slow package takes 0.1 to 4 s."""
    code = f"import sys, mlflow_host.boot.{module} as m; print(*sorted({BOOT_IMPORTS} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(LIBRARY)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_files_with_imports_for_types_only_do_not_evaluate_annotations() -> None:
    """Evaluated annotations would make the import of the file fail with a NameError, which mypy does not report."""
    sources = [path for folder in ("scripts", "infra", "provisioning") for path in (REPOSITORY / folder).rglob("*.py")]
    typed = {path: path.read_text(encoding="utf-8") for path in sources}
    unsafe = [
        str(path.relative_to(REPOSITORY))
        for path, text in typed.items()
        if "if TYPE_CHECKING:" in text and "from __future__ import annotations" not in text
    ]
    assert not unsafe
