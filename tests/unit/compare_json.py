"""Compare our JSON parser and writer with those of the installed MLflow and protobuf.

python -m tests.unit.compare_json       with any release's Python; ends at the first difference
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from google.protobuf import json_format, message_factory
from google.protobuf.message import Message

from mlflow_host.server import json_decode, json_encode
from tests.unit.generated_messages import fill, json_for, messages

EACH = 5


def dictionaries(chance: random.Random) -> None:
    compared = described = 0
    for descriptor in messages():
        described += 1
        for _ in range(EACH):
            message = fill(message_factory.GetMessageClass(descriptor)(), chance)
            expected = json_format.MessageToDict(message, preserving_proto_field_name=True)
            found = json_encode.message_to_dict(message, preserving_proto_field_name=True)
            assert json.dumps(found) == json.dumps(expected), descriptor.full_name
            compared += can(json_encode.plain, message)
    assert compared > 2 * described, "most messages should be handled by our functions"


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
    """The error, if any, and the message's content afterwards, with which MLflow continues."""
    error = ""
    try:
        assert parse(js_dict=given, message=message, **options) is message
    except Exception as raised:
        error = repr(raised)
    return error, message.SerializeToString(deterministic=True)


def can(way: Callable[..., Any], *what: Any) -> bool:
    try:
        way(*what)
    except (json_encode.NotPlain, KeyError, TypeError, ValueError, OverflowError):
        return False
    return True


COMPARISONS = {compare.__name__: compare for compare in (dictionaries, read)}

if __name__ == "__main__":
    for comparison in COMPARISONS.values():
        comparison(random.Random(5))
