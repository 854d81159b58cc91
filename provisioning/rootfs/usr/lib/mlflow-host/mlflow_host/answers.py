"""What MLflow writes its answers with, made faster: protobuf's json_format and the standard library's JSON.

MLflow turns a message into dictionaries with json_format and writes indented JSON: half of what a long answer costs
that is not made by PostgreSQL (`mlflow_host.direct_answers`). `MessageToDict` decides at each value what its field is;
here it is decided once a field. The standard library indents in Python and writes JSON without line breaks in C, so
answers have none. MLflow itself stays as it is.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from functools import partial
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
    """A message, or JSON for one, has what only the thorough way can handle: maps, extensions, Google's messages."""


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
    if preserving_proto_field_name and not unusual and not options and not is_googles(message.DESCRIPTOR):
        try:
            return plain(message)
        except NotPlain:
            pass
    return thorough(message, *unusual, preserving_proto_field_name=preserving_proto_field_name, **options)


def dictionaries() -> ToDictionary:
    """What makes dictionaries of messages, and remembers how each field is written. Raises NotPlain."""
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
        """How a field's value, or list of values, is written; None: as it is."""
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
        """The fields of the messages in a list, where all of them are single values written as they are."""
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
    """Whether JSON has a form of its own for it (timestamps, structures, …)."""
    return bool(descriptor.full_name.startswith("google.protobuf."))


def in_words(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def refuse(_: object) -> Any:
    raise NotPlain


plain = dictionaries()
