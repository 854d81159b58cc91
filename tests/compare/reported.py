"""Requests from bug reports, each with the status that plain MLflow returns, and requests that our server refuses
because they make MLflow fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.compare.grammar import DIGITS, TIME, Request, get, json_headers, post, run

METRIC = {"key": "named", "value": 0.5, "timestamp": TIME, "step": 0, "run_id": run(1)}


def search(**fields: Any) -> Request:
    return post("runs/search", {"experiment_ids": ["0"]} | fields)


def of_kind(kind: str) -> Request:
    return replace(post("runs/log-metric", METRIC), headers=json_headers(kind))


NAMED: dict[str, tuple[Request, int]] = {
    "an id of 5,000 digits in a search": (search(experiment_ids=[DIGITS]), 400),
    "an id of 5,000 digits for a new run": (post("runs/create", {"experiment_id": DIGITS}), 400),
    "a quote in an order": (search(order_by=['metrics.`a"b`']), 500),
    "a name in a list": (search(filter="attributes.run_id IN (red)"), 500),
    "a time of 5,000 digits": (search(filter=f"start_time > {DIGITS}"), 500),
    "a filter and an order": (search(filter="attribute.nonsense = '1'", order_by=['metrics.`a"b`']), 400),
    "a page of 5,000 digits": (
        get("metrics/get-history", f"run_id={run(1)}&metric_key=named&max_results={DIGITS}"),
        200,
    ),
    "an empty run_id of a run": (get("runs/get", f"run_id=&run_uuid={run(1)}"), 400),
    "an empty run_id of a history": (get("metrics/get-history", f"run_id=&run_uuid={run(1)}&metric_key=named"), 400),
    "a workspace": (replace(search(), headers=(*json_headers(), ("x-mlflow-workspace", "other"))), 500),
    **{
        f"content type {kind}": (of_kind(kind), 400)
        for kind in ("application/jsonx", "application/json-patch+json", "application/json, text/plain")
    },
}

DEAR = {
    "a deep body": replace(search(), body=b"[" * 100_000),  # Python 3.12 parses 3,000 levels without RecursionError
    "21 columns to order by": search(order_by=["start_time"] * 21),
    "51 conditions": search(filter=" and ".join(["metrics.loss > 0"] * 51)),
}

# MLflow answers these requests with status 500

NUL = "nul\x00"
REFUSED = {
    "set-tag": post("runs/set-tag", {"run_id": run(2), "key": "k", "value": NUL}),
    "log-parameter": post("runs/log-parameter", {"run_id": run(2), "key": "k", "value": NUL}),
    "create": post("runs/create", {"experiment_id": "0", "tags": [{"key": "k", "value": NUL}]}),
    "experiment": post("experiments/create", {"name": NUL}),
    "experiment tag": post("experiments/set-experiment-tag", {"experiment_id": "0", "key": "k", "value": NUL}),
    "model": post("registered-models/create", {"name": "m", "description": NUL}),
    "key of a history": get("metrics/get-history", f"run_id={run(2)}&metric_key=a%00b"),
    "id of a run": get("runs/get", "run_id=%00"),
    "filter": search(filter=f"tags.team = '{NUL}'"),
}
TOKENS = ("[]", "3", "null", '"x"', "true", '{"offset": [1]}', '{"offset": 1e400}')
