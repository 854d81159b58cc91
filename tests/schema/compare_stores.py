"""Send the same calls to MLflow's own tracking store and to `DirectStore`, and print both results as JSON.

Each store has its own database. The results contain the responses and the stored rows. HTTP requests go to MLflow's
Flask application; for `DirectStore`, the fast path's middleware handles them first. The script uses the MLflow release
that is installed for its interpreter.

    python compare_stores.py URI_FOR_MLFLOWS URI_FOR_OURS SEED
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import json
import logging
import math
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

warnings.filterwarnings("ignore")

import mlflow  # noqa: E402
from mlflow.entities import (  # noqa: E402
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelInput,
    LoggedModelOutput,
    RunTag,
)
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.server import app, handlers  # noqa: E402
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # noqa: E402
from packaging.version import Version  # noqa: E402
from sqlalchemy import text  # noqa: E402

from mlflow_host.server.fast_path.app import ANSWERS, PREFIXES, answer_or_none  # noqa: E402
from mlflow_host.server.fast_path.store import DirectStore  # noqa: E402

Call = tuple[str, Callable[[SqlAlchemyStore, list[str]], Any]]
"""A description, and a function that makes the call with a store and the IDs of the runs created earlier."""

TIME = 1_700_000_000_000
VALUES = (0.25, 1, -3.5, 0.0, -0.0, 1e-300, 1e300, math.nan, math.inf, -math.inf, 5e-324, 0.1 + 0.2)
KEYS = ("loss", "val/acc", "a b", "ü", "m-0", "m_1", "m.2")

FILTERS = (
    None,
    "",
    "metrics.loss > 0.1",
    "metrics.loss >= 0 and metrics.`val/acc` < 10",
    "metrics.loss != 0",
    "metrics.`a b` = 0",
    "params.p1 = 'one'",
    "params.p1 LIKE '%n%' and tags.team ILIKE 'RED%'",
    "tags.team IN ('red', 'blue')",
    "attributes.status = 'RUNNING'",
    "attributes.run_name = 'first'",
    "attributes.run_name LIKE 'f%'",
    "attributes.start_time > 1700000000001",
    "attributes.user_id != 'ada'",
    "datasets.name = 'corpus'",
    "datasets.name LIKE 'c%' and metrics.loss > -10",
    "dataset.digest = 'd1'",
    "metrics.loss > 'x'",
    "nonsense",
    "metrics.loss >",
    "params.p1 = 1",
)
ORDERS: tuple[list[str] | None, ...] = (
    None,
    [],
    ["metrics.loss DESC"],
    ["metrics.loss ASC", "params.p1 DESC", "tags.team"],
    ["attributes.start_time ASC"],
    ["start_time DESC", "attributes.run_name"],
    ["attributes.end_time DESC"],
    ["metrics.loss", "metrics.loss"],
    ["nonsense.x"],
)


REFUSES_SECOND_NAN = Version(mlflow.__version__) < Version("3.16")
"""Releases before 3.16 answer a batch that repeats a stored NaN value with status 400. The fast path accepts such a
batch."""


def metric(chance: random.Random) -> dict[str, Any]:
    """Return a random metric in the form in which clients send metrics."""
    value, step = chance.choice(VALUES), chance.choice([-2, 0, 1, 2, 3])
    if math.isnan(value) and REFUSES_SECOND_NAN:
        step = chance.randrange(10, 10**9)
    told = value if math.isfinite(value) else {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]
    return {"key": chance.choice(KEYS), "value": told, "timestamp": TIME + chance.randrange(4), "step": step}


def calls(chance: random.Random) -> Iterator[Call]:
    yield "create experiment", lambda s, _: s.create_experiment("one", artifact_location="mlflow-artifacts:/x/1")
    yield "create experiment", lambda s, _: s.create_experiment("gone")
    yield "create experiment", lambda s, _: s.create_experiment("two", artifact_location="s3://bucket/a?b=c")
    yield "delete experiment", lambda s, _: s.delete_experiment("2")
    yield "create experiment", lambda s, _: s.create_experiment("four")
    yield from runs_as_they_are_made(chance)
    yield from metrics_one_by_one(chance)
    yield from batches(chance)
    yield from inputs()
    yield "delete run", lambda s, runs: s.delete_run(runs[5])
    one = {"key": "loss", "value": 1.0, "timestamp": TIME, "step": 1}
    yield logging_of("runs/log-metric", one | {"run_id": "<5>"})
    yield logging_of("runs/log-batch", {"run_id": "<5>", "metrics": [one]})
    yield "rename", lambda s, runs: s.set_tag(runs[1], RunTag("mlflow.runName", "renamed"))
    yield from readings(chance)


def runs_as_they_are_made(chance: random.Random) -> Iterator[Call]:
    name = "mlflow.runName"
    tag_lists: list[Any] = [
        tags(**{"mlflow.user": "ada", "team": "red"}),
        tags(**{name: "first"}),
        [],
        tags(**{"team": "red fox", 'a\\b"c,{}': 'it\'s \\ "quoted", {x}\n', "empty": ""}),
        tags(team="blue", nothing=None),
        tags(**{name: "é'\\", "ü": "ö \N{GRINNING FACE} \x7f"}),
        None,
    ]
    for number, some in enumerate(tag_lists * 3):
        experiment, run_name = ("1", "0", "3")[number % 3], (None, "first", "", "é'\\")[number % 4]
        user = ("ada", "", "bob")[number % 3]
        fields = {"experiment_id": experiment, "user_id": user, "start_time": TIME + number, "tags": some}
        yield creation({key: value for key, value in (fields | {"run_name": run_name}).items() if value is not None})
    good = {"experiment_id": "1", "user_id": "ada", "start_time": TIME + 100, "run_name": "odd"}
    odd: list[Any] = [
        good | {"start_time": TIME + 101, "tags": tags(**{name: "x"})},
        good | {"start_time": TIME + 102, "tags": [*tags(twice="1"), *tags(twice="2")]},
        *(good | {"start_time": TIME + 103 + n, "experiment_id": one} for n, one in enumerate(("2", "77", "abc", ""))),
        good | {"start_time": TIME + 107, "experiment_id": "01"},
        *(good | {"start_time": time} for time in (0, -1, "1700000000120", 1700000000121.0)),
        # The following runs also start at 0. Runs with equal start times have no order, so no search includes these
        # runs.
        *(good | {"start_time": time, "experiment_id": "4"} for time in (None, 2**70, 0.5, True)),
        good | {"start_time": TIME + 130, "run_name": "n" * 251},
        good | {"start_time": TIME + 131, "user_id": "u" * 300},
        good | {"start_time": TIME + 132, "user_id": None},
        good | {"start_time": TIME + 133, "run_name": 7},
        good | {"start_time": TIME + 134, "experiment_id": 1},
        *(
            good | {"start_time": TIME + 140 + number, "tags": some}
            for number, some in enumerate(
                (
                    tags(**{"k" * 251: "v"}),
                    tags(k="v" * 9000),
                    tags(nul="\x00"),
                    tags(half="\ud800"),
                    [{"key": "no value"}],
                    [{"value": "no key"}],
                    tags(number=7),
                    [{"key": "k", "value": "v", "more": "x"}],
                    {"key": "k", "value": "v"},
                )
            )
        ),
        {"experiment_id": "4"},
        {"start_time": TIME + 150},
        {"experimentId": "1", "startTime": TIME + 151},
        good | {"start_time": TIME + 152, "more": 1},
        good | {"start_time": TIME + 153, "source_name": "x"},
        [],
        None,
    ]
    yield from map(creation, odd)


def tags(**named: Any) -> list[dict[str, Any]]:
    return [{"key": key, "value": value} for key, value in named.items()]


def creation(fields: Any) -> Call:
    return f"create run {str(fields)[:200]}", lambda s, _: post(s, "runs/create", fields)


def metrics_one_by_one(chance: random.Random) -> Iterator[Call]:
    for number in range(120):
        fields = metric(chance) | {"run_id": f"<{chance.randrange(5)}>"}
        yield logging_of("runs/log-metric", fields | ({"run_uuid": fields["run_id"]} if number % 2 else {}))
    good = {"run_id": "<0>", "key": "loss", "value": 1.0, "timestamp": TIME, "step": 7}
    odd: list[Any] = [
        *(good | {"value": value} for value in (None, "1.5", "NaN", "nan", "", True, 2, 10**400, [1.0], math.nan)),
        *(good | {"timestamp": time} for time in (None, -1, 0, TIME + 0.5, float(TIME), str(TIME), "x", 2**63, True)),
        *(good | {"step": step} for step in (None, 1.0, 1.5, "1", "x", -(2**63), 2**63 - 1, 2**63)),
        *(good | {"key": key} for key in (None, "", "../up", 'bad"key', "k" * 251, "k" * 250, 7, "nul\x00", "\udfff")),
        *(good | {"run_id": run} for run in ("0" * 32, "nonsense", "", "x" * 40, None, 3)),
        *({key: value for key, value in good.items() if key != left_out} for left_out in good),
        good | {"run_uuid": "<1>"},
        {"run_uuid": "<0>"} | {key: value for key, value in good.items() if key != "run_id"},
        good | {"model_id": "m-" + "4" * 32},
        good | {"model_id": "", "dataset_name": "", "step": 8},
        good | {"dataset_name": "corpus", "dataset_digest": "d1", "step": 9},
        good | {"more": 1},
        {"runId": "<0>", "key": "loss", "value": 1.0, "timestamp": TIME},
        {},
        [],
        "text",
        None,
    ]
    for fields in odd:
        yield logging_of("runs/log-metric", fields)


def batches(chance: random.Random) -> Iterator[Call]:
    for number in range(60):
        several = [metric(chance) for _ in range(chance.choice([1, 2, 20, 200]))]
        if number % 3:
            several = [one for one in several if not isinstance(one["value"], str)]
        again = [one for one in several if one["value"] != "NaN" or not REFUSES_SECOND_NAN]
        fields: dict[str, Any] = {"metrics": several + chance.sample(again, len(again) // 2)}
        fields["run_id"] = f"<{chance.randrange(5)}>"
        if number % 2:
            fields["params"] = tags(p1="one", p2="")[: number % 3]
            fields["tags"] = tags(team="red", note="n")[: number % 2]
        yield logging_of("runs/log-batch", fields)
    one, none = {"key": "loss", "value": 1.0, "timestamp": TIME, "step": 9}, {"key": "loss", "timestamp": TIME}
    good = {"run_id": "<0>", "metrics": [one]}
    unusual: list[Any] = [[], None, {}, "x", [one] * 1001, [one, none], [none], [[]], [None]]
    odd: list[Any] = [
        {"run_id": "<0>"},
        *(good | {"metrics": some} for some in unusual),
        *(good | {"metrics": [one | {"step": 77, key: None}]} for key in one),
        *(good | {"metrics": [one | {"step": step}]} for step in (2**63, "7", 7.5, True)),
        *(good | {"metrics": [one | {"value": value, "step": 10}]} for value in ("x", True, 10**400, 3)),
        *(good | {"metrics": [one | {"key": key}]} for key in ("", "../up", "k" * 251, 7, "n\x00")),
        good | {"metrics": [{"key": "bare", "value": 1.0, "timestamp": TIME}]},
        good | {"metrics": [one | {"step": 11, "run_id": "<1>", "dataset_name": "corpus"}]},
        good | {"metrics": [one | {"step": 12, "model_id": "m-" + "5" * 32}]},
        good | {"metrics": [one | {"more": 1}]},
        good | {"params": tags(p1="changed")},
        good | {"params": [*tags(same="1"), *tags(same="2")]},
        good | {"tags": tags(**{"mlflow.runName": "by batch"})},
        good | {"params": None, "tags": None},
        {"run_id": "<0>", "metrics": [none], "params": tags(kept="?")},
        *(good | {"run_id": run} for run in ("0" * 32, "nonsense", "", None, 5, "<5>x")),
        {"metrics": [one]},
        good | {"run_uuid": "<0>"},
        good | {"more": 1},
        [],
        None,
    ]
    for fields in odd:
        yield logging_of("runs/log-batch", fields)
    where, text = "runs/log-batch", json.dumps(good)
    for body, kind in ((b"{", "application/json"), (b"", "application/json"), (text.encode(), "text/plain")):
        yield post_of(f"{where} of {body!r} {kind}", where, body, kind)


def logging_of(path: str, fields: Any) -> Call:
    return f"{path} {str(fields)[:300]}", lambda s, runs: post(s, path, filled(fields, runs))


def post_of(what: str, path: str, body: bytes, kind: str) -> Call:
    """Return a call that posts `body`, which may be invalid JSON. <0> in `body` stands for the ID of the first run."""
    return what, lambda s, runs: ask(s, "POST", path, body=body.replace(b"<0>", runs[0].encode()), kind=kind)


def get_of(what: str, path: str, fields: Any) -> Call:
    return what, lambda s, runs: get(s, path, **filled(fields, runs))


def query_of(what: str, path: str, query: str) -> Call:
    return what, lambda s, _: ask(s, "GET", path, query)


def pages_of(what: str, path: str, fields: Any) -> Call:
    return what, lambda s, _: pages(s, path, fields)


def inputs() -> Iterator[Call]:
    def corpus(digest: str, *tags: InputTag) -> DatasetInput:
        return DatasetInput(Dataset("corpus", digest, "local", "{}", "s", "p"), list(tags))

    first = [corpus("d1", InputTag("mlflow.data.context", "train"), InputTag("x", "y")), corpus("d2")]
    yield "log inputs", lambda s, runs: s.log_inputs(runs[0], first)
    yield "log inputs", lambda s, runs: s.log_inputs(runs[3], [corpus("d1")])
    yield "log model inputs", lambda s, runs: s.log_inputs(runs[0], models=[LoggedModelInput("m-" + "1" * 32)])
    yield "log outputs", lambda s, runs: s.log_outputs(runs[0], [LoggedModelOutput("m-" + "2" * 32, 3)])
    yield "log outputs", lambda s, runs: s.log_outputs(runs[4], [LoggedModelOutput("m-" + "3" * 32, 0)])
    yield "log outputs", lambda s, runs: s.log_outputs(runs[3], [LoggedModelOutput("of two words", 1)])


def readings(chance: random.Random) -> Iterator[Call]:
    yield from runs_by_id()
    yield from searches(chance)
    yield from histories()


def runs_by_id() -> Iterator[Call]:
    for number in range(18):
        yield get_of(f"get run {number}", "runs/get", {"run_id": f"<{number}>"})
    for run in ("0" * 32, "", "it's", "ü", "\x00"):
        yield get_of(f"get run {run!r}", "runs/get", {"run_id": run})
    odd: tuple[dict[str, Any], ...] = (
        {},
        {"run_uuid": "<0>"},
        {"run_id": "<0>", "run_uuid": "<0>"},
        {"run_id": "<0>", "run_uuid": "<1>"},
        {"run_id": ["<0>", "<1>"]},
        {"run_id": "<0>", "more": "x"},
        {"runId": "<0>"},
    )
    for fields in odd:
        yield get_of(f"get run by {fields}", "runs/get", fields)


def searches(chance: random.Random) -> Iterator[Call]:
    for where in FILTERS:
        for order in ORDERS:
            fields: dict[str, Any] = {"max_results": chance.choice([1, 3, 1000])}
            fields["experiment_ids"] = chance.choice([["0", "1", "3"], ["1"], ["0", "3"], ["1", "99"]])
            fields |= {} if where is None else {"filter": where}
            fields |= {} if order is None else {"order_by": order}
            if view := chance.choice([None, "ACTIVE_ONLY", "ALL", "DELETED_ONLY"]):
                fields["run_view_type"] = view
            yield pages_of(f"search {fields}", "runs/search", fields)
    every = {"experiment_ids": ["0", "1", "3"], "run_view_type": "ALL"}
    odd: tuple[Any, ...] = (
        *({"experiment_ids": scope} for scope in ([], ["abc"], [" 1"], ["-1"], ["99999999999"], "1", [1], None)),
        *(every | {"max_results": most} for most in (0, -1, 50_000, 50_001, "7", 7.0, True, None, 2**40)),
        *(every | {"page_token": token} for token in ("nonsense", "", None, 3)),
        *(every | {"run_view_type": view} for view in (1, 3, 77, "SOME", None)),
        *(every | {"filter": where} for where in (7, None, "metrics.loss > 0.1 or 1", "metrics.`ü` > 0", "\x00")),
        *(every | {"order_by": order} for order in ("metrics.loss", [7], [None], ["metrics.`ü` DESC", "tags.team"])),
        every | {"filter": "metrics.loss > 0", "order_by": ["metrics.loss DESC", "metrics.`val/acc`", "params.p1"]},
        every | {"filter": "metrics.loss > 0 and metrics.loss < 9", "order_by": ["metrics.loss", "start_time"]},
        every | {"filter": "params.p1 = 'one' and tags.team = 'red'", "order_by": ["tags.team", "params.p1 DESC"]},
        every | {"filter": "tags.team != 'red'", "order_by": ["tags.team DESC", "attributes.start_time ASC"]},
        every | {"filter": "attributes.run_name = 'first'", "order_by": ["tags.`mlflow.runName`", "attributes.status"]},
        every | {"filter": "params.p1 IS NOT NULL and metrics.loss IS NULL", "order_by": ["metrics.loss"]},
        every | {"filter": "attributes.run_id IN ('x', 'y')"},
        every | {"max_results": 4, "order_by": ["metrics.loss DESC"]},
        every | {"filter": "metrics.loss > " + "0" * 5000},
        every | {"experimentIds": ["1"]},
        every | {"more": 1},
        "text",
        [1],
        None,
    )
    for fields in odd:
        yield pages_of(f"search {str(fields)[:200]}", "runs/search", fields)
    for body, kind in (
        (b"", "application/json"),
        (b"{", "application/json"),
        (b'{"experiment_ids": ["1"], "experiment_ids": ["0"]}', "application/json; charset=utf-8"),
        (b'{"experiment_ids": ["1"]}', "text/plain"),
        (b'{"experiment_ids": ["1"], "filter": "\xff"}', "application/json"),
        (json.dumps(json.dumps(every)).encode(), "application/json"),
    ):
        yield post_of(f"search {body!r} {kind}", "runs/search", body, kind)
    yield query_of("search by GET", "runs/search", "experiment_ids=1")


def histories() -> Iterator[Call]:
    where = "metrics/get-history"
    for run in range(5):
        for key in (*KEYS, "none"):
            fields = {"run_id": f"<{run}>", "run_uuid": f"<{run}>", "metric_key": key, "max_results": "25000"}
            yield get_of(f"history {fields}", where, fields)
    yield (
        "history by page",
        lambda s, runs: pages(s, where, {"run_id": runs[0], "metric_key": "loss", "max_results": 2}),
    )
    yield "whole pages", lambda s, runs: pages(s, where, {"run_id": runs[1], "metric_key": "loss", "max_results": 1})
    good: dict[str, Any] = {"run_id": "<0>", "metric_key": "loss", "max_results": "3"}
    odd: tuple[dict[str, Any], ...] = (
        *(good | {"max_results": most} for most in ("0", "-1", "", "x", "2147483647", "2147483648", "1.0", " 2")),
        *(good | {"page_token": token} for token in ("nonsense", "", "Mg==")),
        *(good | {"metric_key": key} for key in ("", 'quo"te', "a%s", ["loss", "loss"])),
        good | {"run_id": "nonsense"},
        good | {"run_id": ""},
        good | {"more": "1"},
        {"run_id": "<0>", "max_results": "3"},
        {"metric_key": "loss", "max_results": "3"},
    )
    for fields in odd:
        yield get_of(f"history {fields}", where, fields)
    for query in ("run_id=%ff&metric_key=loss&max_results=3", "metric_key", "run_id=a;metric_key=b", "%", "&"):
        yield query_of(f"history {query}", where, query)


def filled(fields: Any, runs: list[str]) -> Any:
    """Return `fields` with run numbers such as <5> replaced by the IDs of the runs."""
    return json.loads(re.sub("<([0-9]+)>", lambda place: runs[int(place[1])], json.dumps(fields)))


def get(store: SqlAlchemyStore, path: str, **fields: Any) -> Any:
    return ask(store, "GET", path, urlencode(fields, doseq=True))


def post(store: SqlAlchemyStore, path: str, fields: Any) -> tuple[int, Any]:
    return ask(store, "POST", path, body=json.dumps(fields).encode())


def pages(store: SqlAlchemyStore, path: str, fields: Any) -> list[Any]:
    """Return the response to a request, and the responses to the requests for the next pages."""
    found: list[Any] = []
    while len(found) < 12:
        by_get = path.startswith("metrics/")
        more = get(store, path, **fields) if by_get else post(store, path, fields)
        found.append(more)
        if not (isinstance(fields, dict) and "next_page_token" in more[1]):
            break
        fields = fields | {"page_token": more[1]["next_page_token"]}
    return found


class CountingStore(DirectStore):
    """A `DirectStore` that counts in `statements` how many cursors the fast path opened."""

    statements = 0

    @contextmanager
    def cursor(self) -> Iterator[Any]:
        self.statements += 1
        with super().cursor() as cursor:
            yield cursor


answered: Counter[str] = Counter()
"""For each path, the number of requests that the fast path handled, and the number that it passed to MLflow."""


def ask(
    store: SqlAlchemyStore, method: str, path: str, query: str = "", body: bytes = b"", kind: str = "application/json"
) -> tuple[int, Any]:
    """Send a request to the store, and return the status and the JSON of the response."""
    if isinstance(store, DirectStore) and (answer := ANSWERS.get((method, f"/{path}"))):
        headers = [(b"host", b"localhost"), (b"content-type", kind.encode())]
        scope = {"method": method, "query_string": query.encode(), "headers": headers}
        found = answer_or_none(answer, store, scope, body)
        answered[f"{path} {'itself' if found else 'not'}"] += 1
        if found:
            return found[0], json.loads(found[1].decode("ascii"))
    handlers._tracking_store = store  # type: ignore[assignment]  # MLflow assigns None without a type annotation
    address = f"{PREFIXES[0]}/{path}" + (f"?{query}" if query else "")
    told = app.test_client().open(address, method=method, data=body, content_type=kind)
    return told.status_code, told.json if told.is_json else told.get_data(as_text=True)


def transcript(store: SqlAlchemyStore, seed: int) -> list[str]:
    runs: list[str] = []
    lines = []
    for number, (what, call) in enumerate(calls(random.Random(seed))):
        random.seed(number)  # MLflow generates run names at random
        try:
            answer = call(store, runs)
            if what.startswith("create run") and answer[0] == 200:
                runs.append(answer[1]["run"]["info"]["run_id"])
            said = shown(answer)
        except MlflowException as error:
            said = f"{error.error_code}: {error.message}"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        # After an error of PostgreSQL, MLflow's message contains the SQL statement with IDs and times.
        said = said.split("[SQL:")[0]
        for place, run in enumerate(runs):
            said = said.replace(run, f"<run {place}>")
        said = re.sub("[0-9a-f]{32}", "<id>", said)
        lines.append(f"{what}: {said}")
    return lines


def shown(answer: Any) -> str:
    """Return as text everything that clients can read from a response. Lists without a defined order are sorted."""
    if isinstance(answer, dict):
        return "{" + ", ".join(f"{key}: {shown(answer[key])}" for key in sorted(answer)) + "}"
    if isinstance(answer, (list, tuple)):
        lines = list(map(shown, answer))
        by_key = answer and all(isinstance(one, dict) and {"key", "dataset"} & one.keys() for one in answer)
        return "[" + ", ".join(sorted(lines) if by_key else lines) + "]"
    if hasattr(answer, "info"):
        words = answer.to_proto()
        for field in (words.data.metrics, words.data.params, words.data.tags, words.inputs.dataset_inputs):
            field.sort(key=str)
        return f"{words} {dict(answer.info)}"
    return str(answer.to_proto()) if hasattr(answer, "to_proto") else repr(answer)


def tables(store: SqlAlchemyStore) -> dict[str, list[str]]:
    """Return the rows of each table. In each row, the name and the start time of a run replace the run's ID."""
    named = "(select coalesce(name, '') || start_time from runs where run_uuid = t.run_uuid)"
    found = {}
    with store.engine.connect() as connection:
        for table in ("metrics", "latest_metrics", "params", "tags"):
            value = ", value::text" if table.endswith("metrics") else ""  # JSON has no -0
            asked = f"select {named}, to_jsonb(t) - 'run_uuid'{value} from {table} t"
            found[table] = sorted(map(str, connection.execute(text(asked))))
        location = "jsonb_build_object('artifact_uri', replace(artifact_uri, run_uuid, ''))"
        asked = f"select to_jsonb(t) - 'run_uuid' - 'deleted_time' || {location} from runs t"
        found["runs"] = sorted(str(row) for row in connection.execute(text(asked)))
    return found


def main() -> None:
    logging.disable()  # Flask logs every response with status 500
    own_uri, direct_uri, seed = sys.argv[1:]
    own = SqlAlchemyStore(own_uri, "mlflow-artifacts:/")
    direct = CountingStore(direct_uri, "mlflow-artifacts:/")
    print(
        json.dumps(
            {
                "own": transcript(own, int(seed)),
                "direct": transcript(direct, int(seed)),
                "own tables": tables(own),
                "direct tables": tables(direct),
                "statements": direct.statements,
                "answered": answered,
            }
        )
    )


if __name__ == "__main__":
    main()
