"""Compare our JSON parser with the parser of the installed protobuf.

python -m tests.unit.compare_json       with any release's Python; the program ends at the first difference
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from google.protobuf import message_factory
from google.protobuf.message import Message

from mlflow_host.server import json_decode
from tests.unit.generated_messages import json_for, messages

EACH = 5


def read(chance: random.Random) -> None:
    plain = described = 0
    for descriptor in messages():
        kind = message_factory.GetMessageClass(descriptor)
        described += 1
        for unusual in (0.0, 0.0, 0.05, 0.2, 0.5):
            for _ in range(EACH):
                given = json_for(descriptor, chance, unusual)
                for options in ({"ignore_unknown_fields": True}, {}):
                    expected = outcome(json_decode.thorough, given, kind(), options)
                    assert outcome(json_decode.parse_dict, given, kind(), options) == expected, (descriptor, given)
                plain += bool(given) and can(json_decode.plain, given, kind)
    assert plain > EACH * described, "most JSON of clients should be handled by our functions"


def outcome(parse: Callable[..., Any], given: Any, message: Message, options: dict[str, Any]) -> tuple[str, bytes]:
    """Return the error of `parse`, if any, and the content that `parse` wrote to `message` and that MLflow would
    use."""
    error = ""
    try:
        assert parse(js_dict=given, message=message, **options) is message
    except Exception as raised:
        error = repr(raised)
    return error, message.SerializeToString(deterministic=True)


def can(way: Callable[..., Any], *what: Any) -> bool:
    try:
        way(*what)
    except (json_decode.NotPlain, KeyError, TypeError, ValueError, OverflowError):
        return False
    return True


if __name__ == "__main__":
    read(random.Random(5))
