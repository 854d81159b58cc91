"""Generate JSON in usual and unusual forms for every message type that MLflow defines."""

from __future__ import annotations

import importlib
import math
import pkgutil
import random
from typing import Any

import mlflow.protos
from google.protobuf import any_pb2, duration_pb2, field_mask_pb2, struct_pb2, timestamp_pb2, wrappers_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from mlflow_host.server.json_decode import is_repeated

NUMBERS = [0, 1, -1, 2**31 - 1, -(2**31)]
VALUES: dict[int, list[Any]] = {
    FieldDescriptor.CPPTYPE_INT32: NUMBERS,
    FieldDescriptor.CPPTYPE_UINT32: [0, 1, 2**32 - 1],
    FieldDescriptor.CPPTYPE_INT64: [*NUMBERS, 2**63 - 1, 1_700_000_000_000],
    FieldDescriptor.CPPTYPE_UINT64: [0, 2**64 - 1],
    FieldDescriptor.CPPTYPE_DOUBLE: [0.0, -0.0, 1.5, 1e300, 1e16, math.nan, math.inf, -math.inf],
    FieldDescriptor.CPPTYPE_FLOAT: [0.1, 1e30, math.nan],
    FieldDescriptor.CPPTYPE_BOOL: [True, False],
    FieldDescriptor.CPPTYPE_STRING: ["", "loss", "µ\n\"'", "\u2028 🙂"],
}

UNUSUAL_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**400, 5.0, 5.5, -0.0, 1e300),
    *(
        math.nan,
        math.inf,
        -math.inf,
        "",
        "1",
        "1.0",
        "1e3",
        " 1",
        "NaN",
        "nan",
        "Infinity",
        "true",
        "YQ",
        "\ud800",
        "µ\0",
    ),
    *([], [None], [1, "1"], ["a", "b"], [True], [{}], {}, {"a": 1}, {"key": None}, {"key": "a", "value": "b"}, [["a"]]),
]
UNUSUAL_NAMES = ["unknown", "Key", "[mlflow.unknown]", ""]


def messages() -> list[Descriptor]:
    """Return every message type that MLflow defines, including nested types, and Google's types that have their own
    JSON form."""

    def within(descriptor: Descriptor) -> list[Descriptor]:
        return [descriptor, *(each for nested in descriptor.nested_types for each in within(nested))]

    names = [module.name for module in pkgutil.iter_modules(mlflow.protos.__path__) if module.name.endswith("_pb2")]
    modules = [importlib.import_module(f"mlflow.protos.{name}") for name in names]
    modules += [any_pb2, duration_pb2, field_mask_pb2, struct_pb2, timestamp_pb2, wrappers_pb2]
    files = [module.DESCRIPTOR for module in modules if hasattr(module, "DESCRIPTOR")]
    found = [each for file in files for top in file.message_types_by_name.values() for each in within(top)]
    return [each for each in found if not each.GetOptions().map_entry]


def json_for(descriptor: Descriptor, chance: random.Random, unusual: float, depth: int = 0) -> dict[str, Any]:
    """Return JSON that a client may send for a message. `unusual` is the probability of an unusual name or value."""
    found: dict[str, Any] = {}
    for field in chance.sample(list(descriptor.fields), len(descriptor.fields)):
        if chance.random() < 0.4 or (field.message_type and depth > 2):
            continue
        name = field.name if chance.random() >= unusual else chance.choice([*UNUSUAL_NAMES, field.json_name])
        if chance.random() < unusual:
            found[name] = chance.choice(UNUSUAL_VALUES)
        elif is_repeated(field):
            found[name] = [json_of_one(field, chance, unusual, depth) for _ in range(chance.randint(0, 3))]
        else:
            found[name] = json_of_one(field, chance, unusual, depth)
    return found


def json_of_one(field: FieldDescriptor, chance: random.Random, unusual: float, depth: int) -> Any:
    if field.message_type:
        return json_for(field.message_type, chance, unusual, depth + 1)
    if field.enum_type:
        return chance.choice(field.enum_type.values).name
    if field.type == FieldDescriptor.TYPE_BYTES:
        return "AP9ieXRlcw=="
    if field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE:
        return chance.choice([0, 3, 0.0, -0.0, 0.5, 1e300, 2**53 + 1])
    return chance.choice(VALUES[field.cpp_type])
