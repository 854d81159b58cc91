"""Convert property values between Pulumi's wire format and the engine's format.

The wire format is a protobuf Struct (pulumi.runtime.rpc): a secret is a dictionary with a signature, and an unknown
value is a fixed string. In the engine, a secret is a `Secret` and an unknown value is the string `UNKNOWN`. Every
other value is plain JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import json_format, struct_pb2

# These constants are copied from pulumi.runtime.rpc, because an import of that module takes seconds.
UNKNOWN = "04da6b54-80e4-46f7-96ec-b56ff0331ba9"
SIGNATURE = "4dabf18193072939515e22adb298388d"
SECRET_SIGNATURE = "1b47061264138c4ac30d75fd1eb44270"
RESOURCE_SIGNATURE = "5cf8f73096256a8f31e491e813e4eb8e"

Props = dict[str, Any]


@dataclass(frozen=True)
class Secret:
    """A secret value; `repr` does not show the value."""

    value: Any = field(repr=False)


class UnsupportedValue(ValueError):
    """A property value is an asset or an archive, which the rehearsal cannot apply."""


def from_wire(struct: struct_pb2.Struct) -> Props:
    """Convert the Struct to Python values. As in Pulumi's engine, whole floats become int and null entries are omitted.

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
    """Return the tags of a provider's `defaultTags`, which is JSON text or {"tags": {…}}."""
    document = json.loads(setting) if isinstance(setting, str) else setting or {}
    return dict(document.get("tags", {}))


def transform(value: Any, on_secret: Callable[[Secret], Any]) -> Any:
    """Return `value` with each outermost Secret replaced by the result of `on_secret`."""
    if isinstance(value, Secret):
        return on_secret(value)
    if isinstance(value, list):
        return [transform(each, on_secret) for each in value]
    if isinstance(value, dict):
        return {key: transform(each, on_secret) for key, each in value.items()}
    return value


def reveal(value: Any) -> Any:
    """Return `value` with its secrets in clear text, for an AWS call."""
    return transform(value, lambda secret: reveal(secret.value))


def holds_secret(value: Any) -> bool:
    """Return whether `value` is or contains a Secret."""
    if isinstance(value, dict):
        return any(holds_secret(each) for each in value.values())
    if isinstance(value, list):
        return any(holds_secret(each) for each in value)
    return isinstance(value, Secret)


def holds_unknown(value: Any) -> bool:
    """Return whether `value` is or contains a value that Pulumi computes only during an apply."""
    if isinstance(value, Secret):
        return holds_unknown(value.value)
    if isinstance(value, dict):
        return any(holds_unknown(each) for each in value.values())
    if isinstance(value, list):
        return any(holds_unknown(each) for each in value)
    return bool(value == UNKNOWN)
