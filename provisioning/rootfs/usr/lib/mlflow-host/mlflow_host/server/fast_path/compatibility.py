"""Enable a fast-path endpoint only if the installed MLflow has the same code for the endpoint as a tested release.

MLflow handles the other endpoints. `RESTS_ON` lists the MLflow functions and classes that affect each endpoint. The
comparison uses a hash of each definition's source code, so no module is imported, and the hash does not depend on
Python's version. Parsing takes half a second. A process parses MLflow's files only once, in parallel with the database
step.

MLflow loads this module during its own import, by the entry point `postgresql` in the group `mlflow.tracking_store`.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

ABSENT = ""
ARTIFACT_ROOT = "mlflow-artifacts:/"
"""The artifact location of new experiments. `environment.private_environment` has the same value."""

SOURCES: dict[str, tuple[str, ...]] = {
    "server/handlers.py": (
        *("_create_run", "_log_metric", "_log_batch"),
        *("_get_run", "get_run_impl", "_search_runs", "search_runs_impl", "_get_metric_history"),
        *("_get_request_message", "_get_normalized_request_json", "_get_request_json"),
        *("_validate_request_json_with_schema", "_assert_required", "_assert_string", "_assert_intlike"),
        *("_disable_if_artifacts_only", "_reject_conflicting_field_aliases", "catch_mlflow_exception"),
    ),
    "server/validation.py": ("_validate_content_type",),
    "utils/proto_json_utils.py": ("message_to_json", "_mark_int64_fields", "_merge_json_dicts", "parse_dict"),
    "utils/search_utils.py": (*("SearchUtils.parse_start_offset_from_page_token", "SearchUtils.create_page_token"),),
    "store/tracking/sqlalchemy_store.py": (
        *(
            f"SqlAlchemyStore.{method}"
            for method in (
                *("create_run", "get_run", "_get_run", "log_metric", "log_batch", "_log_metrics", "_log_metrics_once"),
                *("_log_model_metrics", "_update_latest_metrics_if_necessary", "sanitize_metric_value"),
                *("_run_with_deadlock_retry", "get_metric_history", "_search_runs", "_get_run_inputs"),
                *("_get_model_inputs", "_get_model_outputs", "_get_model_outputs_bulk", "_check_run_is_active"),
                *("_check_experiment_is_active", "_get_query", "_get_experiment", "get_experiment"),
                *("_filter_experiment_ids", "_validate_run_accessible"),
            )
        ),
        *("_get_orderby_clauses", "_get_sqlalchemy_filter_clauses"),
    ),
    "store/tracking/dbmodels/models.py": ("SqlRun", "SqlMetric", "SqlLatestMetric", "SqlParam", "SqlTag", "SqlInput"),
    "store/db/utils.py": ("_get_managed_session_maker",),
    "utils/validation.py": (
        *("_validate_batch_log_data", "_validate_batch_log_limits", "_validate_batch_log_api_req", "_validate_run_id"),
        *("_validate_metric", "_validate_metric_name", "_is_numeric"),
    ),
    "utils/mlflow_tags.py": ("_get_run_name_from_tags",),
    "utils/uri.py": ("append_to_uri_path",),
    "entities/run.py": ("Run",),
    "entities/run_info.py": ("RunInfo",),
    "entities/run_data.py": ("RunData",),
    "entities/run_inputs.py": ("RunInputs",),
    "entities/run_outputs.py": ("RunOutputs",),
    "entities/metric.py": ("Metric",),
    "entities/param.py": ("Param",),
    "entities/run_tag.py": ("RunTag",),
    "entities/logged_model_input.py": ("LoggedModelInput",),
    "entities/logged_model_output.py": ("LoggedModelOutput",),
}
"""The functions, methods and classes whose code is compared, by file of the package `mlflow` and by qualified name."""


COMPARED: dict[str, tuple[str, ...]] = {
    "handlers._create_run": ("fefb358558",),
    "handlers._log_metric": ("f3c2be4ed6",),
    "handlers._log_batch": ("6dd11f1e9f",),
    "handlers._get_run": ("6c51b9a7f5",),
    "handlers.get_run_impl": ("02cdfe0f84",),
    "handlers._search_runs": ("8bc347ad52",),
    "handlers.search_runs_impl": ("f326ae8ff2",),
    "handlers._get_metric_history": ("0c39ebc8db", "218c23a3ec"),
    "handlers._get_request_message": ("c215ac6f82", "d835807c60", "4926d27e25"),
    "handlers._get_normalized_request_json": ("d1fe316339",),
    "handlers._get_request_json": ("e1c26f6e5f",),
    "handlers._validate_request_json_with_schema": ("979872012a",),
    "handlers._assert_required": ("a6e60b0c10",),
    "handlers._assert_string": ("5b5fdee0d2",),
    "handlers._assert_intlike": ("80037ed5f1",),
    "handlers._disable_if_artifacts_only": ("7634dac1f1",),
    "handlers._reject_conflicting_field_aliases": ("", "b2f0eb69e7"),
    "handlers.catch_mlflow_exception": ("9267fb25c4",),
    "validation._validate_content_type": ("dcc18c820b",),
    "proto_json_utils.message_to_json": ("2ba9f5aa8d", "60ee9520b3", "2e3e3c02ee"),
    "proto_json_utils._mark_int64_fields": ("4b4cf31346",),
    "proto_json_utils._merge_json_dicts": ("acaf082721",),
    "proto_json_utils.parse_dict": ("dc0d78c5fe",),
    "search_utils.SearchUtils.parse_start_offset_from_page_token": ("ebcb00cebe",),
    "search_utils.SearchUtils.create_page_token": ("77c8faaacc",),
    "sqlalchemy_store.SqlAlchemyStore.create_run": ("c2f2a3a382", "39ef387ac4", "fffde889d9"),
    "sqlalchemy_store.SqlAlchemyStore.get_run": ("b8d90f08da",),
    "sqlalchemy_store.SqlAlchemyStore._get_run": ("8753266d90",),
    "sqlalchemy_store.SqlAlchemyStore.log_metric": ("5df74fb0e4",),
    "sqlalchemy_store.SqlAlchemyStore.log_batch": ("f6b078cb01", "11e1db48e4"),
    "sqlalchemy_store.SqlAlchemyStore._log_metrics": ("0f6d8fe268", "7affae7cda", "a3f7d70ce5"),
    "sqlalchemy_store.SqlAlchemyStore._log_metrics_once": ("", "f2582fee23"),
    "sqlalchemy_store.SqlAlchemyStore._log_model_metrics": ("8a35c5bd99", "e8efc9d1af"),
    "sqlalchemy_store.SqlAlchemyStore._update_latest_metrics_if_necessary": ("62934cfbbe", "4f6354d3e9"),
    "sqlalchemy_store.SqlAlchemyStore.sanitize_metric_value": ("fc477c0381",),
    "sqlalchemy_store.SqlAlchemyStore._run_with_deadlock_retry": ("", "43eab09448", "4a2bf98ace"),
    "sqlalchemy_store.SqlAlchemyStore.get_metric_history": ("b55bf89efb",),
    "sqlalchemy_store.SqlAlchemyStore._search_runs": ("f98c85d03d", "64cd048576"),
    "sqlalchemy_store.SqlAlchemyStore._get_run_inputs": ("f3eca1459d",),
    "sqlalchemy_store.SqlAlchemyStore._get_model_inputs": ("4b494e6be2",),
    "sqlalchemy_store.SqlAlchemyStore._get_model_outputs": ("a5e9291262",),
    "sqlalchemy_store.SqlAlchemyStore._get_model_outputs_bulk": ("3a78bc3a60",),
    "sqlalchemy_store.SqlAlchemyStore._check_run_is_active": ("f0b7858817",),
    "sqlalchemy_store.SqlAlchemyStore._check_experiment_is_active": ("022bf58a16",),
    "sqlalchemy_store.SqlAlchemyStore._get_query": ("c8e1128b63", "2f05c9b259"),
    "sqlalchemy_store.SqlAlchemyStore._get_experiment": ("560a47478f", "efb04814c1"),
    "sqlalchemy_store.SqlAlchemyStore.get_experiment": ("32e4344e10", "d5c64e692a"),
    "sqlalchemy_store.SqlAlchemyStore._filter_experiment_ids": ("3575c4a45c", "18f43a1243"),
    "sqlalchemy_store.SqlAlchemyStore._validate_run_accessible": ("bacb6b1c68",),
    "sqlalchemy_store._get_orderby_clauses": ("7f45f9ffa3",),
    "sqlalchemy_store._get_sqlalchemy_filter_clauses": ("0f619a157b", "5ccb7a4071"),
    "models.SqlRun": ("017f2731ad", "13e69e09ca"),
    "models.SqlMetric": ("9daf571110", "5df062f340"),
    "models.SqlLatestMetric": ("c91dd89af9",),
    "models.SqlParam": ("e38830eb12",),
    "models.SqlTag": ("6c226b02a6",),
    "models.SqlInput": ("54ef8b72e2",),
    "utils._get_managed_session_maker": ("582296a36d", "6cfa7c17d4"),
    "validation._validate_batch_log_data": ("11901bf9eb",),
    "validation._validate_batch_log_limits": ("8d5bd0dac8",),
    "validation._validate_batch_log_api_req": ("2044f3b818",),
    "validation._validate_run_id": ("b6fa238738", "1e346f6ce0"),
    "validation._validate_metric": ("b61a005e88",),
    "validation._validate_metric_name": ("e25e4232b4",),
    "validation._is_numeric": ("8b56d62733",),
    "mlflow_tags._get_run_name_from_tags": ("eb402a70f5",),
    "uri.append_to_uri_path": ("725db17664",),
    "run.Run": ("4a41098ab7", "473171e235"),
    "run_info.RunInfo": ("76861775af", "c7b13a2f3d"),
    "run_data.RunData": ("175b119e3e", "4bb873aee5"),
    "run_inputs.RunInputs": ("ccbf63d680", "a959fc687d"),
    "run_outputs.RunOutputs": ("302b2204ca", "68030b8c5e"),
    "metric.Metric": ("285ba6440c", "6db2e7f386"),
    "param.Param": ("b897fee585", "a53fd29ded"),
    "run_tag.RunTag": ("29d65acd94", "c59a8da40e"),
    "logged_model_input.LoggedModelInput": ("628cf49d1c", "cff088eaa9"),
    "logged_model_output.LoggedModelOutput": ("ec56dfef35", "8254271a6c"),
}
"""The hashes of each definition in all tested releases: the releases on PyPI from MLflow 3.11.1 to 3.18.0."""

CREATE, LOG_METRIC, LOG_BATCH = "/runs/create", "/runs/log-metric", "/runs/log-batch"
GET, SEARCH, HISTORY = "/runs/get", "/runs/search", "/metrics/get-history"
STORE = "SqlAlchemyStore._log_metrics"
"""The shortcut `store.DirectStore._log_metrics`, which writes the metrics that MLflow's own handlers log."""
SHORTCUTS = (CREATE, LOG_METRIC, LOG_BATCH, GET, SEARCH, HISTORY, STORE)

_LOGGING = (LOG_METRIC, LOG_BATCH, STORE)
_RUNS = (CREATE, GET, SEARCH)
ONLY: dict[tuple[str, ...], tuple[str, ...]] = {
    (CREATE,): (
        *("handlers._create_run", "mlflow_tags._get_run_name_from_tags", "uri.append_to_uri_path"),
        *(
            "sqlalchemy_store.SqlAlchemyStore.create_run",
            "sqlalchemy_store.SqlAlchemyStore._check_experiment_is_active",
        ),
    ),
    (LOG_METRIC,): ("handlers._log_metric", "sqlalchemy_store.SqlAlchemyStore.log_metric"),
    (LOG_BATCH,): (
        *("handlers._log_batch", "sqlalchemy_store.SqlAlchemyStore.log_batch", "validation._validate_batch_log_data"),
        *("validation._validate_batch_log_limits", "validation._validate_batch_log_api_req"),
    ),
    _LOGGING: (
        *("sqlalchemy_store.SqlAlchemyStore._log_metrics", "sqlalchemy_store.SqlAlchemyStore._log_metrics_once"),
        *(
            "sqlalchemy_store.SqlAlchemyStore._log_model_metrics",
            "sqlalchemy_store.SqlAlchemyStore._check_run_is_active",
        ),
        "sqlalchemy_store.SqlAlchemyStore._update_latest_metrics_if_necessary",
        "sqlalchemy_store.SqlAlchemyStore._run_with_deadlock_retry",
        *("validation._validate_metric", "validation._validate_metric_name", "validation._is_numeric"),
    ),
    (GET,): ("handlers._get_run", "handlers.get_run_impl", "sqlalchemy_store.SqlAlchemyStore.get_run"),
    (SEARCH,): (
        *("handlers._search_runs", "handlers.search_runs_impl", "sqlalchemy_store.SqlAlchemyStore._search_runs"),
        *("sqlalchemy_store._get_orderby_clauses", "sqlalchemy_store._get_sqlalchemy_filter_clauses"),
        "sqlalchemy_store.SqlAlchemyStore._get_model_outputs_bulk",
        "sqlalchemy_store.SqlAlchemyStore._filter_experiment_ids",
    ),
    (HISTORY,): ("handlers._get_metric_history", "sqlalchemy_store.SqlAlchemyStore.get_metric_history"),
    (SEARCH, HISTORY): (
        *("search_utils.SearchUtils.parse_start_offset_from_page_token", "search_utils.SearchUtils.create_page_token"),
    ),
    _RUNS: (
        *("run.Run", "run_info.RunInfo", "run_data.RunData", "run_inputs.RunInputs", "run_outputs.RunOutputs"),
        *("logged_model_input.LoggedModelInput", "logged_model_output.LoggedModelOutput", "models.SqlInput"),
        *("sqlalchemy_store.SqlAlchemyStore._get_run_inputs", "sqlalchemy_store.SqlAlchemyStore._get_model_inputs"),
        "sqlalchemy_store.SqlAlchemyStore._get_model_outputs",
    ),
    (*_RUNS, LOG_BATCH): ("run_tag.RunTag", "models.SqlTag", "param.Param", "models.SqlParam"),
    (*_LOGGING, HISTORY): ("models.SqlMetric",),
}
"""The definitions that only the shortcuts in the key use. All shortcuts use the other definitions of `SOURCES`."""

RESTS_ON: dict[str, frozenset[str]] = {
    shortcut: frozenset(COMPARED)
    - {source for shortcuts, sources in ONLY.items() if shortcut not in shortcuts for source in sources}
    for shortcut in SHORTCUTS
}


def tracking_store(store_uri: str, artifact_uri: str | None = None) -> Any:
    """Return the tracking store for a PostgreSQL URI. Only the server passes `artifact_uri`. Other programs that import
    MLflow get MLflow's own store."""
    from mlflow import environment_variables
    from mlflow.server.handlers import TrackingStoreRegistryWrapper

    workspaces: Any = getattr(environment_variables, "MLFLOW_ENABLE_WORKSPACES", None)  # since MLflow 3.10
    plain = artifact_uri is None or (workspaces and workspaces.get())
    if plain or switched_off(installed_mlflow()).keys() >= set(SHORTCUTS):
        return TrackingStoreRegistryWrapper._get_sqlalchemy_store(store_uri, artifact_uri or ARTIFACT_ROOT)
    from mlflow_host.server.fast_path.store import DirectStore

    return DirectStore(store_uri, artifact_uri)


def installed_mlflow() -> Path:
    """Return the folder of the installed package `mlflow`."""
    import mlflow

    return Path(mlflow.__file__).parent


def not_compared(package: Path) -> list[str]:
    """Return the names in `SOURCES` whose definition in the folder `package` differs from all tested releases."""
    return sorted(name for name, found in hashes(package).items() if found not in COMPARED.get(name, ()))


def switched_off(package: Path) -> dict[str, list[str]]:
    """Return the shortcuts that are disabled for the MLflow in `package`, each with a list of the definitions that
    differ."""
    different = not_compared(package)
    found = {shortcut: [name for name in different if name in RESTS_ON[shortcut]] for shortcut in SHORTCUTS}
    return {shortcut: names for shortcut, names in found.items() if names}


@cache
def hashes(package: Path) -> dict[str, str]:
    """Return the hash of each definition in `SOURCES`, by file and name, for the MLflow in the folder `package`."""
    found = {}
    for file, names in SOURCES.items():
        path = package / file
        texts = definitions(path.read_text()) if path.exists() else {}
        for name in names:
            text = texts.get(name)
            found[f"{path.stem}.{name}"] = hashlib.sha256(text.encode()).hexdigest()[:10] if text else ABSENT
    return found


def definitions(source: str) -> dict[str, str]:
    """Return the source code of every function and class, with decorators and nested functions, by qualified name. If a
    name has several definitions, the value contains the source code of all definitions."""
    lines = source.split("\n")
    found: dict[str, str] = {}

    def collect(node: ast.AST, within: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = within + child.name
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                text = "\n".join(lines[first - 1 : child.end_lineno])
                found[name] = f"{found[name]}\n{text}" if name in found else text
                if isinstance(child, ast.ClassDef):
                    collect(child, f"{name}.")
            elif not isinstance(child, ast.expr):  # an `if`, `try` or `with` may contain definitions
                collect(child, within)

    collect(ast.parse(source), "")
    return found
