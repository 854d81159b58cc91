"""The verdict: compare the data from the new server's API with the source's rows, value by value.

The expected values come from the source's rows in the source's own schema. The found values come from the API's
responses. IDs, names and locations that the adoption changed on purpose are translated before the comparison. Most
MLflow clients cannot read some kinds of data, such as datasets, scorers and labels. The machine compares the rows of
these kinds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow_host.contract.adoption import ADOPTED_TAG, Manifest
from scripts.adopting import row_files
from scripts.adopting.target import Api

SHOWN = 20
PLACE_TAG = "mlflow.artifactLocation"
MOVED_TAGS = ("mlflow.traceName", "mlflow.trace.", "mlflow.traceInputs", "mlflow.traceOutputs")
"""Keys, and beginnings of keys, of tags that MLflow's migration 75868b020152 moves to columns of traces and spans."""
API_TABLES = frozenset(
    {
        "experiments", "experiment_tags", "runs", "params", "tags", "metrics", "latest_metrics", "registered_models",
        "registered_model_tags", "registered_model_aliases", "model_versions", "model_version_tags", "logged_models",
        "trace_info", "trace_tags",
    }
)  # fmt: skip

Values = dict[tuple[str, ...], Any]
"""A dict from the key of each value to the value."""


@dataclass
class Kind:
    """The result for one kind of data: the number of values in the source (`there`), the numbers of unchanged
    (`carried`), missing and changed values, and descriptions of the missing and changed values (`lines`)."""

    kind: str
    there: int = 0
    carried: int = 0
    missing: int = 0
    changed: int = 0
    lines: list[str] = field(default_factory=list)


def compare(kind: str, source: Values, found: Values) -> Kind:
    result = Kind(kind, len(source))
    for key, value in source.items():
        if key not in found:
            result.missing += 1
            problem = "is missing"
        elif not same(value, found[key]):
            result.changed += 1
            problem = f"is {str(found[key])[:80]!r} instead of {str(value)[:80]!r}"
        else:
            result.carried += 1
            continue
        if len(result.lines) < SHOWN:
            result.lines.append(f"{kind} {' / '.join(key)} {problem}")
    return result


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal. Two NaN values count as equal."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    return bool(one == other)


@dataclass(frozen=True)
class Source:
    """The source's rows, with functions that translate old IDs and names to those on the new server."""

    folder: Path
    manifest: Manifest
    prepared: dict[str, Any]

    def rows(self, table: str, *columns: str) -> Iterator[tuple[str | None, ...]]:
        return row_files.read(self.folder, self.manifest, table, columns)

    def experiment(self, old: str | None) -> str | None:
        new = self.prepared["experiments"].get(old)
        return None if new is None else str(new)

    def model(self, old: str | None) -> str | None:
        found = self.prepared["models"].get(old)
        return None if found is None else str(found)


def by_api(source: Source, api: Api, say: Callable[[str], None]) -> list[Kind]:
    """Compare all kinds that the API returns. The results have a fixed order."""
    say("reading everything back through the server's API")
    with ThreadPoolExecutor(8) as pool:
        experiments, tags = experiments_there(api)
        results = [
            compare("experiments", experiments_of(source), experiments),
            compare("experiment tags", experiment_tags_of(source), tags),
        ]
        live = _ids(source)
        results += compare_runs(source, api, live, pool)
        results += compare_registry(source, api)
        results += compare_models_and_traces(source, api, live)
    return results


def _ids(source: Source) -> list[str]:
    return sorted({str(new) for new in source.prepared["experiments"].values() if new is not None}, key=int)


def pages(ask: Callable[..., dict[str, Any]], path: str, items: str, /, **query: Any) -> Iterator[dict[str, Any]]:
    token = None
    while True:
        answer = ask(path, **query, **({"page_token": token} if token else {}))
        yield from answer.get(items, ())
        token = answer.get("next_page_token")
        if not token:
            return


def number(text: Any) -> Any:
    """`text` as an integer, or None if `text` is None or empty. SQLite allows any text in a number column, so other
    text is returned unchanged."""
    if text is None or text == "":
        return None
    try:
        return int(text)
    except ValueError:
        return text


def pairs(listed: Any) -> dict[str, str]:
    return {entry["key"]: entry.get("value", "") for entry in listed or ()}


# Experiments


def experiments_of(source: Source) -> Values:
    found: Values = {}
    for old, stage, created in source.rows("experiments", "experiment_id", "lifecycle_stage", "creation_time"):
        new = source.experiment(old)
        if new is None or (new == "0" and source.prepared["default_is_ours"]):
            continue
        found[new, "name"] = source.prepared["names"][old]
        found[new, "lifecycle stage"] = stage
        if created is not None:
            found[new, "creation time"] = int(created)
    return found


def experiment_tags_of(source: Source) -> Values:
    found: Values = {}
    for old, key, value in source.rows("experiment_tags", "experiment_id", "key", "value"):
        new = source.experiment(old)
        if new is not None and key != ADOPTED_TAG:
            found[new, str(key)] = value or ""
    return found


def experiments_there(api: Api) -> tuple[Values, Values]:
    found: Values = {}
    tags: Values = {}
    search = "/api/2.0/mlflow/experiments/search"
    for each in pages(api.post, search, "experiments", max_results=1000, view_type="ALL"):
        number_here = each["experiment_id"]
        found[number_here, "name"] = each["name"]
        found[number_here, "lifecycle stage"] = each["lifecycle_stage"]
        found[number_here, "creation time"] = number(each.get("creation_time"))
        tags |= {(number_here, key): value for key, value in pairs(each.get("tags")).items()}
    return found, tags


# Runs


RUN_COLUMNS = ("run_uuid", "experiment_id", "name", "user_id", "status", "start_time", "end_time", "lifecycle_stage")


def compare_runs(source: Source, api: Api, experiments: list[str], pool: ThreadPoolExecutor) -> list[Kind]:
    runs: Values = {}
    carried: set[str] = set()
    for run, old, name, user, status, start, end, stage in source.rows("runs", *RUN_COLUMNS):
        new = source.experiment(old)
        if new is None or run is None:
            continue
        carried.add(run)
        runs |= {
            (run, "experiment"): new,
            (run, "user"): user or "",
            (run, "status"): status,
            (run, "start time"): number(start),
            (run, "end time"): number(end) or None,
            (run, "lifecycle stage"): stage,
        }
        if name:
            runs[run, "name"] = name
    params: Values = {
        (r, str(k)): v or "" for r, k, v in source.rows("params", "run_uuid", "key", "value") if r in carried and r
    }
    tags: Values = {
        (r, str(k)): v or ""
        for r, k, v in source.rows("tags", "run_uuid", "key", "value")
        if r in carried and r and k != "mlflow.linkedPrompts"
    }
    columns = ("run_uuid", "key", "value", "timestamp", "step", "is_nan")
    latest: Values = {
        (r, str(k)): (metric(v, nan), number(at), number(step) or 0)
        for r, k, v, at, step, nan in source.rows("latest_metrics", *columns)
        if r in carried and r
    }
    histories: dict[tuple[str, ...], dict[Any, int]] = {}
    for r, k, v, at, step, nan in source.rows("metrics", *columns):
        if r in carried and r:
            point = (str(metric(v, nan)), number(at), number(step) or 0)
            counts = histories.setdefault((r, str(k)), {})
            counts[point] = counts.get(point, 0) + 1
    there: tuple[Values, Values, Values, Values] = ({}, {}, {}, {})
    for few in (experiments[i : i + 50] for i in range(0, len(experiments), 50)):
        search = "/api/2.0/mlflow/runs/search"
        for each in pages(api.post, search, "runs", experiment_ids=few, run_view_type="ALL", max_results=1000):
            _read_run(each, *there)
    long = {key: counts for key, counts in histories.items() if sum(counts.values()) > 1}

    def history(key: tuple[str, ...]) -> tuple[tuple[str, ...], dict[Any, int]]:
        counts: dict[Any, int] = {}
        query = {"run_id": key[0], "metric_key": key[1], "max_results": 25000}
        for each in pages(api.get, "/api/2.0/mlflow/metrics/get-history", "metrics", **query):
            point = (str(_number_of(each["value"])), number(each.get("timestamp")), number(each.get("step")) or 0)
            counts[point] = counts.get(point, 0) + 1
        return key, counts

    points: Values = {}
    points_there: Values = {}
    read = dict(pool.map(history, long))
    for key, counts in histories.items():
        if key in read:
            have = read[key]
        else:
            found = there[3].get(key)
            have = {(str(found[0]), found[1], found[2]): 1} if found else {}
        for point, count in counts.items():
            points[*key, *map(str, point)] = count
            if point in have:
                points_there[*key, *map(str, point)] = have[point]
    return [
        compare("runs", runs, there[0]),
        compare("params", params, there[1]),
        compare("run tags", tags, there[2]),
        compare("latest metrics", latest, there[3]),
        compare("metric points", points, points_there),
    ]


def metric(value: str | None, is_nan: str | None) -> float:
    """A metric's value. MLflow stores an infinite value as the largest or smallest number, which is converted back."""
    if is_nan in ("1", "t", "true"):
        return math.nan
    found = float(value or 0)
    return math.copysign(math.inf, found) if abs(found) >= 1.7976931348623157e308 else found


def _read_run(each: dict[str, Any], runs: Values, params: Values, tags: Values, latest: Values) -> None:
    info, data = each["info"], each.get("data", {})
    run = info["run_id"]
    runs |= {
        (run, "experiment"): info["experiment_id"],
        (run, "user"): info.get("user_id", ""),
        (run, "name"): info.get("run_name", ""),
        (run, "status"): info["status"],
        (run, "start time"): number(info.get("start_time")),
        (run, "end time"): number(info.get("end_time")) or None,
        (run, "lifecycle stage"): info["lifecycle_stage"],
    }
    params |= {(run, key): value for key, value in pairs(data.get("params")).items()}
    tags |= {(run, key): value for key, value in pairs(data.get("tags")).items()}
    for one in data.get("metrics", ()):
        place = (number(one.get("timestamp")), number(one.get("step")) or 0)
        latest[run, one["key"]] = (_number_of(one["value"]), *place)


def _number_of(value: Any) -> float:
    found = float(value)
    return math.copysign(math.inf, found) if abs(found) >= 1.7976931348623157e308 else found


# Registry

PROMPTS = "tags.`mlflow.prompt.is_prompt` = 'true'"


def compare_registry(source: Source, api: Api) -> list[Kind]:
    models: Values = {}
    for old, created, described in source.rows("registered_models", "name", "creation_time", "description"):
        if new := source.model(old):
            models[new, "creation time"] = number(created)
            models[new, "description"] = described or ""
    tags: Values = {}
    for old, key, value in source.rows("registered_model_tags", "name", "key", "value"):
        if new := source.model(old):
            tags[new, str(key)] = value or ""
    aliases: Values = {}
    for old, alias, version in source.rows("registered_model_aliases", "name", "alias", "version"):
        if new := source.model(old):
            aliases[new, str(alias)] = str(version)
    versions: Values = {}
    live: set[tuple[str, str]] = set()
    columns = ("name", "version", "creation_time", "description", "user_id", "current_stage", "run_id", "status")
    for old, version, created, described, user, stage, run, status in source.rows("model_versions", *columns):
        if (new := source.model(old)) and stage != "Deleted_Internal":
            live.add((new, str(version)))
            at = (new, str(version))
            versions |= {
                (*at, "creation time"): number(created),
                (*at, "description"): described or "",
                (*at, "user"): user or "",
                (*at, "stage"): stage,
                (*at, "run"): run or "",
                (*at, "status"): status,
            }
    version_tags: Values = {}
    for old, version, key, value in source.rows("model_version_tags", "name", "version", "key", "value"):
        if (new := source.model(old)) and (new, str(version)) in live:
            version_tags[new, str(version), str(key)] = value or ""
    there: tuple[Values, Values, Values, Values, Values] = ({}, {}, {}, {}, {})
    for kind in ({}, {"filter": PROMPTS}):
        search = "/api/2.0/mlflow/registered-models/search"
        for each in pages(api.get, search, "registered_models", max_results=1000, **kind):
            name = each["name"]
            there[0][name, "creation time"] = number(each.get("creation_timestamp"))
            there[0][name, "description"] = each.get("description", "")
            there[1].update({(name, key): value for key, value in pairs(each.get("tags")).items()})
            there[2].update({(name, a["alias"]): str(a["version"]) for a in each.get("aliases", ())})
        search = "/api/2.0/mlflow/model-versions/search"
        for each in pages(api.get, search, "model_versions", max_results=10000, **kind):
            at = (each["name"], str(each["version"]))
            there[3].update(
                {
                    (*at, "creation time"): number(each.get("creation_timestamp")),
                    (*at, "description"): each.get("description", ""),
                    (*at, "user"): each.get("user_id", ""),
                    (*at, "stage"): each.get("current_stage"),
                    (*at, "run"): each.get("run_id", ""),
                    (*at, "status"): each.get("status"),
                }
            )
            there[4].update({(*at, key): value for key, value in pairs(each.get("tags")).items()})
    return [
        compare("registered models", models, there[0]),
        compare("model tags", tags, there[1]),
        compare("aliases", aliases, there[2]),
        compare("model versions", versions, there[3]),
        compare("version tags", version_tags, there[4]),
    ]


# Logged models and traces


def compare_models_and_traces(source: Source, api: Api, experiments: list[str]) -> list[Kind]:
    active = {old for old, stage in source.rows("experiments", "experiment_id", "lifecycle_stage") if stage == "active"}
    models: Values = {}
    columns = ("model_id", "experiment_id", "name", "creation_timestamp_ms", "model_type", "source_run_id")
    for model, old, name, created, kind, run in source.rows("logged_models", *columns):
        new = source.experiment(old)
        if new and model and old in active:
            models |= {
                (model, "experiment"): new,
                (model, "name"): name or "",
                (model, "creation time"): number(created),
                (model, "type"): kind or "",
                (model, "run"): run or "",
            }
    deleted = {m for m, stage in source.rows("logged_models", "model_id", "lifecycle_stage") if stage == "deleted"}
    models = {key: value for key, value in models.items() if key[0] not in deleted}
    traces: Values = {}
    experiment_of: dict[str, str] = {}
    for trace, old, at, status in source.rows("trace_info", "request_id", "experiment_id", "timestamp_ms", "status"):
        new = source.experiment(old)
        if new and trace and old in active:
            experiment_of[trace] = new
            traces |= {(trace, "experiment"): new, (trace, "time"): number(at), (trace, "state"): status}
    tags: Values = {}
    for trace, key, value in source.rows("trace_tags", "request_id", "key", "value"):
        if trace in experiment_of and key and key != PLACE_TAG and not key.startswith(MOVED_TAGS):
            tags[trace, key] = value or ""
    there: tuple[Values, Values, Values] = ({}, {}, {})
    if models:
        for few in (experiments[i : i + 50] for i in range(0, len(experiments), 50)):
            search = "/api/2.0/mlflow/logged-models/search"
            for each in pages(api.post, search, "models", experiment_ids=few, max_results=50):
                info = each["info"]
                there[0].update(
                    {
                        (info["model_id"], "experiment"): info["experiment_id"],
                        (info["model_id"], "name"): info.get("name", ""),
                        (info["model_id"], "creation time"): number(info.get("creation_timestamp_ms")),
                        (info["model_id"], "type"): info.get("model_type", ""),
                        (info["model_id"], "run"): info.get("source_run_id", ""),
                    }
                )
    for number_here in sorted(set(experiment_of.values()), key=int):
        place = {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": number_here}}
        for each in pages(api.post, "/api/3.0/mlflow/traces/search", "traces", locations=[place], max_results=500):
            trace = each["trace_id"]
            there[1].update(
                {
                    (trace, "experiment"): number_here,
                    (trace, "time"): _milliseconds(each.get("request_time")),
                    (trace, "state"): each.get("state"),
                }
            )
            there[2].update({(trace, key): value for key, value in each.get("tags", {}).items()})
    return [
        compare("logged models", models, there[0]),
        compare("traces", traces, there[1]),
        compare("trace tags", tags, there[2]),
    ]


def _milliseconds(text: Any) -> Any:
    """Milliseconds since 1970. The input is a time such as 2026-11-29T10:00:00.123Z, or a number of milliseconds."""
    from datetime import datetime

    if text is None or isinstance(text, int) or str(text).isdigit():
        return number(text)
    return round(datetime.fromisoformat(str(text).replace("Z", "+00:00")).timestamp() * 1000)


# Rows on the machine


def by_rows(prepared: dict[str, Any], loaded: dict[str, Any]) -> Kind:
    """The result for the tables that `by_api` does not read. The machine compared every column of these tables."""
    result = Kind("rows of other tables")
    for table, count in prepared["counts"].items():
        if table in API_TABLES or not count:
            continue
        counted = loaded["tables"].get(table, {"missing": 0, "changed": 0})
        result.there += count
        result.missing += counted["missing"]
        result.changed += counted["changed"]
        for what in ("missing", "changed"):
            if counted[what]:
                result.lines.append(f"{counted[what]} rows of {table} are {what}")
    result.carried = result.there - result.missing - result.changed
    return result
