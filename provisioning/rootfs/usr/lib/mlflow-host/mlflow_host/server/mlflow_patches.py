"""All patches of MLflow and protobuf in a server process, each with target, reason and test.

Listeners and hooks through public interfaces are in other modules: SQLAlchemy's events (`db_connections`,
`mlflow_checks`), Flask's before_request (`refusals`, `request_limits`, `artifact_fence`), and MLflow's registry of
artifact repositories (`artifact_fence`, `artifact_repository`).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mlflow_host.server import artifact_paths, json_decode, json_encode, refusals, request_limits
from mlflow_host.server.mlflow_checks import Refusal


@dataclass(frozen=True)
class Patch:
    target: str
    """module:attribute, or module:class.attribute"""
    reason: str
    test: str
    """file::function below tests/"""
    replacement: Callable[[Any], Any]
    """Returns the new value for the present one."""
    optional: bool = False
    """A release without the target needs no patch. Without any other target the process does not start."""


BEFORE_IMPORT = (
    Patch(
        "google.protobuf.json_format:MessageToDict",
        "halves the time of long responses",
        "unit/test_answers.py::test_every_message_of_mlflow_is_read_and_written_as_by_protobuf_and_mlflow",
        lambda _: json_encode.message_to_dict,
    ),
    Patch(
        "google.protobuf.json_format:ParseDict",
        "halves the time of parsing long requests",
        "unit/test_answers.py::test_every_message_of_mlflow_is_read_and_written_as_by_protobuf_and_mlflow",
        lambda _: json_decode.parse_dict,
    ),
    Patch(
        "mlflow.utils.uri:validate_path_is_safe",
        "returns 400, not 500, for paths that MLflow cannot decode, and refuses `..` after a backslash",
        "unit/test_artifact_names.py::test_paths_that_mlflow_cannot_read_are_refused_with_a_sentence",
        artifact_paths.strict,
    ),
)
"""Names that MLflow's modules copy when they are imported. The last one imports MLflow's package, but no server."""

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
        "unit/test_answers.py::test_mlflows_responses_have_no_line_breaks",
        json_encode.without_indent,
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
    """Raises Refusal if the release lacks the target of a patch that is not optional."""
    for patch in patches:
        try:
            owner, name = located(patch.target)
            current = getattr(owner, name)
        except (ImportError, AttributeError):
            if patch.optional:
                continue
            raise Refusal(
                f"the installed MLflow has no {patch.target}, whose replacement {patch.reason}: adapt "
                "mlflow_host.server.mlflow_patches"
            ) from None
        setattr(owner, name, patch.replacement(current))


def located(target: str) -> tuple[Any, str]:
    """The object and the name of its attribute that a patch replaces."""
    module, path = target.split(":")
    *classes, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for each in classes:
        owner = getattr(owner, each)
    return owner, name


def block_import_of_auth() -> None:
    """Make MLflow's import of its basic-auth application fail at once, as sys.modules documents.

    MLflow imports that application at each search, to filter the results. Without the packages of the extra `auth` the
    import fails after executing thousands of lines, which takes a third of a search's time. Tested by
    unit/test_mlflow_patches.py::test_import_of_auth_fails_at_once.
    """
    if importlib.util.find_spec("flask_wtf") is None:
        sys.modules["mlflow.server.auth"] = None  # type: ignore[assignment]
