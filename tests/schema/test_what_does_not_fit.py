"""Carrying between schemas that differ in ways MLflow's releases do not (yet): nothing fails, nothing goes unreported,
and what was lost on the way back returns on the way forward. By hand-made schemas, so these take seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg2
import pytest
from mlflow_host.schema.cluster import Cluster, connection, create_empty, rows, run, value
from mlflow_host.schema.copying import CarryError, Outcome, carry
from mlflow_host.schema.merging import merge
from schema.private_cluster import private_cluster

NEWER = """
CREATE TABLE parents (
    id serial PRIMARY KEY, name text NOT NULL, status text, boss integer REFERENCES parents,
    CHECK (status IN ('on', 'off', 'paused')));
CREATE TABLE children (
    parent_id integer NOT NULL REFERENCES parents ON DELETE CASCADE, key text, value text, number bigint, note json,
    friend integer REFERENCES parents ON DELETE SET NULL, PRIMARY KEY (parent_id, key));
CREATE TABLE only_newer (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, parent_id integer NOT NULL REFERENCES parents,
    above bigint REFERENCES only_newer, text text);
"""
OLDER = """
CREATE TABLE parents (
    id serial PRIMARY KEY, name varchar(10) NOT NULL UNIQUE, status varchar(10), boss integer REFERENCES parents,
    kind text NOT NULL, shout text GENERATED ALWAYS AS (upper(name)) STORED,
    CONSTRAINT states CHECK (status IN ('on', 'off')));
CREATE TABLE children (
    parent_id integer NOT NULL REFERENCES parents ON DELETE CASCADE, key varchar(5), value varchar(5) NOT NULL,
    number integer, PRIMARY KEY (parent_id, key));
CREATE INDEX by_value ON children (value);
"""
ROWS = """
INSERT INTO parents (id, name, status, boss) VALUES
    (1, 'ann', 'on', NULL), (2, 'bob', 'off', 1), (3, 'twice', 'on', 1), (4, 'twice', 'on', 1),
    (5, 'cy', 'paused', NULL), (6, 'a long, long name', 'on', 2);
SELECT setval('parents_id_seq', 40);
INSERT INTO children VALUES
    (1, 'k', 'short', 7, '{"a": 1}', 2), (1, 'long', 'too long for it', 1, NULL, NULL),
    (1, 'longer key', 'v', 1, NULL, NULL),
    (2, 'k', NULL, 5000000000, NULL, 1), (4, 'k', 'v', 1, NULL, NULL), (5, 'k', 'v', 1, NULL, NULL);
INSERT INTO only_newer (parent_id, above, text) VALUES (1, NULL, 'one'), (1, 1, 'below one'), (2, NULL, 'two');
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with private_cluster() as server:
        yield server.cluster


@pytest.fixture
def filled(cluster: Cluster) -> Cluster:
    make(cluster, "newer", NEWER)
    make(cluster, "older", OLDER)
    do(cluster, "newer", ROWS)
    return cluster


def test_what_fits_is_carried_and_what_does_not_is_listed_by_table_column_and_count(filled: Cluster) -> None:
    outcome = carry(filled, "newer", "older")
    assert {(1, "ann", "on", None, "", "ANN"), (2, "bob", "off", 1, "", "BOB")} <= set(
        look(filled, "older", "SELECT id, name, status, boss, kind, shout FROM parents")
    )
    assert look(filled, "older", "SELECT parent_id, key, value, number FROM children ORDER BY 1, 2") == [
        (1, "k", "short", 7),
        (1, "long", "too l", 1),
        (2, "k", "", None),
    ]
    assert told(outcome) == {
        ("only_newer", None, 3, "left behind"),
        ("parents", "kind", 6, "filled"),
        ("parents", "name", 1, "left behind"),
        ("parents", None, 1, "left behind"),  # one for the check, one of the two that share a name
        ("children", "value", 1, "shortened"),
        ("children", "value", 1, "filled"),
        ("children", "number", 1, "emptied"),
        ("children", "key", 1, "left behind"),
        ("children", "note", 1, "left behind"),
        ("children", "friend", 2, "left behind"),
        ("children", None, 2, "left behind"),  # their parents had to stay
    }


def test_numbers_of_deleted_rows_are_not_given_out_again(filled: Cluster) -> None:
    carry(filled, "newer", "older")
    do(filled, "older", "INSERT INTO parents (name, status, kind) VALUES ('new', 'on', '')")
    assert look(filled, "older", "SELECT id FROM parents WHERE name = 'new'") == [(41,)]


def test_the_copy_ends_with_the_constraints_and_indexes_it_began_with(filled: Cluster) -> None:
    query = "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY indexname"
    constraints = "SELECT conname, contype::text, convalidated FROM pg_constraint WHERE conrelid > 0 ORDER BY conname"
    before = look(filled, "older", query), look(filled, "older", constraints)
    carry(filled, "newer", "older")
    assert (look(filled, "older", query), look(filled, "older", constraints)) == before
    with pytest.raises(psycopg2.errors.CheckViolation):
        do(filled, "older", "UPDATE parents SET status = 'paused'")


def test_a_source_in_use_is_read_as_of_one_moment(filled: Cluster) -> None:
    """Counts are compared with the snapshot that was copied, whoever writes meanwhile."""
    with connection(filled, "newer") as writer:
        run(writer, "INSERT INTO parents (name) VALUES ('late')")
        outcome = carry(filled, "newer", "older")
    assert {entry.table for entry in outcome.carried} == {"parents", "children"}
    assert look(filled, "older", "SELECT 1 FROM parents WHERE name = 'late'") == []


def test_a_table_that_cannot_be_read_ends_the_copy_with_its_own_error(filled: Cluster) -> None:
    do(filled, "newer", "ALTER TABLE children ALTER number TYPE text USING 'many'")
    with pytest.raises(psycopg2.errors.InvalidTextRepresentation, match="many"):
        carry(filled, "newer", "older")


def test_forward_again_brings_back_what_did_not_fit_under_what_was_written_since(filled: Cluster) -> None:
    carry(filled, "newer", "older")
    base, work = "base", "work"
    for name in (base, work):
        make(filled, name, NEWER)
        bring_forward(filled, "older", name)
    do(
        filled,
        work,
        """DELETE FROM parents WHERE id = 2;
           UPDATE children SET value = 'mine' WHERE parent_id = 1 AND key = 'k';
           INSERT INTO parents (name, status) VALUES ('since', 'on');""",
    )
    returned = {entry.table: entry for entry in merge(filled, "newer", base, work)}

    parents = look(filled, work, "SELECT id, name, status, boss FROM parents ORDER BY id")
    assert parents == [
        (1, "ann", "on", None),
        (3, "twice", "on", 1),
        (4, "twice", "on", 1),
        (5, "cy", "paused", None),
        (41, "since", "on", None),
    ], "2 was deleted since and takes 6, whose boss it was, with it; 3 or 4, 5 come back"
    assert look(
        filled, work, "SELECT parent_id, key, value, number, note::text, friend FROM children ORDER BY 1, 2"
    ) == [
        (1, "k", "mine", 7, '{"a": 1}', None),
        (1, "long", "too long for it", 1, None, None),
        (1, "longer key", "v", 1, None, None),
        (4, "k", "v", 1, None, None),
        (5, "k", "v", 1, None, None),
    ]
    assert look(filled, work, "SELECT id, parent_id, above, text FROM only_newer ORDER BY id") == [
        (1, 1, None, "one"),
        (2, 1, 1, "below one"),
    ]
    assert (returned["only_newer"].rows, returned["only_newer"].dropped) == (2, 1)
    assert returned["children"].values == 2
    do(filled, work, "INSERT INTO only_newer (parent_id) VALUES (1)")
    assert look(filled, work, "SELECT max(id) FROM only_newer") == [(4,)]


def test_a_merge_of_what_was_not_touched_gives_the_newer_database_back(filled: Cluster) -> None:
    do(filled, "newer", "DELETE FROM parents WHERE id = 4")
    carry(filled, "newer", "older")
    for name in ("base", "work"):
        make(filled, name, NEWER)
        bring_forward(filled, "older", name)
    merge(filled, "newer", "base", "work")
    for table in ("parents", "children", "only_newer"):
        query = f"SELECT {table}::text FROM {table} ORDER BY 1"
        assert look(filled, "work", query) == look(filled, "newer", query)


def test_counts_that_differ_end_the_copy(filled: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow_host.schema import copying

    put_back = copying._put_back_references

    def lose_a_row(writer: Any, wanted: Any) -> Any:
        found = put_back(writer, wanted)
        run(writer, "DELETE FROM children WHERE key = 'long'")
        return found

    monkeypatch.setattr(copying, "_put_back_references", lose_a_row)
    with pytest.raises(CarryError, match="children has 2 rows in the copy"):
        carry(filled, "newer", "older")


def bring_forward(cluster: Cluster, older: str, newer: str) -> None:
    """What a migration from OLDER to NEWER would do with the rows."""
    for table, columns in (("parents", "id, name, status, boss"), ("children", "parent_id, key, value, number")):
        for row in look(cluster, older, f"SELECT {columns} FROM {table} ORDER BY 1"):
            with connection(cluster, newer) as opened:
                places = ", ".join(["%s"] * len(row))
                run(opened, f"INSERT INTO {table} ({columns}) VALUES ({places})", row)
    with connection(cluster, newer) as opened:
        run(opened, "SELECT setval('parents_id_seq', 40)")


def make(cluster: Cluster, name: str, schema: str) -> None:
    create_empty(cluster, name)
    do(cluster, name, schema)


def do(cluster: Cluster, database: str, statements: str) -> None:
    with connection(cluster, database) as opened:
        run(opened, statements)


def look(cluster: Cluster, database: str, query: str) -> list[tuple[Any, ...]]:
    with connection(cluster, database) as opened:
        assert value(opened, "SELECT 1") == 1
        return rows(opened, query)


def told(outcome: Outcome) -> set[tuple[str, str | None, int, str]]:
    return {(entry.table, entry.column, entry.count, entry.remedy) for entry in outcome.left}
