"""Which tracking store serves: ours (`mlflow_host.direct_store`, with `mlflow_host.direct_answers`) where the installed
MLflow words what they repeat or rely on as it was compared, and MLflow's own otherwise, until somebody has compared the
new wording as well.

Wordings are told apart by hashes of the sources' text, read as text: that takes a few milliseconds and no import, and
says the same under every Python.

Entry point `mlflow.tracking_store`: `postgresql`. MLflow loads it while it is being imported itself.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

ABSENT = ""

SOURCES: dict[str, tuple[str, ...]] = {
    "server/handlers.py": (
        *("_create_run", "_log_metric", "_log_batch"),
        *("_get_run", "get_run_impl", "_search_runs", "search_runs_impl", "_get_metric_history"),
        *("_get_request_message", "_get_normalized_request_json", "_get_request_json"),
        *("_disable_if_artifacts_only", "_reject_conflicting_field_aliases"),
    ),
    "utils/proto_json_utils.py": ("message_to_json", "_mark_int64_fields", "_merge_json_dicts", "parse_dict"),
    "utils/search_utils.py": ("parse_start_offset_from_page_token", "create_page_token"),
    "store/tracking/sqlalchemy_store.py": (
        *("create_run", "get_run", "_get_run", "log_metric", "log_batch", "_log_metrics", "_log_metrics_once"),
        *("_log_model_metrics", "_update_latest_metrics_if_necessary", "sanitize_metric_value"),
        *("_run_with_deadlock_retry", "get_metric_history", "_search_runs", "_get_run_inputs", "_get_model_inputs"),
        *("_get_model_outputs", "_get_model_outputs_bulk", "_check_run_is_active", "_check_experiment_is_active"),
        *("_get_query", "_get_experiment", "get_experiment", "_filter_experiment_ids", "_validate_run_accessible"),
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
"""Functions, methods and classes by the file of the package `mlflow` that has them."""


COMPARED: dict[str, tuple[str, ...]] = {
    "handlers._create_run": ("0eab8e0a53",),
    "handlers._log_metric": ("6ff7995f60",),
    "handlers._log_batch": ("c595516da4",),
    "handlers._get_run": ("5264f6dfec",),
    "handlers.get_run_impl": ("02cdfe0f84",),
    "handlers._search_runs": ("a927e61c70",),
    "handlers.search_runs_impl": ("f326ae8ff2",),
    "handlers._get_metric_history": ("d46fe30ba6", "c606c24c87"),
    "handlers._get_request_message": ("c215ac6f82", "d835807c60", "4926d27e25"),
    "handlers._get_normalized_request_json": ("d1fe316339",),
    "handlers._get_request_json": ("e1c26f6e5f",),
    "handlers._disable_if_artifacts_only": ("7634dac1f1",),
    "handlers._reject_conflicting_field_aliases": ("", "b2f0eb69e7"),
    "proto_json_utils.message_to_json": ("2ba9f5aa8d", "60ee9520b3", "2e3e3c02ee"),
    "proto_json_utils._mark_int64_fields": ("4b4cf31346",),
    "proto_json_utils._merge_json_dicts": ("acaf082721",),
    "proto_json_utils.parse_dict": ("dc0d78c5fe",),
    "search_utils.parse_start_offset_from_page_token": ("24c0e899a7",),
    "search_utils.create_page_token": ("24ed628858",),
    "sqlalchemy_store.create_run": ("c2f2a3a382", "39ef387ac4", "fffde889d9"),
    "sqlalchemy_store.get_run": ("b8d90f08da",),
    "sqlalchemy_store._get_run": ("8753266d90",),
    "sqlalchemy_store.log_metric": ("5df74fb0e4",),
    "sqlalchemy_store.log_batch": ("f6b078cb01", "11e1db48e4"),
    "sqlalchemy_store._log_metrics": ("0f6d8fe268", "7affae7cda", "a3f7d70ce5"),
    "sqlalchemy_store._log_metrics_once": ("", "f2582fee23"),
    "sqlalchemy_store._log_model_metrics": ("8a35c5bd99", "e8efc9d1af"),
    "sqlalchemy_store._update_latest_metrics_if_necessary": ("62934cfbbe", "4f6354d3e9"),
    "sqlalchemy_store.sanitize_metric_value": ("fc477c0381",),
    "sqlalchemy_store._run_with_deadlock_retry": ("", "43eab09448", "4a2bf98ace"),
    "sqlalchemy_store.get_metric_history": ("b55bf89efb",),
    "sqlalchemy_store._search_runs": ("f98c85d03d", "64cd048576"),
    "sqlalchemy_store._get_run_inputs": ("f3eca1459d",),
    "sqlalchemy_store._get_model_inputs": ("4b494e6be2",),
    "sqlalchemy_store._get_model_outputs": ("a5e9291262",),
    "sqlalchemy_store._get_model_outputs_bulk": ("3a78bc3a60",),
    "sqlalchemy_store._check_run_is_active": ("f0b7858817",),
    "sqlalchemy_store._check_experiment_is_active": ("022bf58a16",),
    "sqlalchemy_store._get_query": ("c8e1128b63", "2f05c9b259"),
    "sqlalchemy_store._get_experiment": ("560a47478f", "efb04814c1"),
    "sqlalchemy_store.get_experiment": ("32e4344e10", "d5c64e692a"),
    "sqlalchemy_store._filter_experiment_ids": ("3575c4a45c", "18f43a1243"),
    "sqlalchemy_store._validate_run_accessible": ("bacb6b1c68",),
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
"""The wordings that were compared: MLflow 3.11.1 to 3.18.0, every release on PyPI."""


def tracking_store(store_uri: str, artifact_uri: str | None = None) -> Any:
    """The store for a URI of PostgreSQL's; the server tells where artifacts are, programs that log do not."""
    import mlflow
    from mlflow.environment_variables import MLFLOW_ENABLE_WORKSPACES
    from mlflow.server.handlers import TrackingStoreRegistryWrapper
    from mlflow.tracking._tracking_service import utils as client

    if artifact_uri is None:
        return client._get_sqlalchemy_store(store_uri, artifact_uri)
    if MLFLOW_ENABLE_WORKSPACES.get() or not_compared(Path(mlflow.__file__).parent):
        return TrackingStoreRegistryWrapper._get_sqlalchemy_store(store_uri, artifact_uri)
    from mlflow_host.direct_store import DirectStore

    return DirectStore(store_uri, artifact_uri)


def not_compared(package: Path) -> list[str]:
    """What the MLflow in the folder `package` words otherwise than every release that was compared."""
    return sorted(name for name, found in hashes(package).items() if found not in COMPARED.get(name, ()))


def hashes(package: Path) -> dict[str, str]:
    """The hash of everything in `SOURCES`, by file and name, as the MLflow in the folder `package` has it."""
    found = {}
    for file, names in SOURCES.items():
        path = package / file
        lines = path.read_text().splitlines() if path.exists() else []
        for name in names:
            text = definition(lines, name)
            found[f"{path.stem}.{name}"] = hashlib.sha256(text.encode()).hexdigest()[:10] if text else ABSENT
    return found


def definition(lines: list[str], name: str) -> str:
    """The text of the first function, method or class of this name; empty where there is none."""
    openings = (f"def {name}(", f"class {name}(", f"class {name}:")
    start = next((number for number, line in enumerate(lines) if line.lstrip().startswith(openings)), None)
    if start is None:
        return ""
    indent = len(lines[start]) - len(lines[start].lstrip())
    end = start + 1
    while end < len(lines) and not ends(lines[end], indent):
        end += 1
    return "\n".join(lines[start:end]).rstrip()


def ends(line: str, indent: int) -> bool:
    """Whether a line begins what comes after a definition that is indented so far."""
    text = line.lstrip()
    return bool(text) and len(line) - len(text) <= indent and not text.startswith(")")
