"""What MLflow reads its requests with, made faster where it uses it: protobuf's json_format.

`ParseDict` decides at each value what its field is and may hold. `parse_dict` knows it once a field, and has protobuf's
own constructor, which is compiled, make the message of JSON that is as clients write it: each name as it was declared,
each value of the type that its field has. Whatever else JSON may say is left to `ParseDict`, with its result or error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from mlflow_host.answers import NotPlain, is_googles, is_repeated

Check = Callable[[Any], None]
Fields = dict[str, type | Check]
"""What a message's fields may hold, by name: the one type of a scalar's values, or what raises NotPlain of others."""

TYPES: dict[int, type] = {
    FieldDescriptor.CPPTYPE_INT32: int,
    FieldDescriptor.CPPTYPE_INT64: int,
    FieldDescriptor.CPPTYPE_UINT32: int,
    FieldDescriptor.CPPTYPE_UINT64: int,
    FieldDescriptor.CPPTYPE_DOUBLE: float,
    FieldDescriptor.CPPTYPE_BOOL: bool,
    FieldDescriptor.CPPTYPE_STRING: str,
}
SCALARS = frozenset(TYPES.values())
GREATEST = sys.float_info.max

NOT_PLAIN = (NotPlain, KeyError, TypeError, ValueError, OverflowError)
"""What leaves JSON to the thorough way; all but the first come of names or values that a field does not take."""

thorough = json_format.ParseDict


def install() -> None:
    """For all that is imported from now on."""
    json_format.ParseDict = parse_dict


def parse_dict(js_dict: Any, message: Message, *unusual: Any, **options: Any) -> Message:
    """What `json_format.ParseDict` does, done by that where JSON, message or options are unusual."""
    if not unusual and options.keys() <= {"ignore_unknown_fields"} and type(js_dict) is dict and js_dict:
        try:
            made = plain(js_dict, type(message))
        except NOT_PLAIN:
            made = None
        if made is not None and not message.ByteSize():
            message.MergeFrom(made)
            return message
    return thorough(js_dict, message, *unusual, **options)


def plain(js_dict: dict[str, Any], kind: type[Message]) -> Message:
    """A new message. Raises one of `NOT_PLAIN`."""
    fields = known.get(kind)
    if fields is None:
        fields = known[kind] = fields_of(kind.DESCRIPTOR)
    check(fields, js_dict)
    return kind(**js_dict)


known: dict[type[Message], Fields] = {}


def check(fields: Fields, value: Any) -> None:
    """Raises NotPlain or KeyError where the constructor would take `value` otherwise than the thorough way."""
    if type(value) is not dict:
        raise NotPlain
    for name, held in value.items():
        expected = fields[name]
        found = type(held)
        if found is expected:
            if found is float and not -GREATEST <= held <= GREATEST:
                raise NotPlain
        elif expected not in SCALARS:
            expected(held)
        elif expected is not float or found is not int:
            raise NotPlain


def fields_of(descriptor: Descriptor, within: tuple[str, ...] = ()) -> Fields:
    """The fields that plain JSON may name. Those that are left out are left to the thorough way: maps, alternatives
    (oneof), bytes, numbers of 32 bits, Google's own messages, messages within themselves."""
    by_json_name = {field.json_name: field.number for field in descriptor.fields}
    found: Fields = {}
    if is_googles(descriptor):
        return found
    for field in descriptor.fields:
        if field.containing_oneof is None and by_json_name.get(field.name, field.number) == field.number:
            expected = expected_of(field, (*within, descriptor.full_name))
            if expected is not None:
                found[field.name] = partial(check_each, expected) if is_repeated(field) else expected
    return found


def expected_of(field: FieldDescriptor, within: tuple[str, ...]) -> type | Check | None:
    if nested := field.message_type:
        if is_googles(nested) or nested.GetOptions().map_entry or nested.full_name in within:
            return None
        return partial(check, fields_of(nested, within))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return None
    if field.enum_type:
        return partial(check_label, frozenset(value.name for value in field.enum_type.values))
    return TYPES.get(field.cpp_type)


def check_each(expected: type | Check, values: Any) -> None:
    if type(values) is not list or expected is float:
        raise NotPlain
    if expected in SCALARS:
        if any(type(value) is not expected for value in values):
            raise NotPlain
    else:
        for value in values:
            expected(value)


def check_label(labels: frozenset[str], value: Any) -> None:
    if type(value) is not str or value not in labels:
        raise NotPlain
