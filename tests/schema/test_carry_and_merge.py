"""Carry rows between two invented schemas that differ more than any two MLflow releases, and merge the rows back. No
carry or merge fails, every misfit is reported, and the merge restores the values that the older schema could not
store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg2
import pytest

from mlflow_host.boot import database
from mlflow_host.postgres import ownership
from mlflow_host.postgres.cluster import Cluster, connection, create_empty, rows, run, value
from mlflow_host.postgres.ownership import OwnershipRecord, PendingMerge
from mlflow_host.schema import upgrade_losses
from mlflow_host.schema.copying import CarryError, CarryResult, carry, unreadable_values
from mlflow_host.schema.merging import merge
from mlflow_host.schema.reporting import MergedTable
from tests.schema.rds_like import cluster_at

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


@pytest.fixture(scope="module", params=["machine", pytest.param("rds", marks=pytest.mark.slow)])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with cluster_at(request.param) as server:
        yield server.cluster


@pytest.fixture
def filled(cluster: Cluster) -> Cluster:
    make(cluster, "newer", NEWER)
    make(cluster, "older", OLDER)
    do(cluster, "newer", ROWS)
    return cluster


def test_fitting_rows_are_carried_and_misfits_counted_by_table_and_column(filled: Cluster) -> None:
    outcome = carry(filled, "newer", "older")
    assert {(1, "ann", "on", None, "", "ANN"), (2, "bob", "off", 1, "", "BOB")} <= set(
        look(filled, "older", "SELECT id, name, status, boss, kind, shout FROM parents")
    )
    assert look(filled, "older", "SELECT parent_id, key, value, number FROM children ORDER BY 1, 2") == [
        (1, "k", "short", 7),
        (1, "long", "too l", 1),
        (2, "k", "", None),
    ]
    assert misfits(outcome) == {
        ("only_newer", None, 3, "left behind"),
        ("parents", "kind", 6, "filled"),
        ("parents", "name", 1, "left behind"),
        # one row violates the check constraint, and one of two rows with an equal name is removed
        ("parents", None, 1, "left behind"),
        ("children", "value", 1, "shortened"),
        ("children", "value", 1, "filled"),
        ("children", "number", 1, "emptied"),
        ("children", "key", 1, "left behind"),
        ("children", "note", 1, "left behind"),
        ("children", "friend", 2, "left behind"),
        ("children", None, 2, "left behind"),  # their parents were left behind
    }


def test_ids_of_deleted_rows_are_not_used_again(filled: Cluster) -> None:
    carry(filled, "newer", "older")
    do(filled, "older", "INSERT INTO parents (name, status, kind) VALUES ('new', 'on', '')")
    assert look(filled, "older", "SELECT id FROM parents WHERE name = 'new'") == [(41,)]


def test_carry_restores_all_constraints_and_indexes(filled: Cluster) -> None:
    query = "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY indexname"
    constraints = "SELECT conname, contype::text, convalidated FROM pg_constraint WHERE conrelid > 0 ORDER BY conname"
    before = look(filled, "older", query), look(filled, "older", constraints)
    carry(filled, "newer", "older")
    assert (look(filled, "older", query), look(filled, "older", constraints)) == before
    with pytest.raises(psycopg2.errors.CheckViolation):
        do(filled, "older", "UPDATE parents SET status = 'paused'")


def test_carry_reads_one_snapshot_while_others_write(filled: Cluster) -> None:
    """The carry counts and copies rows in one snapshot, so a concurrent write affects no count and no copy."""
    with connection(filled, "newer") as writer:
        run(writer, "INSERT INTO parents (name) VALUES ('late')")
        outcome = carry(filled, "newer", "older")
    assert {entry.table for entry in outcome.carried} == {"parents", "children"}
    assert look(filled, "older", "SELECT 1 FROM parents WHERE name = 'late'") == []


def test_carry_raises_the_error_of_the_reading_side(filled: Cluster) -> None:
    do(filled, "newer", "ALTER TABLE children ALTER number TYPE text USING 'many'")
    with pytest.raises(psycopg2.errors.InvalidTextRepresentation, match="many"):
        carry(filled, "newer", "older")


def test_merge_restores_misfits_and_keeps_later_changes(filled: Cluster) -> None:
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
    ], "row 2 was deleted since, and so is row 6, which refers to it; 3 or 4, 5 come back"
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


def assert_the_newer_comes_back(filled: Cluster) -> None:
    """Copy the rows of "older" to a database with the newer schema, and require that the merge restores the rows that
    only "newer" contains."""
    for name in ("base", "work"):
        make(filled, name, NEWER)
        bring_forward(filled, "older", name)
    merge(filled, "newer", "base", "work")
    for table in ("parents", "children", "only_newer"):
        query = f"SELECT {table}::text FROM {table} ORDER BY 1"
        assert look(filled, "work", query) == look(filled, "newer", query)


def test_merge_without_later_changes_restores_the_newer_database(filled: Cluster) -> None:
    do(filled, "newer", "DELETE FROM parents WHERE id = 4")
    carry(filled, "newer", "older")
    assert_the_newer_comes_back(filled)


def test_different_row_counts_fail_the_carry(filled: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow_host.schema import copying

    add_foreign_keys = copying.add_foreign_keys

    def lose_a_row(writer: Any, wanted: Any) -> Any:
        found = add_foreign_keys(writer, wanted)
        run(writer, "DELETE FROM children WHERE key = 'long'")
        return found

    monkeypatch.setattr(copying, "add_foreign_keys", lose_a_row)
    with pytest.raises(CarryError, match="the copy of table children has 2 rows"):
        carry(filled, "newer", "older")


WITH_SPACES = """
CREATE TABLE projects (id integer PRIMARY KEY, space text NOT NULL DEFAULT 'default', name text, UNIQUE (space, name));
CREATE TABLE models (space text DEFAULT 'default', name text, note text, PRIMARY KEY (space, name));
"""
WITHOUT_SPACES = """
CREATE TABLE projects (id integer PRIMARY KEY, name text UNIQUE);
CREATE TABLE models (name text PRIMARY KEY, note text);
"""


@pytest.fixture
def spaces(cluster: Cluster) -> Cluster:
    """Create databases with a column `space` in their keys, like MLflow's workspace, and "older" without `space`."""
    for name in ("newer", "base", "work"):
        make(cluster, name, WITH_SPACES)
    make(cluster, "older", WITHOUT_SPACES)
    do(
        cluster,
        "newer",
        """INSERT INTO projects VALUES (1, 'team', 'twin'), (2, 'default', 'twin'), (3, 'team', 'single');
           INSERT INTO models VALUES ('default', 'twin', 'ours'), ('team', 'twin', 'theirs'),
               ('team', 'other', 'a');""",
    )
    return cluster


def test_rows_that_the_older_schema_cannot_tell_apart_are_left_behind_and_return_once(spaces: Cluster) -> None:
    outcome = carry(spaces, "newer", "older")
    assert look(spaces, "older", "SELECT name, note FROM models") == [("twin", "ours")]
    assert ("models", "space", 2, "left behind") in misfits(outcome)
    do(spaces, "older", "UPDATE models SET note = 'changed'")
    for name in ("base", "work"):
        note = "ours" if name == "base" else "changed"
        do(spaces, name, f"INSERT INTO models (name, note) VALUES ('twin', '{note}')")
    merge(spaces, "newer", "base", "work")
    assert look(spaces, "work", "SELECT space, name, note FROM models ORDER BY 1, 2") == [
        ("default", "twin", "changed"),
        ("team", "other", "a"),
        ("team", "twin", "theirs"),
    ]


def test_row_whose_key_is_free_again_once_values_are_restored_is_inserted(spaces: Cluster) -> None:
    """Without the column `space`, two projects would have the same name, so the carry copies only one of the two."""
    carry(spaces, "newer", "older")
    carried = look(spaces, "older", "SELECT id, name FROM projects ORDER BY 1")
    assert carried == [(1, "twin"), (3, "single")]
    for name in ("base", "work"):
        do(spaces, name, "INSERT INTO projects (id, name) VALUES (1, 'twin'), (3, 'single')")
    returned = {entry.table: entry for entry in merge(spaces, "newer", "base", "work")}
    query = "SELECT id, space, name FROM projects ORDER BY 1"
    assert look(spaces, "work", query) == look(spaces, "newer", query)
    assert returned["projects"] == MergedTable("projects", 1, 2, 0)


def test_rows_with_a_value_that_cannot_be_read_are_left_behind_with_their_children_and_return(filled: Cluster) -> None:
    unreadable = unreadable_values(filled, "newer", {"parents.status": ["on", "paused"], "parents.absent": []})
    assert unreadable == {"parents.status": ["off"]}
    outcome = carry(filled, "newer", "older", unreadable=unreadable)
    assert ("parents", "status", 1, "left behind") in misfits(outcome)
    assert look(filled, "older", "SELECT id FROM parents WHERE status = 'off' OR id = 6") == [], "6 has 2 as its boss"
    assert_the_newer_comes_back(filled)


def test_row_that_another_one_keeps_out_is_counted_and_named(filled: Cluster) -> None:
    carry(filled, "newer", "older")
    for name in ("base", "work"):
        make(filled, name, NEWER)
        bring_forward(filled, "older", name)
    do(filled, "work", "INSERT INTO parents (id, name) VALUES (5, 'mine')")
    (parents,) = [entry for entry in merge(filled, "newer", "base", "work") if entry.table == "parents"]
    assert (parents.refused, parents.refused_keys) == (1, ("5",))
    assert look(filled, "work", "SELECT name FROM parents WHERE id = 5") == [("mine",)]


FAMILIES = """
CREATE TABLE trees (id integer PRIMARY KEY, above integer REFERENCES trees ON DELETE SET NULL);
CREATE TABLE z_parents (id integer PRIMARY KEY);
CREATE TABLE m_children (id integer PRIMARY KEY, parent integer NOT NULL REFERENCES z_parents);
CREATE TABLE a_grandchildren (id integer PRIMARY KEY, child integer NOT NULL REFERENCES m_children);
"""


@pytest.mark.parametrize("table", ["trees", "a_grandchildren"])
def test_parents_are_inserted_before_children(cluster: Cluster, table: str) -> None:
    """Row 9 of trees was deleted since the rollback. The rows 1 and 2 are both inserted, and 1 refers to 2."""
    for name in ("newer", "base", "work"):
        make(cluster, name, FAMILIES if table == "trees" else FAMILIES.split(";", 1)[1])
    if table == "trees":
        do(cluster, "base", "INSERT INTO trees VALUES (9, NULL)")
        do(cluster, "newer", "INSERT INTO trees VALUES (9, NULL), (2, NULL), (1, 2), (3, 1), (4, 9), (5, 5)")
    else:
        above = "INSERT INTO z_parents VALUES (1); INSERT INTO m_children VALUES (3, 1);"
        do(cluster, "newer", f"{above} INSERT INTO a_grandchildren VALUES (7, 3)")
    merge(cluster, "newer", "base", "work")
    expected = {"trees": [(1, 2), (2, None), (3, 1), (4, None), (5, 5)], "a_grandchildren": [(7, 3)]}
    assert look(cluster, "work", f"SELECT * FROM {table} ORDER BY 1") == expected[table]


BEFORE_MIGRATION = """
CREATE TABLE things (id integer PRIMARY KEY, note text NOT NULL, extra json, same text);
CREATE TABLE parts (thing integer NOT NULL REFERENCES things ON DELETE CASCADE, name text, PRIMARY KEY (thing, name));
CREATE TABLE untouched (id integer PRIMARY KEY, note text);
"""
AFTER_MIGRATION = """
CREATE TABLE things (id integer PRIMARY KEY, note varchar(5) NOT NULL, same text);
CREATE TABLE untouched (id integer PRIMARY KEY, note text);
"""


def test_what_a_migration_dropped_is_put_back_unless_it_was_changed_or_deleted_since(cluster: Cluster) -> None:
    for name in ("before", "back", "earlier"):
        make(cluster, name, BEFORE_MIGRATION)
    for name in ("after", "between"):
        make(cluster, name, AFTER_MIGRATION)
    do(
        cluster,
        "before",
        """INSERT INTO things VALUES (1, 'a long note', '{"a": 1}', 's'), (2, 'a long note', NULL, 's'),
               (3, 'short', '{"b": "\\u0000"}', 's'), (4, 'short', 'null', 's'), (5, 'short', NULL, 's');
           INSERT INTO parts VALUES (1, 'p'), (4, 'p'); INSERT INTO untouched VALUES (1, 'x');""",
    )
    for row in look(cluster, "before", "SELECT id, left(note, 5), same FROM things WHERE id < 5"):
        with connection(cluster, "after") as opened:
            run(opened, "INSERT INTO things VALUES (%s, %s, %s)", row)
    do(cluster, "after", "INSERT INTO untouched VALUES (1, 'x')")
    lost = upgrade_losses.record(cluster, "before", "after", "h2", 2)
    assert {(entry.table, entry.column, entry.count, entry.remedy) for entry in lost} == {
        ("parts", None, 2, "dropped"),
        ("things", None, 1, "dropped"),
        ("things", "note", 2, "changed"),
        ("things", "extra", 2, "changed"),
    }
    do(cluster, "after", "UPDATE things SET note = 'mine' WHERE id = 2; DELETE FROM things WHERE id = 4")

    carry(cluster, "after", "between")
    assert upgrade_losses.put_back(cluster, "after", "between", "h3", ["h1", "h2", "h3"]) == {}
    carry(cluster, "between", "back")
    ((_, merged),) = upgrade_losses.put_back(cluster, "between", "back", "h2", ["h1", "h2"]).items()
    assert look(cluster, "back", "SELECT id, note, extra::text, same FROM things ORDER BY 1") == [
        (1, "a long note", '{"a": 1}', "s"),
        (2, "mine", None, "s"),
        (3, "short", '{"b": "\\u0000"}', "s"),
        (5, "short", None, "s"),
    ]
    assert look(cluster, "back", "SELECT thing FROM parts") == [(1,)]
    assert {entry.table: (entry.rows, entry.values, entry.dropped) for entry in merged} == {
        "things": (1, 2, 0),
        "parts": (1, 0, 1),
    }
    carry(cluster, "between", "earlier")
    upgrade_losses.put_back(cluster, "between", "earlier", "h1", ["h1"])
    query = "SELECT things::text FROM things ORDER BY 1"
    assert look(cluster, "earlier", query) == look(cluster, "back", query)


def test_migration_that_only_adds_leaves_no_record(cluster: Cluster) -> None:
    make(cluster, "before", AFTER_MIGRATION)
    make(cluster, "after", AFTER_MIGRATION + "ALTER TABLE things ADD more text; CREATE TABLE new (id integer)")
    for name in ("before", "after"):
        do(cluster, name, "INSERT INTO things VALUES (1, 'note', 's')")
    assert upgrade_losses.record(cluster, "before", "after", "h1", 1) == ()
    assert look(cluster, "after", "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'mlflow%'") == []


def test_full_volume_names_only_kept_databases_that_may_be_dropped(cluster: Cluster) -> None:
    kept = [f"{cluster.database}_kept_{head}_2026112{hour}t000000z" for hour, head in enumerate(("aaa", "bbb", "ccc"))]
    for name in (cluster.database, *kept):
        create_empty(cluster, name)
    record = OwnershipRecord("ddd", 1, waiting=(PendingMerge(kept[1], "bbb", 1, "ddd"),), unresolved=(kept[2],))
    with connection(cluster) as opened:
        ownership.write(opened, cluster.database, record)
    said = str(database.volume_is_full(cluster, OSError("No space left on device")))
    assert cluster.storage[1] in said and f"drop a kept database: {kept[0]} hold no data" in said


def bring_forward(cluster: Cluster, older: str, newer: str) -> None:
    """Copy the rows of a database with OLDER to a database with NEWER, as a migration would do."""
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


def misfits(outcome: CarryResult) -> set[tuple[str, str | None, int, str]]:
    return {(entry.table, entry.column, entry.count, entry.remedy) for entry in outcome.left}
