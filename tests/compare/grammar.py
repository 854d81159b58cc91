"""Generate requests to the six endpoints of the fast path, and requests that change the results of these endpoints.

One `random.Random` makes all choices, so the same seed gives the same requests. Most requests are generated in the form
that clients send, and then one field, the body, the headers or the path is changed. Two servers give a run different
IDs, so a request contains `RUN0003RUN` in place of the ID of the fourth run.

Only requests whose responses can be compared are generated. A server chooses IDs and names at random, so no search
sorts by IDs. Each run that a search may find has its own name and start time. Runs that no search may find are in the
experiment `ODD`.
"""

from __future__ import annotations

import base64
import gzip
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, quote_plus

TIME = 1_700_000_000_000
HOST = "mlflow.test"
BUCKET = "an-artifacts-bucket"
FOUNDATION_RUNS = 12
SEARCHED, DELETED, ODD = ("0", "1", "3"), "2", "4"

Fields = dict[str, Any]


@dataclass(frozen=True)
class Request:
    method: str
    target: bytes
    headers: tuple[tuple[str, str], ...] = (("host", HOST),)
    body: bytes = b""

    def __str__(self) -> str:
        body = self.body if len(self.body) < 600 else self.body[:400] + b" ... " + self.body[-100:]
        shown = "".join(f" {name}: {value[:80]!r};" for name, value in self.headers if name != "host")
        return f"{self.method} {self.target[:600].decode('latin-1')}{shown} {body!r}"


def run(number: int) -> str:
    return f"RUN{number:04}RUN"


def with_run_ids(text: bytes, runs: list[str]) -> bytes:
    """Replace each placeholder (RUN0003RUN) in `text` by the run's ID on one server, or by an unused ID."""

    def run_id(found: re.Match[bytes]) -> bytes:
        number = int(found[1])
        return runs[number].encode() if number < len(runs) else b"f" * 32

    return re.sub(rb"RUN([0-9]{4})RUN", run_id, text)


# Parts of values

KEYS = ("loss", "val/acc", "a b", "ü", "m-0", "m_1", "m.2", "x:y", "Loss", "none")
NAMES = ("first", "renamed", "é'\\", "a%b_c", "two words", "FIRST", "naïve", "nai\u0308ve", "🦊", "-", "'", '"')
TEXTS: tuple[Any, ...] = (
    *("", " ", "x", "0", "1", "None", "null", "true", "../up", "/", ".", "a/../b", "a//b", 'bad"key', "it's", "`"),
    *("a;b", "100%", "%s", "{0}", "\\", "\\u0041", "\t", "\n", "\r\n", "\x1f", "\x7f", "\u2028", "é", "e\u0301", "ﬁ"),
    *("\u202eabc", "🦊", "\U0010ffff", "\ud800", "\udfff\ud800", "\ufeff", "nul\x00", "\x00"),
    *("k" * 249, "k" * 250, "k" * 251, "k" * 500, "ü" * 250, "k" * 5000, "k" * 6001, "v" * 8000, "v" * 8001),
)
NUMBERS_AS_TEXT = ("0", "1", "-1", "+1", "01", " 1", "1 ", "1.0", "1.5", "1e3", "0x1", "1_0", "１", "NaN", "nan")
HUGE = 10**400
DIGITS = "9" * 5000
NUMBER_OF_DIGITS = "<a number of 5,000 digits>"
"""`written` replaces this text with 5,000 digits, because Python's json module cannot write such a number."""
OTHER_TYPES: tuple[Any, ...] = (None, True, False, 0, 7, 1.5, [], {}, [1], ["x"], {"a": 1}, [None], [[]])
WHOLE: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 1000, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**53 + 1, 2**63 - 1, 2**63, -(2**63)),
    *(-(2**63) - 1, 2**64, HUGE, 1.0, 1.5, -0.0, 1e3, 1e300, float("nan"), float("inf"), *NUMBERS_AS_TEXT, DIGITS),
    *(NUMBER_OF_DIGITS, *OTHER_TYPES),
)
VALUES: tuple[Any, ...] = (
    *(0.25, 1, -3.5, 0.0, -0.0, 0, -0, 1e-300, 1e300, 5e-324, -5e-324, 0.1 + 0.2, 1e15, 1e16, 123456789012345680.0),
    *(999999999999999.0, 1e-5, 1e-4, 2**53 + 1, 2**63, -(2**70), 1.7976931348623157e308, -1.7976931348623157e308),
)
ODD_VALUES: tuple[Any, ...] = (
    *(float("nan"), float("inf"), float("-inf"), "NaN", "nan", "Infinity", "-Infinity", "inf", "-inf", "1.5", "1e3"),
    *("", "x", HUGE, -HUGE, DIGITS, NUMBER_OF_DIGITS, "1_0", " 1", "１", *OTHER_TYPES),
)
UNSEEN_STEPS = range(10, 10**9)


def odd_text(chance: random.Random) -> Any:
    return chance.choice(TEXTS) if chance.random() < 0.75 else chance.choice((*OTHER_TYPES, HUGE, DIGITS))


def metric(chance: random.Random, words: float = 0.15) -> Fields:
    """Return a metric in the form that clients send. `words` is the probability that the value is a word. A NaN gets a
    step of its own, because MLflow sorts NaN and 0 in random order if their step and time are equal."""
    step: Any = chance.choice([-2, 0, 1, 2, 3])
    value: Any = chance.choice(VALUES)
    if chance.random() < words:
        value = chance.choice(("NaN", "Infinity", "-Infinity"))
        step = chance.choice(UNSEEN_STEPS) if value == "NaN" else step
    return {"key": chance.choice(KEYS), "value": value, "timestamp": TIME + chance.randrange(4), "step": step}


def tags(chance: random.Random, most: int = 4) -> list[Fields]:
    names = chance.sample(("team", "note", "ü", "a b", 'a\\b"c,{}', "mlflow.user", "mlflow.note.content"), most)
    values = ("red", "blue", "red fox", "", "it's", 'é"\\\n', "x" * 300)
    return [{"key": name, "value": chance.choice(values)} for name in names[: chance.randrange(most + 1)]]


# Filters, orders and page tokens

COMPARISONS = ("=", "!=", ">", ">=", "<", "<=", "LIKE", "ILIKE", "like", "IN", "NOT IN", "IS NULL", "IS NOT NULL", "==")
TEXT_VALUES = (
    "'one'",
    "'red'",
    "'RED%'",
    "'%n%'",
    "'f_r%'",
    '"first"',
    "'é'",
    "''",
    "'%'",
    "'it''s'",
    "'a\\'b'",
    "red",
)
NUMBERS = ("0", "-0", "0.1", "-1.5", "1e3", "1E-3", ".5", "5.", "+1", "1_0", "NaN", "Infinity", "1700000000005", DIGITS)
IDENTIFIERS = (
    *("metrics.loss", "metric.loss", "metrics.`val/acc`", 'metrics."a b"', "metrics.ü", "metrics.`ü`", "metrics.none"),
    *(
        "params.p1",
        "param.p2",
        "parameters.p1",
        "params.`p 3`",
        "tags.team",
        "tag.note",
        "tags.`mlflow.user`",
        "tags.ü",
    ),
    *("tags.`mlflow.runName`", "attributes.status", "attribute.start_time", "attr.end_time", "run.status", "status"),
    *("attributes.run_name", "attributes.`Run name`", "run_name", "start_time", "end_time", "user_id", "created"),
    *("attributes.user_id", "datasets.name", "dataset.digest", "datasets.context", "attribute.nonsense", "nonsense.x"),
    *(
        "Metrics.loss",
        'metrics.`a"b`',
        "metrics.``",
        "metrics.",
        ".loss",
        "metrics loss",
        "`metrics`.loss",
        "metrics.a.b",
    ),
)
IN_FILTERS_ONLY = ("attributes.run_id", "run_id", "attributes.artifact_uri")


def filter_text(chance: random.Random) -> Any:
    if chance.random() < 0.04:
        return odd_text(chance)
    joined = chance.choice((*[" and ", " AND "] * 4, " or ", "  AND\n", " and and "))
    text = joined.join(comparison(chance) for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 5))))
    if chance.random() < 0.05:
        text = f"({text})" if chance.random() < 0.5 else text + chance.choice((";", " and", " --", " /* x */", " )"))
    return mutated(chance, text) if chance.random() < 0.1 else text


VALID = (
    (
        ("metrics.loss", "metrics.`val/acc`", "metric.ü", "metrics.`a b`", "attributes.start_time", "start_time"),
        ("=", "!=", ">", ">=", "<", "<="),
        ("0", "0.1", "-1.5", "1e3", "1700000000005"),
    ),
    (
        ("params.p1", "tags.team", "tags.note", "attributes.run_name", "attributes.status", "tags.`mlflow.user`"),
        ("=", "!=", "LIKE", "ILIKE"),
        ("'one'", "'red'", "'RED%'", "'%n%'", "'RUNNING'", "'first'", "''", '"é\'"', "'%'"),
    ),
    (("params.p1", "tags.team", "metrics.loss"), ("IS NULL", "IS NOT NULL"), ("",)),
)
"""Conditions that clients send: each entry's comparisons and values are valid for its identifiers."""


def comparison(chance: random.Random) -> str:
    if chance.random() < 0.6:
        return " ".join(map(chance.choice, chance.choice(VALID))).strip()
    identifier = chance.choice((*IDENTIFIERS, *IN_FILTERS_ONLY))
    how = chance.choice(COMPARISONS)
    if identifier in IN_FILTERS_ONLY:
        value = chance.choice((f"'{run(chance.randrange(FOUNDATION_RUNS))}'", "'%'", "'mlflow-artifacts:/%'", "red"))
    elif chance.random() < 0.8 and re.match("metric|attr.*time|start|end|created", identifier):
        value = chance.choice(NUMBERS)
    else:
        value = chance.choice((*TEXT_VALUES, "1"))
    if how in ("IN", "NOT IN"):
        some = f"{value}, 'blue'" if chance.random() < 0.6 else value
        value = f"({some})" if chance.random() < 0.9 else chance.choice(("()", some, "(red)", "('a',)", "['a']", "(1)"))
    if how.startswith("IS") and chance.random() < 0.9:
        value = ""
    return f"{identifier}{chance.choice((' ', ' ', ' ', '', '  '))}{how}{chance.choice((' ', ' ', ''))}{value}"


def order(chance: random.Random) -> Any:
    if chance.random() < 0.06:
        return chance.choice(("metrics.loss", [7], [None], [["metrics.loss"]], *OTHER_TYPES))
    some = []
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        direction = chance.choice(("", "", " ASC", " DESC", " desc", "  DESC ", " DOWN", " ASC DESC", ","))
        text = chance.choice(IDENTIFIERS) + direction
        if chance.random() < 0.6:
            identifiers, _, _ = chance.choice(VALID)
            text = chance.choice(identifiers) + chance.choice(("", " ASC", " DESC"))
        some.append(mutated(chance, text) if chance.random() < 0.06 else text)
    return some


def mutated(chance: random.Random, text: str) -> str:
    """Return `text` with one character removed, changed or added."""
    at = chance.randrange(len(text) + 1)
    more = chance.choice(("'", '"', "`", "(", ")", "%", ",", "=", "<", ">", " ", ".", "-", ";", "*", "x", "é", "\x00"))
    return text[:at] + (more if chance.random() < 0.6 else "") + text[at + chance.randrange(2) :]


OFFSETS = ("0", "1", "2", "3", "-1", '"2"', '"x"', "1.9", "1e400", "null", "true", "[1]", "{}", str(2**40), "9" * 30)


def page_token(chance: random.Random) -> Any:
    whole = f'{{"offset": {chance.choice(OFFSETS)}}}'
    odd = (
        "[]",
        "[1]",
        "3",
        "null",
        '"x"',
        "true",
        "{}",
        '{"offset"',
        "nonsense",
        '{"Offset": 1}',
        "é",
        whole + " ",
        "NaN",
    )
    told = whole if chance.random() < 0.6 else chance.choice(odd)
    token = base64.b64encode(told.encode()).decode()
    if chance.random() < 0.25:
        return chance.choice(
            (None, "", " ", "nonsense", "é", "====", 3, token + "=", token[:-1], f" {token}\n", "\x00")
        )
    return token


# Requests as clients write them


class Clients:
    """Generate requests. Runs get increasing start times; the counter begins at `started`."""

    def __init__(self, chance: random.Random, started: int) -> None:
        self.chance = chance
        self.started = started

    def some_run(self) -> str:
        most = FOUNDATION_RUNS if self.chance.random() < 0.9 else 60
        return run(self.chance.randrange(most))

    def create(self) -> Fields:
        self.started += 1
        name = f"{self.chance.choice(NAMES)} {self.chance.choice(('', self.started))}"
        fields: Fields = {
            "experiment_id": self.chance.choice(SEARCHED),
            "user_id": self.chance.choice(("ada", "", "bob")),
        }
        fields |= {"start_time": TIME + self.started, "tags": tags(self.chance)}
        if self.chance.random() < 0.3:
            fields["tags"].append({"key": "mlflow.runName", "value": name})
            return fields | ({"run_name": name} if self.chance.random() < 0.5 else {})
        return fields | {"run_name": name}

    def log_metric(self) -> Fields:
        run_id = self.some_run()
        return metric(self.chance) | {"run_id": run_id} | ({"run_uuid": run_id} if self.chance.random() < 0.5 else {})

    def log_batch(self) -> Fields:
        several = [metric(self.chance, words=0.01) for _ in range(self.chance.choice((0, 1, 1, 2, 20, 100)))]
        several += self.chance.sample(several, len(several) // 4)
        fields = {"run_id": self.some_run(), "metrics": several}
        if self.chance.random() < 0.15:
            fields["tags"] = tags(self.chance, 2)
        if self.chance.random() < 0.1:
            fields["params"] = [{"key": f"p{self.chance.randrange(4)}", "value": "one"}]
        return fields

    def search(self) -> Fields:
        scopes = (list(SEARCHED), ["1"], ["0", "3"], ["1", "99"], [DELETED, "1"])
        fields: Fields = {"experiment_ids": self.chance.choice(scopes)}
        fields["max_results"] = self.chance.choice((1, 3, 5, 7, 1000))
        if self.chance.random() < 0.7:
            fields["filter"] = filter_text(self.chance)
        if self.chance.random() < 0.6:
            fields["order_by"] = order(self.chance)
        if self.chance.random() < 0.5:
            fields["run_view_type"] = self.chance.choice(("ACTIVE_ONLY", "ALL", "DELETED_ONLY"))
        if self.chance.random() < 0.15:
            fields["page_token"] = page_token(self.chance)
        return fields

    def get_run(self) -> Fields:
        run_id = self.some_run()
        return {"run_id": run_id} | ({"run_uuid": run_id} if self.chance.random() < 0.5 else {})

    def history(self) -> Fields:
        fields = self.get_run() | {"metric_key": self.chance.choice(KEYS)}
        if self.chance.random() < 0.8:
            fields["max_results"] = self.chance.choice(("1", "2", "3", "25000"))
        if self.chance.random() < 0.3 and isinstance(token := page_token(self.chance), str):
            fields["page_token"] = token
        return fields

    def change(self) -> Request:
        """Return a request that MLflow answers and that changes the results of other requests."""
        run_id, one_that_may_go = self.some_run(), run(self.chance.randrange(3, FOUNDATION_RUNS))
        text = self.chance.choice(("red", "blue", "one", "", "é'\\"))
        digest = self.chance.choice(("d1", "d2"))
        dataset = {"name": "corpus", "digest": digest, "source_type": "local", "source": "{}"}
        context = {"key": "mlflow.data.context", "value": "train"}
        path, fields = self.chance.choice(
            (
                ("runs/set-tag", {"run_id": run_id, "key": self.chance.choice(("team", "note")), "value": text}),
                ("runs/set-tag", {"run_id": run_id, "key": "mlflow.runName", "value": self.chance.choice(NAMES)}),
                (
                    "runs/log-parameter",
                    {"run_id": run_id, "key": self.chance.choice(("p1", "p2", "p 3")), "value": text},
                ),
                ("runs/update", {"run_id": run_id, "status": "FINISHED", "end_time": TIME + self.chance.randrange(99)}),
                ("runs/update", {"run_id": run_id, "run_name": self.chance.choice(NAMES)}),
                ("runs/delete", {"run_id": one_that_may_go}),
                ("runs/restore", {"run_id": one_that_may_go}),
                ("runs/restore", {"run_id": one_that_may_go}),
                ("runs/delete-tag", {"run_id": run_id, "key": "note"}),
                ("runs/log-inputs", {"run_id": run_id, "datasets": [{"dataset": dataset, "tags": [context]}]}),
            )
        )
        return post(path, fields)


def post(path: str, fields: Any) -> Request:
    body = json.dumps(fields).encode()
    return Request("POST", f"/api/2.0/mlflow/{path}".encode(), json_headers(), body)


def json_headers(kind: str = "application/json") -> tuple[tuple[str, str], ...]:
    return (("host", HOST), ("content-type", kind))


def get(path: str, query: str) -> Request:
    return Request("GET", f"/api/2.0/mlflow/{path}?{query}".encode())


def query_of(fields: Fields) -> str:
    return "&".join(f"{quote_plus(name)}={quote_plus(str(value))}" for name, value in fields.items())


# Changes of those requests

ODD_FIELDS: dict[str, tuple[Any, ...]] = {
    "experiment_id": (*("77", "abc", "", "01", " 1", "-1", "1.0", "１", DIGITS, "9" * 19), *OTHER_TYPES, 1),
    "start_time": WHOLE,
    "end_time": WHOLE,
    "timestamp": WHOLE,
    "step": WHOLE,
    "max_results": WHOLE,
    "value": ODD_VALUES,
    "run_view_type": (0, 1, 2, 3, 77, -1, 2**31, "SOME", "active_only", "", "1", 1.0, *OTHER_TYPES),
    "experiment_ids": (
        *([], ["abc"], [" 1"], ["-1"], ["99999999999"], [DIGITS], [str(2**63)], "1", 1, [1], [None], ["1", "1"]),
        *(["01"], ["1.0"], [""], ["１"], [["1"]], {"0": "1"}, ["\x00"], None, ["1"] * 2000),
    ),
    "metrics": ([], None, {}, "x", [[]], [None], [{}], [7]),
    "tags": (
        [],
        None,
        {},
        "x",
        [[]],
        [None],
        [{}],
        [{"key": "no value"}],
        [{"value": "no key"}],
        [{"key": 7, "value": 7}],
    ),
    "params": ([], None, {}, "x", [{}], [{"key": "p1", "value": "changed"}], [{"key": "s", "value": v} for v in "12"]),
    "order_by": ("metrics.loss", [7], [None], {}, "", None, ["metrics.loss"] * 50),
}
UNKNOWN_FIELDS: tuple[tuple[str, Any], ...] = (
    *(("more", 1), ("", ""), ("runId", "RUN0001RUN"), ("run_uuid", "RUN0001RUN"), ("runUuid", "RUN0000RUN")),
    *(("experimentId", "1"), ("experimentIds", ["1"]), ("maxResults", 2), ("orderBy", []), ("metricKey", "loss")),
    *(("model_id", "m-" + "4" * 32), ("model_id", ""), ("dataset_name", "corpus"), ("dataset_digest", "d1")),
    *(
        ("source_name", "x"),
        ("lifecycle_stage", "deleted"),
        ("__proto__", {}),
        ("[mlflow.ext]", 1),
        ("run_id\x00", "x"),
    ),
)


def changed_fields(chance: random.Random, fields: Fields) -> Fields:
    """Return `fields` with one field removed, added, renamed or changed. In a list, one element may be changed
    instead."""
    fields = dict(fields)
    name = chance.choice(list(fields))
    inner = fields[name]
    if isinstance(inner, list) and inner and isinstance(inner[0], dict) and chance.random() < 0.6:
        at = chance.randrange(len(inner))
        return fields | {name: [*inner[:at], changed_fields(chance, inner[at]), *inner[at + 1 :]]}
    how = chance.random()
    if how < 0.15:
        del fields[name]
    elif how < 0.3:
        fields |= [chance.choice(UNKNOWN_FIELDS)]
    elif how < 0.36:
        camel = re.sub("_(.)", lambda found: found[1].upper(), name)
        fields[camel] = fields[name] if chance.random() < 0.3 else fields.pop(name)
    elif name in ODD_FIELDS and chance.random() < 0.8:
        fields[name] = chance.choice(ODD_FIELDS[name])
    elif name == "page_token":
        fields[name] = page_token(chance)
    else:
        fields[name] = odd_text(chance)
    if str(fields.get("value")).lower() == "nan":  # `metric` explains the step
        fields["step"] = chance.choice(UNSEEN_STEPS)
    return fields


def written(fields: Any) -> bytes:
    return json.dumps(fields).replace(f'"{NUMBER_OF_DIGITS}"', DIGITS).encode()


def other_body(chance: random.Random, fields: Fields, body: bytes) -> bytes:
    """Return a body that contains the same fields in another form, or a body that is almost JSON."""
    names = [name for name in fields if name != "step"]  # `metric` sets the step of NaN
    name = chance.choice(names or ["run_id"])
    twice = written({name: chance.choice(("x", 1, None, fields.get(name)))})[1:-1]
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: body[:-1] + b", " + twice + b"}",
        lambda: b"{" + twice + (b", " if len(body) > 2 else b"") + body[1:],
        lambda: written(json.dumps(fields)),
        lambda: written(written(json.dumps(fields)).decode()),
        lambda: json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass"),
        lambda: json.dumps(fields, ensure_ascii=False).encode("latin-1", "replace"),
        lambda: body.decode().encode("utf-16"),
        lambda: body.decode().encode("utf-32-le"),
        lambda: b"\xef\xbb\xbf" + body,
        lambda: b" \n\t" + body + b"\r\n ",
        lambda: b"\xc2\xa0" + body,
        lambda: body + chance.choice((b"x", b"{}", b",", b"\x00", b"\xff", b"//")),
        lambda: body[: chance.randrange(len(body))],
        lambda: body.replace(b'"', b"'"),
        lambda: body.replace(b'"', b'"\x01', 1),
        lambda: body.replace(b": ", b": \xff", 1),
        lambda: chance.choice(
            (b"", b"{}", b"[]", b"null", b"true", b"3", b'"text"', b'""', b"NaN", b"{", b"[1]", b" ")
        ),
        lambda: b"[" * chance.choice((10, 500, 3000, 100_000)),
        lambda: b'{"a":' * chance.choice((10, 500, 3000)),
        lambda: body[:-1] + b', "deep": ' + b"[" * 900 + b"]" * 900 + b"}",
        lambda: b"9" * 5000,
    )
    return chance.choice(ways)()


CONTENT_TYPES = (
    *(
        "application/jsonx",
        "application/json-patch+json",
        "application/json, text/plain",
        "application/json;",
        "text/plain",
    ),
    *("application/json; charset=utf-8", "application/json;charset=latin-1", "application/json; charset=utf-16"),
    *(
        "Application/JSON",
        "application/JSON",
        " application/json",
        "application/json ",
        "application /json",
        "json",
        "",
    ),
    *("application/problem+json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "*/*"),
    *("application/json; x", "application/json; a=b; c", "application/jsonl", "application/json\t", "text/json"),
)


def other_headers(chance: random.Random, request: Request) -> Request:
    how = chance.random()
    if how < 0.5:
        kinds = [("content-type", chance.choice(CONTENT_TYPES))]
        if chance.random() < 0.2:
            kinds.append(("content-type", chance.choice((*CONTENT_TYPES, "application/json"))))
        if chance.random() < 0.1:
            kinds = []
        rest = [one for one in request.headers if one[0] != "content-type"]
        return replace(request, headers=(*rest, *kinds))
    if how < 0.6:
        compressed = gzip.compress(request.body, mtime=0)
        return replace(request, body=compressed, headers=(*request.headers, ("content-encoding", "gzip")))
    more = (
        *(
            ("origin", f"https://{HOST}"),
            ("origin", "https://evil.test"),
            ("origin", "null"),
            ("origin", "http://localhost:1"),
        ),
        *(
            ("accept", "text/html"),
            ("accept-encoding", "gzip"),
            ("x-http-method-override", "DELETE"),
            ("cookie", "a=b"),
        ),
        *(
            ("content-encoding", "identity"),
            ("x-forwarded-prefix", "/x"),
            ("x-mlflow-workspace", "other"),
            ("expect", "x"),
        ),
        *(("authorization", "Basic eDp5"), ("range", "bytes=0-3"), ("if-none-match", "*"), ("x-empty", "")),
    )
    return replace(request, headers=(*request.headers, chance.choice(more)))


def other_path(chance: random.Random, request: Request) -> Request:
    path, mark, query = request.target.partition(b"?")
    other = chance.choice(
        (
            path + b"/",
            path + b"//",
            b"/" + path,
            path.replace(b"/mlflow/", b"/mlflow//", 1),
            path.replace(b"/mlflow/", b"/preview/mlflow/", 1),
            path.replace(b"/2.0/", b"/3.0/", 1),
            path.replace(b"/2.0/", b"/1.0/", 1),
            path.replace(b"s/", b"%73/", 1),
            path.replace(b"/mlflow/", b"/%6Dlflow/", 1),
            path.replace(b"/runs/", b"/./runs/", 1),
            path.replace(b"/runs/", b"/x/../runs/", 1),
            path.replace(b"/runs/", b"%2Fruns/", 1),
            path.upper(),
            path + b";x=y",
            path + b"%00",
            path + b"%0A",
            path + b"%20",
            path + b"%ff",
            path[:-1],
            path + b".json",
            b"/mlflow" + path,
            path + b"#x",
        )
    )
    return replace(request, target=other + mark + query)


def other_query(chance: random.Random, fields: Fields) -> str:
    """Return the query string of a GET request with one field changed, or in another form."""
    fields = {name: str(value) for name, value in fields.items()}
    name = chance.choice(list(fields))
    query = query_of(fields)
    odd = (
        *NUMBERS_AS_TEXT,
        DIGITS,
        "2147483647",
        "2147483648",
        "0",
        "",
        "%00",
        "a%00b",
        "%ff",
        "%ed%a0%80",
        "%F0%9F%A6%8A",
    )
    run_or_key = run(1) if name.startswith("run") else "loss"  # a run ID in a page token decodes to random bytes
    value = chance.choice(
        (*odd, run_or_key, quote("nul\x00"), quote('quo"te'), "a%s", "k" * 300, "a+b", "%zz", "%", "é", "true")
    )
    ways: tuple[Callable[[], str], ...] = (
        lambda: query_of({key: text for key, text in fields.items() if key != name}),
        lambda: re.sub(f"(^|&){name}=[^&]*", lambda found: f"{found[1]}{name}={value}", query),
        lambda: re.sub(f"(^|&){name}=[^&]*", lambda found: f"{found[1]}{name}={value}", query),
        lambda: re.sub(f"(^|&){name}=[^&]*", lambda found: f"{found[1]}{name}={value}", query),
        lambda: f"{query}&{name}={value}",
        lambda: f"{name}={value}&{query}",
        lambda: "run_id=&run_uuid=" + query.removeprefix("run_id="),
        lambda: "run_uuid=" + query.removeprefix("run_id="),
        lambda: (
            query
            + chance.choice(("&", "&&", "&more=x", "&more", "&=", "&=x", ";a=b", "#x", "&run_uuid=", "&run_id=", "%"))
        ),
        lambda: query.replace("_", "%5F", 1),
        lambda: query.replace("_i", "I", 1),
        lambda: query.replace("&", ";"),
        lambda: query.replace("=", "==", 1),
        lambda: query.replace("=", "[]=", 1),
        lambda: query.replace("RUN", "%52UN", 1),
        lambda: query.upper(),
        lambda: "&" + query,
        lambda: "",
        lambda: "&".join([query] * 3),
        lambda: query + "&a=b" * chance.choice((500, 1100)),
    )
    return chance.choice(ways)()


# Streams of requests


def foundation() -> Iterator[Request]:
    """Yield requests that create the initial experiments and runs: some runs with datasets, one experiment deleted."""
    yield post("experiments/create", {"name": "one", "artifact_location": "mlflow-artifacts:/x/1"})
    yield post("experiments/create", {"name": "gone"})
    yield post("experiments/create", {"name": "three", "artifact_location": f"s3://{BUCKET}/a?b=c"})
    yield post("experiments/create", {"name": "odd"})
    for number in range(FOUNDATION_RUNS):
        experiment = DELETED if number == 11 else SEARCHED[number % 3]
        name = "mlflow.runName" if number % 4 == 1 else "note"
        told = [{"key": "team", "value": ("red", "blue")[number % 2]}, {"key": name, "value": NAMES[number]}]
        fields = {"experiment_id": experiment, "user_id": "ada", "start_time": TIME - 100 + number, "tags": told}
        yield post("runs/create", fields | ({} if number % 4 == 1 else {"run_name": NAMES[number]}))
        params = [{"key": f"p{one}", "value": ("one", "", "1")[one]} for one in range(number % 4)]
        if params:
            yield post("runs/log-batch", {"run_id": run(number), "params": params})
    yield post("experiments/delete", {"experiment_id": DELETED})
    dataset = {"name": "corpus", "digest": "d1", "source_type": "local", "source": "{}", "schema": "s"}
    for number in (0, 3):
        yield post("runs/log-inputs", {"run_id": run(number), "datasets": [{"dataset": dataset}]})
    yield post("runs/log-inputs", {"run_id": run(0), "models": [{"model_id": "m-" + "1" * 32}]})
    for number, model in ((0, "m-" + "2" * 32), (4, "m-" + "3" * 32), (3, "of two words")):
        yield post("runs/outputs", {"run_id": run(number), "models": [{"model_id": model, "step": number}]})
    yield post("runs/delete", {"run_id": run(5)})


def generated(seed: int, count: int, started: int = 0) -> Iterator[Request]:
    """Yield `count` requests. New runs start after `started`, because MLflow lists two runs with the same start time in
    any order."""
    chance = random.Random(seed)
    clients = Clients(chance, started)
    for _ in range(count):
        yield one_request(chance, clients)


def one_request(chance: random.Random, clients: Clients) -> Request:
    path = chance.choices(
        (
            "runs/create",
            "runs/log-metric",
            "runs/log-batch",
            "runs/search",
            "runs/get",
            "metrics/get-history",
            "change",
        ),
        (12, 16, 12, 28, 11, 14, 7),
    )[0]
    if path == "change":
        return clients.change()
    changes = chance.random()
    if path in ("runs/get", "metrics/get-history"):
        fields = clients.get_run() if path == "runs/get" else clients.history()
        request = get(path, other_query(chance, fields) if changes < 0.5 else query_of(fields))
        if chance.random() < 0.04:  # MLflow reads the body of a GET request that has no query
            request = Request("GET", f"/api/2.0/mlflow/{path}".encode(), json_headers(), written(fields))
    else:
        fields = {
            "runs/create": clients.create,
            "runs/log-metric": clients.log_metric,
            "runs/log-batch": clients.log_batch,
            "runs/search": clients.search,
        }[path]()
        if changes < 0.5 and path == "runs/create":
            fields["experiment_id"] = ODD
        if changes < 0.38:
            fields = changed_fields(chance, fields)
        if path == "runs/log-batch":
            fields = in_one_piece(fields)
        body = written(fields)
        if 0.34 < changes < 0.5:
            body = other_body(chance, fields, body)
        request = Request("POST", f"/api/2.0/mlflow/{path}".encode(), json_headers(), body)
    return dressed(chance, request)


def in_one_piece(fields: Fields) -> Fields:
    """Return the batch. If a part (params or tags) contains a NUL character, return only this part, because MLflow
    would refuse the part but write the other parts."""
    for name in ("params", "tags"):
        if "\\u0000" in json.dumps(fields.get(name)):
            return {key: value for key, value in fields.items() if key in ("run_id", name)}
    return fields


def dressed(chance: random.Random, request: Request) -> Request:
    """Return the request with another path prefix, and sometimes with other headers, path or method."""
    if chance.random() < 0.3:
        request = replace(request, target=request.target.replace(b"/api/", b"/ajax-api/", 1))
    how = chance.random()
    if how < 0.08:
        return other_headers(chance, request)
    if how < 0.12:
        return other_path(chance, request)
    if how < 0.14:
        methods = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "get", "FOO")
        return replace(request, method=chance.choice(methods))
    return request
