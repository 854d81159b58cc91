"""Asks MLflow's own tracking store and `DirectStore` for the same, each with a database of its own, and prints what
both answered and wrote, as JSON. Runs under an interpreter that has one release of MLflow.

    python compare_stores.py URI_FOR_MLFLOWS URI_FOR_OURS SEED
"""

from __future__ import annotations

import json
import math
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

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
    ViewType,
)
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # noqa: E402
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


def readings(chance: random.Random) -> Iterator[Call]:
    for number in range(18):
        yield f"get run {number}", lambda s, runs, n=number: s.get_run(runs[n])
    for run in ("0" * 32, "", None, "it's"):
        yield f"get run {run!r}", lambda s, _, r=run: s.get_run(r)
    for where in FILTERS:
        for order in ORDERS:
            scope = chance.choice([["0", "1", "3"], ["1"], ["0", "3"], ["1", "99"]])
            view = chance.choice([ViewType.ACTIVE_ONLY, ViewType.ALL, ViewType.DELETED_ONLY])
            most = chance.choice([1, 3, 1000])
            yield (
                f"search {scope} {where!r} {order} {view} {most}",
                lambda s, _, a=(scope, where, view, most, order): pages(s, *a),
            )
    for scope in ([], ["abc"], [None], [" 1"], ["-1"]):
        yield f"search {scope}", lambda s, _, e=scope: pages(s, e, "", ViewType.ALL, 10, None)
    for most in (0, -1, 50_001, None):
        yield f"search of {most}", lambda s, _, m=most: s._search_runs(["0"], "", ViewType.ALL, m, None, None)
    yield "search from nonsense", lambda s, _: s._search_runs(["0"], "", ViewType.ALL, 2, None, "nonsense")
    for run in range(5):
        for key in (*KEYS[:3], "none"):
            yield f"history of {key} in {run}", lambda s, runs, r=run, k=key: s.get_metric_history(runs[r], k)
    yield "history by page", lambda s, runs: by_page(s, runs[0], "loss", 2)
    yield "history of none", lambda s, runs: s.get_metric_history(runs[0], "loss", 0)
    yield "history of no run", lambda s, _: s.get_metric_history("nonsense", "loss")
    yield "history from nonsense", lambda s, runs: s.get_metric_history(runs[0], "loss", 2, "nonsense")


def pages(store: SqlAlchemyStore, experiments: Any, where: Any, view: Any, most: int, order: Any) -> list[Any]:
    found, token = [], None
    for _ in range(3):
        page = store.search_runs(experiments, where, view, most, order, token)
        token = page.token
        found += [*page, f"token {token}"]
        if not token:
            break
    return found


def by_page(store: SqlAlchemyStore, run: str, key: str, most: int) -> list[Any]:
    found, token = [], None
    while True:
        page = store.get_metric_history(run, key, most, token)
        token = page.token
        found += [*page, f"token {token}"]
        if not token:
            return found


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
    if isinstance(answer, (list, tuple)):
        token = f" token {answer.token}" if hasattr(answer, "token") else ""
        return "[" + ", ".join(map(shown, answer)) + "]" + token
    if hasattr(answer, "info"):
        words = answer.to_proto()
        for field in (words.data.metrics, words.data.params, words.data.tags, words.inputs.dataset_inputs):
            field.sort(key=str)
        kinds = sorted((key, type(value).__name__) for key, value in answer.data.metrics.items())
        return f"{words} {dict(answer.info)} {kinds}"
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
            }
        )
    )


if __name__ == "__main__":
    main()
