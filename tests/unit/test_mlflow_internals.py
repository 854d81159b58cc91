"""provisioning/mlflow-internals.md lists exactly the internal names of MLflow that mlflow_host uses."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CODE = REPOSITORY / "provisioning/rootfs/usr/lib/mlflow-host/mlflow_host"
LIST = REPOSITORY / "provisioning/mlflow-internals.md"
PUBLIC = re.compile(
    r"mlflow|mlflow:environment_variables|mlflow\.(cli|env|entities|exceptions|environment_variables|artifactLocation)(:.*)?"
    r"|mlflow\.store\.artifact\.(artifact_repo|artifact_repository_registry)(:.*)?"
    r"|mlflow\.protos:databricks_pb2|mlflow\.protos\.databricks_pb2:[A-Z_]+|mlflow\.runName"
)
"""Names that need no entry: documented names, a file name and a tag that look like internal names, the plug-in
interface of artifact repositories, the error codes in the documentation of MlflowException, and a system tag."""
NAME = re.compile(r"_MLFLOW_\w+|mlflow(\.\w+)+(:[\w.]+)?")


def used(source: str) -> Iterator[str]:
    """Yield the names of MLflow that a module imports or contains as text: `module`, `module:name` or a private
    variable."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mlflow":
            yield from (f"{node.module}:{each.name}" for each in node.names)
        elif isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.split(".")[0] == "mlflow")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value):
            yield node.value


def listed() -> set[str]:
    rows = [line.split("|")[1] for line in LIST.read_text().splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_the_list_is_complete_and_has_no_name_that_is_not_used() -> None:
    found = {name for path in CODE.rglob("*.py") for name in used(path.read_text()) if not PUBLIC.fullmatch(name)}
    assert sorted(found - listed()) == [], "add them to provisioning/mlflow-internals.md"
    assert sorted(listed() - found) == [], "remove them from provisioning/mlflow-internals.md"


def test_every_kind_of_use_is_found() -> None:
    source = """
import mlflow.server.jobs.utils as utils
from mlflow.store.db.utils import _get_managed_session_maker
TARGET = "mlflow.server.handlers:_private"
VARIABLE = {"_MLFLOW_NEW": "1"}
TEXT = "mlflow is here"
"""
    assert set(used(source)) == {
        "mlflow.server.jobs.utils", "mlflow.store.db.utils:_get_managed_session_maker",
        "mlflow.server.handlers:_private", "_MLFLOW_NEW",
    }  # fmt: skip
