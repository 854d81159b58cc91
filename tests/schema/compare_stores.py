"""Asks MLflow's own tracking store and `DirectStore` for the same, each with a database of its own, and prints what
both answered and wrote, as JSON: writes as the stores are called, reads as clients' requests are answered, by MLflow's
Flask application and by `mlflow_host.direct_answers`. Runs under an interpreter that has one release of MLflow.

    python compare_stores.py URI_FOR_MLFLOWS URI_FOR_OURS SEED
"""

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
    Metric,
    Param,
    RunTag,
)
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.server import app, handlers  # noqa: E402
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # noqa: E402
from mlflow_host.direct_answers import ANSWERS, PREFIXES, answer_or_none  # noqa: E402
from mlflow_host.direct_store import DirectStore  # noqa: E402
from packaging.version import Version  # noqa: E402
from sqlalchemy import text  # noqa: E402

Call = tuple[str, Callable[[SqlAlchemyStore, list[str]], Any]]
"""What is asked, for people; and the asking, given the ids of the runs made so far."""

TIME = 1_700_000_000_000
VALUES = (0.25, 1, -3.5, 0.0, 1e-300, 1e300, math.nan, math.inf, -math.inf, 5e-324, 0.1 + 0.2)
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
ORDERS = (
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
"""MLflow refused the whole of a batch with 400 when one of its NaNs was there already. Ours never does."""


def metric(chance: random.Random) -> Metric:
    value, step = chance.choice(VALUES), chance.choice([-2, 0, 1, 2, 3])
    if math.isnan(value) and REFUSES_SECOND_NAN:
        step = chance.randrange(10, 10**9)
    return Metric(chance.choice(KEYS), value, TIME + chance.randrange(4), step)


def calls(chance: random.Random) -> Iterator[Call]:
    yield "create experiment", lambda s, _: s.create_experiment("one", artifact_location="mlflow-artifacts:/x/1")
    yield "create experiment", lambda s, _: s.create_experiment("gone")
    yield "create experiment", lambda s, _: s.create_experiment("two", artifact_location="s3://bucket/a?b=c")
    yield "delete experiment", lambda s, _: s.delete_experiment("2")
    yield from runs_as_they_are_made(chance)
    yield from metrics_one_by_one(chance)
    yield from batches(chance)
    yield from inputs()
    yield "delete run", lambda s, runs: s.delete_run(runs[5])
    yield "log to deleted", lambda s, runs: s.log_metric(runs[5], Metric("loss", 1.0, TIME, 1))
    yield "batch to deleted", lambda s, runs: s.log_batch(runs[5], [Metric("loss", 1.0, TIME, 1)], [], [])
    yield "rename", lambda s, runs: s.set_tag(runs[1], RunTag("mlflow.runName", "renamed"))
    yield from readings(chance)


def runs_as_they_are_made(chance: random.Random) -> Iterator[Call]:
    name = "mlflow.runName"
    tag_lists: list[Any] = [
        [RunTag("mlflow.user", "ada"), RunTag("team", "red")],
        [RunTag(name, "first")],
        [],
        [RunTag("team", "red fox"), RunTag('a\\b"c,{}', 'it\'s \\ "quoted", {x}\n'), RunTag("empty", "")],
        [RunTag("team", "blue"), RunTag("nothing", None)],
        None,
    ]
    for number, tags in enumerate(tag_lists * 3):
        experiment, run_name = ("1", "0", "3")[number % 3], (None, "first", "", "é'\\")[number % 4]
        user = ("ada", "", "bob")[number % 3]
        yield (
            f"create run {number} {run_name!r} {tags}",
            lambda s, _, a=(experiment, user, TIME + number, tags, run_name): s.create_run(*a),
        )
    odd: list[tuple[Any, ...]] = [
        ("1", "ada", TIME + 101, [RunTag(name, "x")], "y"),
        ("1", "ada", TIME + 102, [RunTag("twice", "1"), RunTag("twice", "2")], "n"),
        ("2", "ada", TIME + 103, [], "in a deleted experiment"),
        ("77", "ada", TIME + 104, [], "in none"),
        ("abc", "ada", TIME + 105, [], "in nonsense"),
        ("01", "ada", TIME + 106, [], "in a padded one"),
        ("1", None, TIME + 107, [], "of nobody"),
        ("1", "ada", None, [], "at no time"),
        ("1", "ada", 0, [], "at zero"),
        ("1", "ada", 2**70, [], "too late"),
        ("1", "ada", TIME + 108, [], "n" * 251),
        ("1", "u" * 300, TIME + 109, [], "user"),
        ("1", "ada", TIME + 110, [RunTag("k" * 251, "v")], "key"),
        ("1", "ada", TIME + 111, [RunTag("k", "v" * 9000)], "value"),
        ("1", "ada", TIME + 112, [RunTag("nul", "\x00")], "nul"),
        (1, "ada", TIME + 113, [], "by number"),
    ]
    for arguments in odd:
        yield f"create run {str(arguments)[:150]}", lambda s, _, a=arguments: s.create_run(*a)


def metrics_one_by_one(chance: random.Random) -> Iterator[Call]:
    for _ in range(120):
        one, run = metric(chance), chance.randrange(5)
        yield f"log metric {dict(one)} to {run}", lambda s, runs, m=one, r=run: s.log_metric(runs[r], m)
    odd = [
        Metric("loss", None, TIME, 0),
        Metric("loss", "1.5", TIME, 0),
        Metric("loss", True, TIME, 0),
        Metric("loss", 2, TIME, 0),
        Metric("loss", 1.0, -1, 0),
        Metric("loss", 1.0, TIME + 0.5, 0),
        Metric("loss", 1.0, TIME, 1.0),
        Metric("loss", 1.0, TIME, "1"),
        Metric("loss", 1.0, None, 1),
        Metric("loss", 1.0, 2**63, 0),
        Metric("loss", 1.0, TIME, 2**63 - 1),
        Metric("loss", 10**400, TIME, 5),
        Metric(None, 1.0, TIME, 0),
        Metric("", 1.0, TIME, 0),
        Metric("../up", 1.0, TIME, 0),
        Metric('bad"key', 1.0, TIME, 0),
        Metric("k" * 251, 1.0, TIME, 0),
        Metric("k" * 250, 1.0, TIME, 0),
    ]
    for one in odd:
        yield f"log metric {str(dict(one))[:200]}", lambda s, runs, m=one: s.log_metric(runs[0], m)
    for run in ("0" * 32, "nonsense", "", "x" * 40):
        yield f"log metric to {run}", lambda s, _, r=run: s.log_metric(r, Metric("loss", 1.0, TIME, 1))


def batches(chance: random.Random) -> Iterator[Call]:
    for number in range(40):
        several, run = [metric(chance) for _ in range(chance.choice([1, 2, 20, 200]))], chance.randrange(5)
        several += chance.sample(several, len(several) // 2)
        params = [Param("p1", "one"), Param("p2", "")][: number % 3]
        tags = [RunTag("team", "red"), RunTag("note", "n")][: number % 2]
        yield (
            f"log batch of {len(several)} to {run}, {len(params)} params, {len(tags)} tags",
            lambda s, runs, a=(several, params, tags), r=run: s.log_batch(runs[r], *a),
        )
    good, bad = Metric("loss", 1.0, TIME, 9), Metric("loss", None, TIME, 9)
    odd: list[tuple[Any, ...]] = [
        ([], [], []),
        ([good] * 1001, [], []),
        ([good, bad], [], []),
        ([good], [Param("p1", "changed")], []),
        ([good], [Param("same", "1"), Param("same", "2")], []),
        ([good], [], [RunTag("mlflow.runName", "by batch")]),
        ([bad], [Param("kept", "?")], []),
    ]
    for arguments in odd:
        yield f"log batch {str(arguments)[:150]}", lambda s, runs, a=arguments: s.log_batch(runs[0], *a)
    for run in ("0" * 32, "nonsense", "", None):
        yield f"log batch to {run}", lambda s, _, r=run: s.log_batch(r, [good], [], [])


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
        yield f"get run {number}", lambda s, runs, n=number: get(s, "runs/get", run_id=runs[n])
    for run in ("0" * 32, "", "it's", "ü", "\x00"):
        yield f"get run {run!r}", lambda s, _, r=run: get(s, "runs/get", run_id=r)
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
        yield f"get run by {fields}", lambda s, runs, f=fields: get(s, "runs/get", **filled(f, runs))


def searches(chance: random.Random) -> Iterator[Call]:
    for where in FILTERS:
        for order in ORDERS:
            fields: dict[str, Any] = {"max_results": chance.choice([1, 3, 1000])}
            fields["experiment_ids"] = chance.choice([["0", "1", "3"], ["1"], ["0", "3"], ["1", "99"]])
            fields |= {} if where is None else {"filter": where}
            fields |= {} if order is None else {"order_by": order}
            if view := chance.choice([None, "ACTIVE_ONLY", "ALL", "DELETED_ONLY"]):
                fields["run_view_type"] = view
            yield f"search {fields}", lambda s, _, f=fields: pages(s, "runs/search", f)
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
        yield f"search {str(fields)[:200]}", lambda s, _, f=fields: pages(s, "runs/search", f)
    for body, kind in (
        (b"", "application/json"),
        (b"{", "application/json"),
        (b'{"experiment_ids": ["1"], "experiment_ids": ["0"]}', "application/json; charset=utf-8"),
        (b'{"experiment_ids": ["1"]}', "text/plain"),
        (b'{"experiment_ids": ["1"], "filter": "\xff"}', "application/json"),
        (json.dumps(json.dumps(every)).encode(), "application/json"),
    ):
        yield f"search {body!r} {kind}", lambda s, _, b=body, k=kind: ask(s, "POST", "runs/search", body=b, kind=k)
    yield "search by GET", lambda s, _: ask(s, "GET", "runs/search", "experiment_ids=1")


def histories() -> Iterator[Call]:
    where = "metrics/get-history"
    for run in range(5):
        for key in (*KEYS, "none"):
            fields = {"run_id": f"<{run}>", "run_uuid": f"<{run}>", "metric_key": key, "max_results": "25000"}
            yield f"history {fields}", lambda s, runs, f=fields: get(s, where, **filled(f, runs))
    yield (
        "history by page",
        lambda s, runs: pages(s, where, {"run_id": runs[0], "metric_key": "loss", "max_results": 2}),
    )
    yield "whole pages", lambda s, runs: pages(s, where, {"run_id": runs[1], "metric_key": "loss", "max_results": 1})
    good = {"run_id": "<0>", "metric_key": "loss", "max_results": "3"}
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
        yield f"history {fields}", lambda s, runs, f=fields: get(s, where, **filled(f, runs))
    for query in ("run_id=%ff&metric_key=loss&max_results=3", "metric_key", "run_id=a;metric_key=b", "%", "&"):
        yield f"history {query}", lambda s, _, q=query: ask(s, "GET", where, q)


def filled(fields: dict[str, Any], runs: list[str]) -> dict[str, Any]:
    """The ids of runs in the places of their numbers."""
    return json.loads(re.sub("<([0-9]+)>", lambda place: runs[int(place[1])], json.dumps(fields)))


def get(store: SqlAlchemyStore, path: str, **fields: Any) -> Any:
    return ask(store, "GET", path, urlencode(fields, doseq=True))


def pages(store: SqlAlchemyStore, path: str, fields: Any) -> list[Any]:
    """The answer, and those of the next pages."""
    found: list[Any] = []
    while len(found) < 12:
        by_get = path.startswith("metrics/")
        more = get(store, path, **fields) if by_get else ask(store, "POST", path, body=json.dumps(fields).encode())
        found.append(more)
        if not (isinstance(fields, dict) and "next_page_token" in more[1]):
            break
        fields = fields | {"page_token": more[1]["next_page_token"]}
    return found


answered: Counter[str] = Counter()
"""Requests that `mlflow_host.direct_answers` answered itself, and those that it left to MLflow, by path."""


def ask(
    store: SqlAlchemyStore, method: str, path: str, query: str = "", body: bytes = b"", kind: str = "application/json"
) -> tuple[int, Any]:
    """Status and JSON that a client gets."""
    if isinstance(store, DirectStore) and (answer := ANSWERS.get((method, f"/{path}"))):
        headers = [(b"host", b"localhost"), (b"content-type", kind.encode())]
        scope = {"method": method, "query_string": query.encode(), "headers": headers}
        found = answer_or_none(answer, store, scope, body)
        answered[f"{path} {'itself' if found else 'not'}"] += 1
        if found:
            return 200, json.loads(found.decode("ascii"))
    handlers._tracking_store = store
    address = f"{PREFIXES[0]}/{path}" + (f"?{query}" if query else "")
    told = app.test_client().open(address, method=method, data=body, content_type=kind)
    return told.status_code, told.json if told.is_json else told.get_data(as_text=True)


def transcript(store: SqlAlchemyStore, seed: int) -> list[str]:
    runs: list[str] = []
    lines = []
    for number, (what, call) in enumerate(calls(random.Random(seed))):
        random.seed(number)  # of which MLflow makes names
        try:
            answer = call(store, runs)
            if what.startswith("create run"):
                runs.append(answer.info.run_id)
            said = shown(answer)
        except MlflowException as error:
            said = f"{error.error_code}: {error.message}"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        # Of a refusal of PostgreSQL's MLflow tells the whole statement, which has ids and times in it.
        said = said.split("[SQL:")[0]
        for place, run in enumerate(runs):
            said = said.replace(run, f"<run {place}>")
        said = re.sub("[0-9a-f]{32}", "<id>", said)
        lines.append(f"{what}: {said}")
    return lines


def shown(answer: Any) -> str:
    """An answer in words that tell everything clients can see of it, in an order of its own where MLflow has none."""
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
    """The rows of each table, with the runs' ids told by their names and times."""
    named = "(select coalesce(name, '') || start_time from runs where run_uuid = t.run_uuid)"
    found = {}
    with store.engine.connect() as connection:
        for table in ("metrics", "latest_metrics", "params", "tags"):
            asked = f"select {named}, to_jsonb(t) - 'run_uuid' from {table} t"
            found[table] = sorted(map(str, connection.execute(text(asked))))
        location = "jsonb_build_object('artifact_uri', replace(artifact_uri, run_uuid, ''))"
        asked = f"select to_jsonb(t) - 'run_uuid' - 'deleted_time' || {location} from runs t"
        found["runs"] = sorted(str(row) for row in connection.execute(text(asked)))
    return found


def main() -> None:
    logging.disable()  # Flask tells of every 500
    own_uri, direct_uri, seed = sys.argv[1:]
    own = SqlAlchemyStore(own_uri, "mlflow-artifacts:/")
    direct = DirectStore(direct_uri, "mlflow-artifacts:/")
    answered_itself = 0
    cursor = direct.cursor

    def counted() -> Any:
        nonlocal answered_itself
        answered_itself += 1
        return cursor()

    direct.cursor = counted
    print(
        json.dumps(
            {
                "own": transcript(own, int(seed)),
                "direct": transcript(direct, int(seed)),
                "own tables": tables(own),
                "direct tables": tables(direct),
                "statements": answered_itself,
                "answered": answered,
            }
        )
    )


if __name__ == "__main__":
    main()
