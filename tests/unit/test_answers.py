"""What MLflow's answers are written with says the same as what it replaces."""

import importlib
import json
import math
import pkgutil
import random
import subprocess
import sys

import mlflow.protos
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Value
from mlflow_host import answers

from tests.services import HOST_PACKAGE

NUMBERS = [0, 1, -1, 2**31 - 1, -(2**31)]
VALUES = {
    FieldDescriptor.CPPTYPE_INT32: NUMBERS,
    FieldDescriptor.CPPTYPE_UINT32: [0, 1, 2**32 - 1],
    FieldDescriptor.CPPTYPE_INT64: [*NUMBERS, 2**63 - 1, 1_700_000_000_000],
    FieldDescriptor.CPPTYPE_UINT64: [0, 2**64 - 1],
    FieldDescriptor.CPPTYPE_DOUBLE: [0.0, -0.0, 1.5, 1e300, 1e16, math.nan, math.inf, -math.inf],
    FieldDescriptor.CPPTYPE_FLOAT: [0.1, 1e30, math.nan],
    FieldDescriptor.CPPTYPE_BOOL: [True, False],
    FieldDescriptor.CPPTYPE_STRING: ["", "loss", "µ\n\"'", "\u2028 🙂"],
}


def messages() -> list[Descriptor]:
    """Every message that MLflow defines, those within others included."""

    def within(descriptor: Descriptor) -> list[Descriptor]:
        return [descriptor, *(each for nested in descriptor.nested_types for each in within(nested))]

    names = [module.name for module in pkgutil.iter_modules(mlflow.protos.__path__) if module.name.endswith("_pb2")]
    modules = [importlib.import_module(f"mlflow.protos.{name}") for name in names]
    files = [module.DESCRIPTOR for module in modules if hasattr(module, "DESCRIPTOR")]
    found = [each for file in files for top in file.message_types_by_name.values() for each in within(top)]
    return [each for each in found if not each.GetOptions().map_entry]


def fill(message: Message, chance: random.Random, depth: int = 0) -> Message:
    for field in message.DESCRIPTOR.fields:
        if chance.random() < 0.25 or (field.message_type and depth > 3):
            continue
        count = chance.randint(0, 3) if field.is_repeated else 1
        if field.message_type and field.message_type.GetOptions().map_entry:
            kinds = field.message_type.fields_by_name
            if kinds["key"].cpp_type == FieldDescriptor.CPPTYPE_STRING and not kinds["value"].message_type:
                getattr(message, field.name)["key"] = value_for(kinds["value"], chance)
        elif field.message_type:
            for _ in range(count):
                held = getattr(message, field.name)
                one = held.add() if field.is_repeated else held
                if isinstance(one, Value):
                    one.string_value = "a value"
                elif not field.message_type.full_name.startswith("google.protobuf."):
                    fill(one, chance, depth + 1)
        elif field.is_repeated:
            getattr(message, field.name).extend(value_for(field, chance) for _ in range(count))
        else:
            setattr(message, field.name, value_for(field, chance))
    return message


def value_for(field: FieldDescriptor, chance: random.Random) -> object:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return b"\x00\xffbytes"
    if field.enum_type:
        return chance.choice(field.enum_type.values).number
    return chance.choice(VALUES[field.cpp_type])


def test_every_message_of_mlflow_becomes_the_same_dictionary_as_by_protobuf():
    chance = random.Random(5)
    plain = 0
    described = messages()
    for descriptor in described:
        for _ in range(5):
            message = fill(message_factory.GetMessageClass(descriptor)(), chance)
            expected = json_format.MessageToDict(message, preserving_proto_field_name=True)
            found = answers.message_to_dict(message, preserving_proto_field_name=True)
            assert json.dumps(found) == json.dumps(expected), descriptor.full_name
            plain += is_plain(message)
    assert plain > 2 * len(described), "most messages should take the short way"


def is_plain(message: Message) -> bool:
    try:
        answers.plain(message)
    except answers.NotPlain:
        return False
    return True


def test_unusual_options_are_left_to_protobuf():
    from mlflow.protos.service_pb2 import Metric

    metric = Metric(key="loss", value=0.5, timestamp=3, step=1)
    assert answers.message_to_dict(metric) == json_format.MessageToDict(metric)
    assert answers.message_to_dict(metric, True) == json_format.MessageToDict(metric, True)


def test_an_installed_encoder_writes_no_line_breaks_and_the_same_values():
    code = """
import json
from mlflow_host import answers
value = {"b": [1, 2.5, None, {"µ": True}], "a": "x\\ny"}
usual = [{"indent": 2}, {"indent": 4, "sort_keys": True}, {"indent": 2, "separators": (" , ", ":")}]
before = [json.dumps(value, **options) for options in usual]
answers.install()
after = [json.dumps(value, **options) for options in usual]
assert all("\\n" in text for text in before) and not any("\\n" in text for text in after), after
assert [json.loads(text) for text in before] == [json.loads(text) for text in after]
from mlflow.utils import proto_json_utils
assert proto_json_utils.MessageToDict is answers.message_to_dict
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(HOST_PACKAGE)})
