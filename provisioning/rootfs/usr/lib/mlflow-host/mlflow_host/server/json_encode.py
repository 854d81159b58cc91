"""Faster replacement for protobuf's MessageToDict and for indented JSON, with which MLflow writes its responses.

Outside the fast path, half of the time that a long response takes is spent in MLflow's functions. `MessageToDict` looks
up a field's type for every value; this module looks it up once per field. The standard library indents JSON in Python,
but writes JSON without line breaks in C, so responses have no line breaks.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

Convert = Callable[[Any], Any]
ToDictionary = Callable[[Message], dict[str, Any]]

INTEGERS_AS_TEXT = {FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64}
AS_THEY_ARE = {
    FieldDescriptor.CPPTYPE_STRING,
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_BOOL,
}

thorough = json_format.MessageToDict


class NotPlain(Exception):
    """A message, or JSON for one, needs protobuf's own function: it has maps, extensions or Google's messages."""


def without_indent(module: Any) -> Any:
    """The module `json` for one importer: its `dumps` writes no line breaks, all other names are json's own."""

    def dumps(value: Any, *, indent: object = None, **options: Any) -> str:
        if indent is not None:
            options.setdefault("separators", (",", ": "))
        written: str = module.dumps(value, **options)
        return written

    return SimpleNamespace(**vars(module) | {"dumps": dumps})


def message_to_dict(message: Message, *unusual: Any, preserving_proto_field_name: bool = False, **options: Any) -> Any:
    """Same result as `json_format.MessageToDict`, which is called for unusual messages or options."""
    if preserving_proto_field_name and not unusual and not options and not is_googles(message.DESCRIPTOR):
        try:
            return plain(message)
        except Exception:
            pass
    return thorough(message, *unusual, preserving_proto_field_name=preserving_proto_field_name, **options)


def dictionaries() -> ToDictionary:
    """A function that converts messages to dictionaries and caches each field's conversion. It raises NotPlain."""
    names: dict[FieldDescriptor, str] = {}
    conversions: dict[FieldDescriptor, Convert | None] = {}

    def dictionary(message: Message) -> dict[str, Any]:
        converted = {}
        for field, value in message.ListFields():
            if field not in conversions:
                names[field] = field.name  # first, for other threads
                conversions[field] = conversion(field)
            convert = conversions[field]
            converted[names[field]] = convert(value) if convert else value
        return converted

    def conversion(field: FieldDescriptor) -> Convert | None:
        """The conversion of a field's value or list of values; None: no conversion."""
        one = conversion_of_one(field)
        if not is_repeated(field) or one is refuse:
            return one
        if one is dictionary and (fields := as_they_are(field)):
            names.update(fields)
            return each_as_it_is
        return partial(each, one) if one else list

    def conversion_of_one(field: FieldDescriptor) -> Convert | None:
        kind = field.cpp_type
        if field.is_extension:
            return refuse
        if field.message_type is not None:
            return refuse if is_googles(field.message_type) or field.message_type.GetOptions().map_entry else dictionary
        if field.type == FieldDescriptor.TYPE_BYTES:
            return lambda value: base64.b64encode(value).decode()
        if kind in AS_THEY_ARE:
            return None
        if kind in INTEGERS_AS_TEXT:
            return str
        if kind == FieldDescriptor.CPPTYPE_DOUBLE:
            return in_words
        labels = {value.number: value.name for value in field.enum_type.values} if field.enum_type else {}
        plain_enum = labels and field.enum_type.is_closed and not any(v.has_options for v in field.enum_type.values)
        return labels.__getitem__ if plain_enum else refuse

    def as_they_are(field: FieldDescriptor) -> dict[FieldDescriptor, str]:
        """The fields of a list's messages, if all are single values that need no conversion; else {}."""
        fields = field.message_type.fields
        flat = not any(is_repeated(inner) or conversion_of_one(inner) for inner in fields)
        return {inner: inner.name for inner in fields} if flat and not field.message_type.is_extendable else {}

    def each_as_it_is(messages: Any) -> list[dict[str, Any]]:
        return [{names[field]: value for field, value in message.ListFields()} for message in messages]

    return dictionary


def each(convert: Convert, values: Any) -> list[Any]:
    return [convert(value) for value in values]


def is_repeated(field: FieldDescriptor) -> bool:
    found = field.is_repeated if hasattr(field, "is_repeated") else field.label == FieldDescriptor.LABEL_REPEATED
    return bool(found)


def is_googles(descriptor: Descriptor) -> bool:
    """Whether protobuf defines a special JSON form for it (timestamps, structures, …)."""
    return bool(descriptor.full_name.startswith("google.protobuf."))


def in_words(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def refuse(_: object) -> Any:
    raise NotPlain


plain = dictionaries()
