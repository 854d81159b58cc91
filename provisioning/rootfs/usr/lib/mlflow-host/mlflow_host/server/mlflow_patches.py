"""The patches: what a server process replaces in MLflow and protobuf. Each patch has a target, a reason and a test.

Changes of MLflow's behaviour through public interfaces are in other modules. `db_connections` and `mlflow_checks` use
SQLAlchemy's events. `refusals`, `request_limits` and `artifact_location_checks` use Flask's before_request.
`artifact_location_checks` and `artifact_repository` use MLflow's registry of artifact repositories.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from mlflow_host.server import artifact_paths, json_decode, refusals, request_limits
from mlflow_host.server.mlflow_checks import Refusal


@dataclass(frozen=True)
class Patch:
    target: str
    """module:attribute, or module:class.attribute"""
    reason: str
    test: str
    """file::function below tests/"""
    replacement: Callable[[Any], Any]
    """A function that receives the target's current value and returns the new value."""
    optional: bool = False
    """True if an MLflow release without the target needs no patch. If the value is false, a missing target stops the
    process."""


def without_indent(module: Any) -> Any:
    """Return a copy of the module `json` whose function `dumps` writes no line breaks."""

    def dumps(value: Any, *, indent: object = None, **options: Any) -> str:
        if indent is not None:
            options.setdefault("separators", (",", ": "))
        written: str = module.dumps(value, **options)
        return written

    return SimpleNamespace(**vars(module) | {"dumps": dumps})


BEFORE_IMPORT = (
    Patch(
        "google.protobuf.json_format:ParseDict",
        "parses long requests faster: 1.2 times the batches of 100 and more metrics",
        "unit/test_json_decode.py::test_every_message_of_mlflow_is_read_as_by_protobuf",
        lambda _: json_decode.parse_dict,
    ),
    Patch(
        "mlflow.utils.uri:validate_path_is_safe",
        "returns 400, not 500, for paths that MLflow cannot decode, and refuses `..` after a backslash",
        "unit/test_artifact_names.py::test_paths_that_mlflow_cannot_read_are_refused_with_a_sentence",
        artifact_paths.strict,
    ),
)
"""Patches to apply before MLflow's server is imported, because MLflow's modules copy these names when they are
imported. Applying the last patch imports the package `mlflow`, but not the server."""

AFTER_IMPORT = (
    Patch(
        "mlflow.server.handlers:search_runs_impl",
        "bounds the filter and the order of a search by GraphQL, too",
        "unit/test_request_limits.py::test_a_search_is_bounded_however_it_is_spelled",
        request_limits.bounded,
        optional=True,
    ),
    Patch(
        "mlflow.utils.proto_json_utils:json",
        "writes responses without line breaks: json indents in Python, but writes compact JSON in C",
        "unit/test_json_decode.py::test_mlflows_responses_have_no_line_breaks",
        without_indent,
        optional=True,
    ),
    Patch(
        "mlflow.utils.search_utils:SearchUtils.parse_start_offset_from_page_token",
        "returns 400, not 500, for malformed page tokens",
        "compare/test_same_answers.py::test_page_tokens_of_malformed_json_are_refused",
        refusals.strict_page_token,
        optional=True,
    ),
    Patch(
        "mlflow.utils.search_utils:SearchLoggedModelsPaginationToken.decode",
        "returns 400, not 500, for malformed page tokens",
        "unit/test_request_limits.py::test_a_page_token_that_is_none_is_a_bad_request",
        refusals.strict_page_token,
        optional=True,
    ),
)


def apply(patches: Iterable[Patch]) -> None:
    """Apply patches. Raises Refusal if the installed MLflow lacks the target of a patch that is not optional."""
    for patch in patches:
        try:
            owner, name = located(patch.target)
            current = getattr(owner, name)
        except (ImportError, AttributeError):
            if patch.optional:
                continue
            raise Refusal(
                f"the installed MLflow has no {patch.target}; its replacement {patch.reason}: change "
                "mlflow_host.server.mlflow_patches for this release"
            ) from None
        setattr(owner, name, patch.replacement(current))


def located(target: str) -> tuple[Any, str]:
    """Return the module or class that contains a patch's target, and the name of the attribute to replace."""
    module, path = target.split(":")
    *classes, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for each in classes:
        owner = getattr(owner, each)
    return owner, name


def block_import_of_auth() -> None:
    """Make MLflow's import of its basic-auth application fail at once (sys.modules documents the value None).

    MLflow imports that application at each GraphQL request. The import fails without the packages of the extra `auth`.
    While it runs in one thread, requests in other threads find a partly imported module: MLflow 3.18 then answers
    /ajax-api/3.0/mlflow/assistant/config with an AttributeError and the status 500.
    """
    if importlib.util.find_spec("flask_wtf") is None:
        sys.modules["mlflow.server.auth"] = None  # type: ignore[assignment]
