"""A faster replacement for protobuf's ParseDict, which MLflow uses to parse requests.

`ParseDict` looks up a field's type for every value. `parse_dict` looks up each field's type only once, and builds the
message with protobuf's compiled constructor. `parse_dict` itself handles only JSON in the form that MLflow's clients
send: declared field names, and values of the field's type. For other JSON, `parse_dict` calls `ParseDict`, so the
results and errors are the same as those of `ParseDict`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

Check = Callable[[Any], None]
Fields = dict[str, type | Check]
"""The checks of a message's fields, by field name. For a scalar field, the check is a Python type. For any other field,
the check is a function that raises NotPlain for a wrong value."""

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

thorough = json_format.ParseDict


class NotPlain(Exception):
    """Only protobuf's own function can parse a message or its JSON, for example because the message has maps."""


def parse_dict(js_dict: Any, message: Message, *unusual: Any, **options: Any) -> Message:
    """Return the same result as `json_format.ParseDict`. Calls `ParseDict` for unusual JSON, messages or options."""
    if not unusual and options.keys() <= {"ignore_unknown_fields"} and type(js_dict) is dict and js_dict:
        try:
            made = plain(js_dict, type(message))
        except Exception:
            made = None
        if made is not None and not message.ByteSize():
            message.MergeFrom(made)
            return message
    return thorough(js_dict, message, *unusual, **options)


def is_repeated(field: FieldDescriptor) -> bool:
    found = field.is_repeated if hasattr(field, "is_repeated") else field.label == FieldDescriptor.LABEL_REPEATED
    return bool(found)


def is_googles(descriptor: Descriptor) -> bool:
    """Return true if protobuf may define a special JSON form for this message (timestamps, structures, …)."""
    return bool(descriptor.full_name.startswith("google.protobuf."))


def plain(js_dict: dict[str, Any], kind: type[Message]) -> Message:
    """Return a new message. Raises an exception if the JSON has names or values that only `ParseDict` handles."""
    fields = known.get(kind)
    if fields is None:
        fields = known[kind] = fields_of(kind.DESCRIPTOR)
    check(fields, js_dict)
    return kind(**js_dict)


known: dict[type[Message], Fields] = {}


def check(fields: Fields, value: Any) -> None:
    """Raises NotPlain or KeyError if protobuf's constructor might convert `value` differently than `ParseDict`."""
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
    """Return the fields that `parse_dict` handles. Other fields need `ParseDict`: maps, oneof, bytes, 32-bit floats,
    Google's own messages, and recursive messages."""
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
