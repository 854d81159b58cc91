"""Every patch of MLflow is in server/mlflow_patches.py, has a target in the installed MLflow, and has a test."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlflow_host.server import mlflow_patches
from mlflow_host.server.mlflow_checks import Refusal
from tests.support.services import HOST_PACKAGE

TESTS = Path(__file__).resolve().parents[1]
PATCHES = [*mlflow_patches.BEFORE_IMPORT, *mlflow_patches.AFTER_IMPORT]
MODULES = sorted((HOST_PACKAGE / "mlflow_host").rglob("*.py"))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_target_and_test_of_each_patch_exist(patch: mlflow_patches.Patch) -> None:
    owner, name = mlflow_patches.located(patch.target)
    assert hasattr(owner, name)
    file, test = patch.test.split("::")
    assert f"def {test}(" in (TESTS / file).read_text(encoding="utf-8")


def test_missing_optional_target_is_skipped_and_any_other_is_an_error() -> None:
    absent = mlflow_patches.Patch("json:absent", "", "", lambda _: None, optional=True)
    mlflow_patches.apply([absent])
    with pytest.raises(Refusal, match="has no json:absent"):
        mlflow_patches.apply([mlflow_patches.Patch("json:absent", "", "", lambda _: None)])


@pytest.mark.long
def test_import_of_auth_fails_at_once() -> None:
    code = """
import importlib.util
import sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "flask_wtf" else real(name, *rest)
from mlflow_host.server import mlflow_patches
mlflow_patches.block_import_of_auth()
assert not sys.modules["mlflow.server.auth"]
try:
    import mlflow.server.auth
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(HOST_PACKAGE)}
    )
    assert "import of mlflow.server.auth halted" in done.stdout, done.stderr


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(HOST_PACKAGE)))
def test_no_other_module_replaces_names_of_another(path: Path) -> None:
    """In the image's code, only mlflow_patches.py may assign to the attributes of an imported module, or use
    sys.modules or unittest.mock."""
    if path.name == "mlflow_patches.py":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert "mock" not in imported, "unittest.mock is for tests"
    replaced = [
        ast.unparse(target)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AugAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute | ast.Subscript)
        and not any(isinstance(n, ast.Call) for n in ast.walk(target))
        and re.split(r"[.\[]", ast.unparse(target))[0] in imported
        and not ast.unparse(target).startswith("os.environ[")
    ]
    assert not replaced
