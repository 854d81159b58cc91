"""The pure parts of the carry-over: column shapes, the order of migrations, the record, what may be dropped."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow_host.schema import record, reporting
from mlflow_host.schema.catalog import Column
from mlflow_host.schema.flipping import NEWEST_KEPT, droppable
from mlflow_host.schema.record import Record, Waiting
from mlflow_host.schema.reporting import Carried, Left, Report, Returned
from mlflow_host.schema.revisions import chain
from mlflow_host.schema.shapes import Fit, fit


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
def test_a_column_fits_or_says_what_does_not(source: str, target: str, expected: Fit) -> None:
    assert fit(column(source), column(target), identifies=False) == expected


def test_what_identifies_a_row_is_never_altered() -> None:
    fitted = fit(column("text"), column("character varying(5)", required=True), identifies=True)
    assert {remedy for _, remedy in fitted.misfits} == {"left behind"}


def test_a_column_the_newer_release_lacks_takes_its_default_or_something_that_says_nothing() -> None:
    assert fit(None, column("text"), identifies=False) == Fit(None)
    assert fit(None, column("integer", required=True, default="7"), identifies=False) == Fit(None)
    filled = fit(None, column("integer", required=True), identifies=False)
    assert filled == Fit("0::integer", (("true", "filled"),))


def test_a_value_that_may_be_missing_is_filled_where_it_must_not_be() -> None:
    filled = fit(column("text"), column("text", required=True, default="'x'::text"), identifies=False)
    assert filled == Fit("coalesce(\"c\", 'x'::text)", (('"c" IS NULL', "filled"),))


def migration(revision: str, down: str | None) -> str:
    return f'"""words"""\n\nrevision = "{revision}"\ndown_revision = {down!r}\nbranch_labels = None\n'


def test_migrations_are_ordered_by_what_they_follow() -> None:
    files = [migration("c", "b"), migration("a", None), "# no migration", migration("b", "a")]
    assert chain(files) == ("a", "b", "c")


@pytest.mark.parametrize(
    "files",
    [
        [],
        [migration("b", "a")],
        [migration("a", None), migration("b", "a"), migration("c", "a")],
        [migration("a", None), migration("x", "y")],
    ],
)
def test_migrations_that_are_not_one_line_are_refused(files: list[str]) -> None:
    with pytest.raises(ValueError):
        chain(files)


words = st.text(max_size=20)
entries = st.builds(Waiting, words, words, st.integers(0, 999), words, words, words, words)
records = st.builds(Record, words, st.integers(0, 999), words, words, words, st.lists(entries).map(tuple))


@given(records)
def test_a_record_is_read_as_it_was_written(written: Record) -> None:
    assert record.parse(record.dump(written)) == written


def test_a_later_format_is_read_for_what_is_known_of_it_and_other_comments_are_not_ours() -> None:
    later = '{"mlflow-host": {"head": "abc", "count": 9, "format": 2, "news": [1], "waiting": []}}'
    assert record.parse(later) == Record("abc", 9, format=2)
    for comment in (None, "", "default administrative connection database", "[]", "{}", '{"mlflow-host": 1}'):
        assert record.parse(comment) is None


NOW = datetime(2026, 11, 22, tzinfo=UTC)


def kept(*days: int) -> list[tuple[datetime, str]]:
    return [(NOW - timedelta(days=age), f"kept-{age}") for age in days]


def test_the_three_newest_and_the_young_are_kept_while_there_is_room() -> None:
    assert droppable(kept(90, 40, 30, 20, 2, 1, 0), set(), NOW, has_room=True) == ["kept-90", "kept-40", "kept-30"]
    assert droppable(kept(90, 80, 70), set(), NOW, has_room=True) == []


def test_without_room_the_young_go_oldest_first_but_never_what_is_still_to_come_back() -> None:
    assert droppable(kept(90, 20, 10, 2, 1, 0), {"kept-20"}, NOW, has_room=False) == ["kept-90", "kept-10"]


@given(st.lists(st.integers(0, 400), unique=True), st.sets(st.integers(0, 400)), st.booleans())
def test_whatever_is_dropped_is_neither_among_the_newest_nor_waiting(
    ages: list[int], waits: set[int], has_room: bool
) -> None:
    found = kept(*sorted(ages, reverse=True))
    going = set(droppable(found, {f"kept-{age}" for age in waits}, NOW, has_room=has_room))
    assert not going & {name for _, name in found[-NEWEST_KEPT:]}
    assert not going & {f"kept-{age}" for age in waits}
    assert not has_room or not going & {f"kept-{age}" for age in ages if age < 30}


def test_a_report_comes_true_with_its_database_and_goes_without(tmp_path: Path) -> None:
    def report(kept_database: str, second: int) -> Report:
        return Report(
            action="carry back",
            at=f"2026-11-22T10:00:0{second}Z",
            from_head="b",
            to_head="a",
            from_version="3.17.2",
            to_version="3.16.1",
            kept_database=kept_database,
            dump="s3://backups/dumps/x.dump",
            carried=(Carried("runs", 3),),
            left=(Left("issues", "metadata", 2, "left behind", "this release has no such column"),),
            returned={"old": (Returned("skills", 1, 2, 3),)},
        )

    for number, name in enumerate(("there", "gone")):
        reporting.write_pending(tmp_path, report(name, number))
    reporting.settle(tmp_path, ["there"])
    assert {path.name for path in tmp_path.iterdir()} == {
        "20261122T100000Z-carry-back.json",
        "20261122T100000Z-carry-back.txt",
    }
    text = (tmp_path / "20261122T100000Z-carry-back.txt").read_text()
    assert "issues.metadata: 2 left behind (this release has no such column)" in text
    assert "kept as: there" in text
    assert "3 rows carried" in report("there", 0).summary()
