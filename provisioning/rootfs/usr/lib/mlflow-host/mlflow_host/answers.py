"""The libraries that MLflow writes its answers with, made faster where it uses them.

MLflow turns a message into dictionaries with protobuf's json_format and those into indented JSON, which is half of what
a search or a metric's history costs. `MessageToDict` decides at each value what its field is; `message_to_dict` decides
once a field. The standard library indents in Python and writes JSON without line breaks in C, so answers have none.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

Convert = Callable[[Any], Any]

INTEGERS_AS_TEXT = {FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64}
AS_THEY_ARE = {FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_BOOL}

thorough = json_format.MessageToDict


class NotPlain(Exception):
    """A message has what only the thorough way can write: maps, extensions, Google's own messages."""


def install() -> None:
    """For all that is imported from now on."""
    json_format.MessageToDict = message_to_dict
    json.JSONEncoder.__init__ = never_indenting(json.JSONEncoder.__init__)  # type: ignore[method-assign]


def never_indenting(initialize: Callable[..., None]) -> Callable[..., None]:
    def initialize_encoder(encoder: json.JSONEncoder, **options: Any) -> None:
        if options.get("indent") is not None:
            options["indent"] = None
            options["separators"] = options.get("separators") or (",", ": ")
        initialize(encoder, **options)

    return initialize_encoder


def message_to_dict(message: Message, *unusual: Any, preserving_proto_field_name: bool = False, **options: Any) -> Any:
    """What `json_format.MessageToDict` returns, made by that where message or options are unusual."""
    if preserving_proto_field_name and not unusual and not options:
        try:
            return plain(message)
        except NotPlain:
            pass
    return thorough(message, *unusual, preserving_proto_field_name=preserving_proto_field_name, **options)


def plain(message: Message) -> dict[str, Any]:
    converted = {}
    for field, value in message.ListFields():
        convert = conversions.get(field)
        if convert is None:
            convert = conversions[field] = conversion(field)
        converted[field.name] = convert(value)
    return converted


conversions: dict[FieldDescriptor, Convert] = {}


def conversion(field: FieldDescriptor) -> Convert:
    """How a field's value, or list of values, is written."""
    one = conversion_of_one(field)
    repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == FieldDescriptor.LABEL_REPEATED
    return partial(each, one) if repeated and one is not refuse else one


def each(convert: Convert, values: Any) -> list[Any]:
    return [convert(value) for value in values]


def conversion_of_one(field: FieldDescriptor) -> Convert:
    kind = field.cpp_type
    if field.is_extension:
        return refuse
    if field.message_type is not None:
        googles = field.message_type.full_name.startswith("google.protobuf.")
        return refuse if googles or field.message_type.GetOptions().map_entry else plain
    if field.type == FieldDescriptor.TYPE_BYTES:
        return lambda value: base64.b64encode(value).decode()
    if kind == FieldDescriptor.CPPTYPE_STRING or kind in AS_THEY_ARE:
        return as_it_is
    if kind in INTEGERS_AS_TEXT:
        return str
    if kind == FieldDescriptor.CPPTYPE_DOUBLE:
        return double
    names = {value.number: value.name for value in field.enum_type.values} if field.enum_type else {}
    plain_enum = names and field.enum_type.is_closed and not any(v.has_options for v in field.enum_type.values)
    return names.__getitem__ if plain_enum else refuse


def as_it_is(value: Any) -> Any:
    return value


def double(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def refuse(_: object) -> Any:
    raise NotPlain
