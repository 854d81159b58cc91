"""The name server answers names of databases, and refuses other names so that the resolver asks the next server."""

from __future__ import annotations

import struct

from scripts.local_cloud.name_server import answer

NAMES = {"one.rds.amazonaws.com": "10.0.0.4"}
A, AAAA, REFUSED = 1, 28, 5


def query(name: str, kind: int, flags: int = 0x0100) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack("!HHHHHH", 7, flags, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", kind, 1)


def reply(name: str, kind: int = A) -> tuple[int, int, bytes]:
    """Return the response code, the number of answers, and the last four bytes."""
    found = answer(query(name, kind), NAMES.get)
    assert found is not None
    identifier, flags, questions, answers = struct.unpack_from("!HHHH", found)
    assert (identifier, questions, flags & 0x8000) == (7, 1, 0x8000)
    return flags & 0xF, answers, found[-4:]


def test_known_name_has_its_address() -> None:
    assert reply("One.RDS.amazonaws.com") == (0, 1, bytes([10, 0, 0, 4]))


def test_known_name_has_no_other_records() -> None:
    assert reply("one.rds.amazonaws.com", AAAA)[:2] == (0, 0)


def test_other_names_are_refused() -> None:
    assert reply("example.com")[:2] == (REFUSED, 0)


def test_messages_that_are_no_query_have_no_answer() -> None:
    whole = query("one.rds.amazonaws.com", A)
    assert [answer(whole[:length], NAMES.get) for length in range(len(whole))] == [None] * len(whole)
    assert answer(query("one.rds.amazonaws.com", A, flags=0x8100), NAMES.get) is None
