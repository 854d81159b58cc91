"""Convert property values between Pulumi's wire format and the engine's.

The wire format is a protobuf Struct in which a secret is a dictionary with a signature and an unknown value is a fixed
string (pulumi.runtime.rpc). In the engine a secret is a `Secret`, an unknown the string `UNKNOWN`, everything else
plain JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import json_format, struct_pb2

# Pulumi's constants (pulumi.runtime.rpc), copied because importing that module takes seconds.
UNKNOWN = "04da6b54-80e4-46f7-96ec-b56ff0331ba9"
SIGNATURE = "4dabf18193072939515e22adb298388d"
SECRET_SIGNATURE = "1b47061264138c4ac30d75fd1eb44270"
RESOURCE_SIGNATURE = "5cf8f73096256a8f31e491e813e4eb8e"

Props = dict[str, Any]


@dataclass(frozen=True)
class Secret:
    """A value that must not be shown; `repr` hides it."""

    value: Any = field(repr=False)


class UnsupportedValue(ValueError):
    """A property of a kind (an asset, an archive) that the rehearsal cannot apply."""


def from_wire(struct: struct_pb2.Struct) -> Props:
    """The Struct as Python values: whole floats as int, nulls dropped from dictionaries as Pulumi's engine does.

    Raises UnsupportedValue for assets and archives.
    """
    return dict(_from_json(json_format.MessageToDict(struct)))


def _from_json(value: Any) -> Any:
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, list):
        return [_from_json(each) for each in value]
    if not isinstance(value, dict):
        return value
    match value.get(SIGNATURE):
        case None:
            return {key: _from_json(each) for key, each in value.items() if each is not None}
        case signature if signature == SECRET_SIGNATURE:
            return Secret(_from_json(value.get("value")))
        case signature if signature == RESOURCE_SIGNATURE:
            return value.get("id") or value.get("urn")
        case _:
            raise UnsupportedValue("assets and archives cannot be rehearsed")


def to_wire(props: Mapping[str, Any]) -> struct_pb2.Struct:
    """The reverse of `from_wire`."""
    struct = struct_pb2.Struct()
    struct.update({key: _to_json(value) for key, value in props.items()})
    return struct


def _to_json(value: Any) -> Any:
    return transform(value, lambda secret: {SIGNATURE: SECRET_SIGNATURE, "value": _to_json(secret.value)})


def default_tags(setting: Any) -> Mapping[str, str]:
    """The tags of a provider's `defaultTags`, which arrives as JSON text or as {"tags": {…}}."""
    document = json.loads(setting) if isinstance(setting, str) else setting or {}
    return dict(document.get("tags", {}))


def transform(value: Any, on_secret: Callable[[Secret], Any]) -> Any:
    """`value` with each outermost Secret replaced by the result of `on_secret`."""
    if isinstance(value, Secret):
        return on_secret(value)
    if isinstance(value, list):
        return [transform(each, on_secret) for each in value]
    if isinstance(value, dict):
        return {key: transform(each, on_secret) for key, each in value.items()}
    return value


def reveal(value: Any) -> Any:
    """`value` with its secrets in clear, for an AWS call."""
    return transform(value, lambda secret: reveal(secret.value))


def holds_secret(value: Any) -> bool:
    """Whether `value` is or contains a Secret."""
    if isinstance(value, dict):
        return any(holds_secret(each) for each in value.values())
    if isinstance(value, list):
        return any(holds_secret(each) for each in value)
    return isinstance(value, Secret)


def holds_unknown(value: Any) -> bool:
    """Whether `value` is or contains a value that is known only after an apply."""
    if isinstance(value, Secret):
        return holds_unknown(value.value)
    if isinstance(value, dict):
        return any(holds_unknown(each) for each in value.values())
    if isinstance(value, list):
        return any(holds_unknown(each) for each in value)
    return bool(value == UNKNOWN)
