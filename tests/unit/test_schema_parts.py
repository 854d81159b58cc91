"""Test pure functions of the schema change: column types, migration order, ownership records, databases to drop."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_host.postgres import ownership
from mlflow_host.postgres.catalog import Column
from mlflow_host.postgres.flip import NEWEST_KEPT, droppable
from mlflow_host.postgres.ownership import OwnershipRecord, PendingMerge, existing
from mlflow_host.schema import reporting
from mlflow_host.schema.column_fit import Fit, fit
from mlflow_host.schema.reporting import CarriedTable, ChangeReport, LeftBehind, MergedTable
from mlflow_host.schema.revisions import chain


def column(type_: str, *, required: bool = False, default: str | None = None, name: str = "c") -> Column:
    return Column(name, type_, required, default, generated=False)


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("text", "text", Fit('"c"')),
        ("character varying(10)", "text", Fit('"c"::text')),
        ("character varying(10)", "character varying(20)", Fit('"c"::character varying(20)')),
        (
            "text",
            "character varying(20)",
            Fit('"c"::character varying(20)', (('char_length("c") > 20', "shortened"),)),
        ),
        ("integer", "bigint", Fit('"c"::bigint')),
        ("json", "text", Fit('"c"::text::text')),
        ("boolean", "integer", Fit('"c"::integer::integer')),
    ],
)
def test_fit_returns_expression_and_misfit_conditions(source: str, target: str, expected: Fit) -> None:
    assert fit(column(source), column(target), identifies=False) == expected


def test_values_of_key_columns_are_never_altered() -> None:
    fitted = fit(column("text"), column("character varying(5)", required=True), identifies=True)
    assert {remedy for _, remedy in fitted.misfits} == {"left behind"}


def test_column_missing_in_source_gets_default_or_placeholder() -> None:
    assert fit(None, column("text"), identifies=False) == Fit(None)
    assert fit(None, column("integer", required=True, default="7"), identifies=False) == Fit(None)
    filled = fit(None, column("integer", required=True), identifies=False)
    assert filled == Fit("0::integer", (("true", "filled"),))


def test_null_is_filled_in_not_null_column() -> None:
    filled = fit(column("text"), column("text", required=True, default="'x'::text"), identifies=False)
    assert filled == Fit("coalesce(\"c\", 'x'::text)", (('"c" IS NULL', "filled"),))


def migration(revision: str, down: str | None) -> str:
    return f'"""words"""\n\nrevision = "{revision}"\ndown_revision = {down!r}\nbranch_labels = None\n'


def test_migrations_are_ordered_by_down_revision() -> None:
    files = [migration("c", "b"), migration("a", None), "# no migration", migration("b", "a")]
    assert chain(files) == ("a", "b", "c")


def test_branches_that_a_later_migration_merges_are_one_order() -> None:
    merge = migration("m", "x").replace("'x'", '(\n    "left",\n    "right",\n)')
    files = [merge, migration("right", "a"), migration("a", None), migration("left", "a"), migration("z", "m")]
    assert chain(files) == ("a", "left", "right", "m", "z")


@pytest.mark.parametrize(
    "files",
    [
        [],
        [migration("b", "a")],
        [migration("a", None), migration("b", "a"), migration("c", "a")],
        [migration("a", None), migration("x", "y")],
    ],
)
def test_migrations_that_do_not_form_one_chain_are_refused(files: list[str]) -> None:
    with pytest.raises(ValueError):
        chain(files)


def pending(name: str, head: str, carried_to: str) -> PendingMerge:
    return PendingMerge(name, head, 70, carried_to)


def test_values_that_the_release_of_a_missing_database_could_not_read_are_passed_on() -> None:
    newest = replace(pending("of_318", "h318", "h314"), unreadable={"jobs.status": ["6"]})
    missing = replace(pending("of_314", "h314", "h312"), unreadable={"jobs.status": ["5"], "a.b": ["x"]})
    (found,) = existing((newest, missing), {"of_318"})
    assert found.unreadable == {"jobs.status": ["5", "6"], "a.b": ["x"]}


def test_kept_database_that_is_missing_in_the_middle_passes_on_where_the_newer_one_was_carried() -> None:
    """The data was carried back from 3.18 to 3.14 and from 3.14 to 3.12, and the kept database of 3.14 was dropped by
    hand. The kept database of 3.18 then counts as carried back to 3.12, so an upgrade also restores the data that 3.14
    and 3.18 can hold but 3.12 cannot."""
    chain = (pending("of_318", "h318", "h314"), pending("of_314", "h314", "h312"), pending("of_312", "h312", "h310"))
    assert existing(chain, {"of_318", "of_314", "of_312"}) == chain
    assert existing(chain, {"of_318", "of_312"}) == (pending("of_318", "h318", "h312"), chain[2])
    assert existing(chain, {"of_318"}) == (pending("of_318", "h318", "h310"),)
    assert existing(chain, {"of_314", "of_312"}) == chain[1:]
    assert existing(chain, set()) == ()


words = st.text(max_size=20)
values = st.dictionaries(words, st.lists(words))
entries = st.builds(PendingMerge, words, words, st.integers(0, 999), words, words, words, words, values)
records = st.builds(
    OwnershipRecord,
    words,
    st.integers(0, 999),
    words,
    words,
    words,
    st.lists(entries).map(tuple),
    st.just(1),
    st.lists(words).map(tuple),
)


@pytest.mark.long
@given(records)
def test_ownership_record_survives_dump_and_parse(written: OwnershipRecord) -> None:
    assert ownership.parse(ownership.dump(written)) == written


def test_unknown_keys_of_an_ownership_record_and_other_comments_are_ignored() -> None:
    later = '{"mlflow-host": {"head": "abc", "count": 9, "format": 2, "news": [1], "waiting": []}}'
    assert ownership.parse(later) == OwnershipRecord("abc", 9, format=2)
    for comment in (None, "", "default administrative connection database", "[]", "{}", '{"mlflow-host": 1}'):
        assert ownership.parse(comment) is None


NOW = datetime(2026, 11, 22, tzinfo=UTC)


def kept(*days: int) -> list[tuple[datetime, str]]:
    return [(NOW - timedelta(days=age), f"kept-{age}") for age in days]


def test_three_newest_and_those_younger_than_30_days_are_not_droppable_while_there_is_room() -> None:
    assert droppable(kept(90, 40, 30, 20, 2, 1, 0), set(), NOW, has_room=True) == ["kept-90", "kept-40", "kept-30"]
    assert droppable(kept(90, 80, 70), set(), NOW, has_room=True) == []


def test_without_room_younger_databases_are_droppable_oldest_first_but_never_pending_merges() -> None:
    assert droppable(kept(90, 20, 10, 2, 1, 0), {"kept-20"}, NOW, has_room=False) == ["kept-90", "kept-10"]


@given(st.lists(st.integers(0, 400), unique=True), st.sets(st.integers(0, 400)), st.booleans())
def test_droppable_databases_are_never_the_newest_or_pending_merges(
    ages: list[int], waits: set[int], has_room: bool
) -> None:
    found = kept(*sorted(ages, reverse=True))
    going = set(droppable(found, {f"kept-{age}" for age in waits}, NOW, has_room=has_room))
    assert not going & {name for _, name in found[-NEWEST_KEPT:]}
    assert not going & {f"kept-{age}" for age in waits}
    assert not has_room or not going & {f"kept-{age}" for age in ages if age < 30}


def test_pending_report_is_published_if_its_database_exists_and_removed_otherwise(tmp_path: Path) -> None:
    def report(kept_database: str, second: int) -> ChangeReport:
        return ChangeReport(
            action="carry back",
            at=f"2026-11-22T10:00:0{second}Z",
            from_head="b",
            to_head="a",
            from_version="3.17.2",
            to_version="3.16.1",
            kept_database=kept_database,
            dump="s3://backups/dumps/x.dump",
            carried=(CarriedTable("runs", 3),),
            left=(LeftBehind("issues", "metadata", 2, "left behind", "this release has no such column"),),
            returned={"old": (MergedTable("skills", 1, 2, 3),)},
        )

    for number, name in enumerate(("there", "gone")):
        reporting.write_pending(tmp_path, report(name, number))
    reporting.settle_pending(tmp_path, ["there"])
    assert {path.name for path in tmp_path.iterdir()} == {
        "20261122T100000Z-carry-back.json",
        "20261122T100000Z-carry-back.txt",
    }
    text = (tmp_path / "20261122T100000Z-carry-back.txt").read_text()
    assert "issues.metadata: 2 left behind (this release has no such column)" in text
    assert "kept as: there" in text
    assert "3 rows carried" in report("there", 0).summary()
