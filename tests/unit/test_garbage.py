"""Test garbage collection without a database: references of model versions, paths in the stack's buckets, reports, and
repeated failures."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mlflow_host.backups.last_runs import stamp
from mlflow_host.garbage import collect, report
from mlflow_host.garbage.plan import EXPERIMENT, MODEL, RUN, Item, OwnBuckets
from mlflow_host.garbage.references import ModelVersion, overlap, path_of, references
from mlflow_host.garbage.report import RemovalReport

ONE, OTHER = "0123456789abcdef" * 2, "fedcba9876543210" * 2
NOW = datetime(2026, 11, 22, 3, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "runs", "models"),
    [
        (ONE, {ONE}, set()),
        (f"runs:/{ONE}/model", {ONE}, set()),
        (f"models:/m-{ONE}", set(), {f"m-{ONE}"}),
        (f"mlflow-artifacts:/7/models/m-{ONE}/artifacts", set(), {f"m-{ONE}"}),
        (f"mlflow-artifacts:/7/{ONE}/artifacts/model", {ONE}, set()),
        (f"s3://bucket/7/{ONE}/artifacts/m-{OTHER}", {ONE}, {f"m-{OTHER}"}),
        (f"https://mlflow.example.com/#/experiments/7/runs/{ONE}", {ONE}, set()),
        (f"{ONE}0", set(), set()),
        ("models:/another/3", set(), set()),
    ],
)
def test_every_run_id_and_model_id_in_a_text_counts_as_used(text: str, runs: set[str], models: set[str]) -> None:
    found = references([ModelVersion("v", 1, (text,))], {})
    assert (set(found.runs), set(found.models)) == (runs, models)


def test_using_a_run_uses_its_models_and_using_a_model_uses_its_run() -> None:
    sources = {f"m-{ONE}": ONE, f"m-{OTHER}": OTHER, "m-alone": None}
    by_run = references([ModelVersion("v", 1, (f"runs:/{ONE}/model",))], sources)
    assert by_run.models == {f"m-{ONE}": "v version 1"} and set(by_run.runs) == {ONE}
    by_model = references([ModelVersion("v", 2, (f"models:/m-{OTHER}",))], sources)
    assert by_model.runs == {OTHER: "v version 2"} and set(by_model.models) == {f"m-{OTHER}"}


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("mlflow-artifacts:/7/a/b/", "7/a/b"),
        ("mlflow-artifacts://host:443/7/a", "7/a"),
        ("s3://bucket/7/a%20b", "7/a b"),
        ("https://host/api/2.0/mlflow-artifacts/artifacts/7/a", "7/a"),
        ("http://host/prefix/ajax-api/2.0/mlflow-artifacts/artifacts/7/a", "7/a"),
        ("https://host/#/runs/7", None),
        ("runs:/7/a", None),
        ("models:/name/7", None),
        ("REDACTED-SOURCE-PATH", None),
        ("mlflow-artifacts:/", ""),
    ],
)
def test_path_is_read_from_any_uri_of_files(text: str, path: str | None) -> None:
    assert path_of(text) == path


def test_paths_overlap_by_whole_names() -> None:
    assert overlap("7/a", "7/a") and overlap("7/a", "7/a/b") and overlap("7/a/b", "7") and overlap("", "7")
    assert not overlap("7/a", "7/ab") and not overlap("7/a", "8/a")


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("mlflow-artifacts:/7/run/artifacts", "7/run/artifacts"),
        ("s3://ours/7/run/artifacts", "7/run/artifacts"),
        ("s3://somebodys/7/run/artifacts", None),
        ("mlflow-artifacts://another.server/7/run/artifacts", None),
        ("file:///srv/mlflow/postgresql", None),
        ("mlflow-artifacts:/", None),
        ("mlflow-artifacts:/7/../8", None),
        ("", None),
    ],
)
def test_only_locations_in_own_buckets_have_a_path(location: str, path: str | None) -> None:
    assert OwnBuckets(frozenset({"ours"})).path(location) == path


def item(kind: str, id: str, kept: str = "") -> Item:
    return Item(kind, id, "", "7", NOW - timedelta(days=40), (f"7/{id}",), kept)


def test_summary_distinguishes_dry_run_from_removal() -> None:
    made = RemovalReport(
        NOW, True, 30, (item(RUN, "1"), item(RUN, "2"), item(EXPERIMENT, "7")), (item(MODEL, "m", "v"),)
    )
    assert made.summary() == "2 runs, 1 experiment would be removed permanently; 1 logged model kept"
    assert "  logged model m, deleted 2026-10-13T03:00:00Z: v" in report.as_text(made)
    assert RemovalReport(NOW, False, 30, (), ()).summary() == "nothing removed permanently"


def test_only_the_newest_reports_are_kept(tmp_path: Path) -> None:
    for number in range(report.KEPT_REPORTS + 2):
        report.write(tmp_path, RemovalReport(NOW + timedelta(days=7 * number), False, 30, (item(RUN, "1"),), ()))
    for kind in ("json", "txt"):
        assert len(list(tmp_path.glob(f"*{report.SUFFIX}.{kind}"))) == report.KEPT_REPORTS
    newest = json.loads((tmp_path / report.NEWEST).read_text())
    assert newest["at"] == stamp(NOW + timedelta(days=7 * (report.KEPT_REPORTS + 1)))


def test_remaining_items_are_left_after_failures_in_a_row() -> None:
    tried: list[str] = []

    class Failing:
        def remove(self, each: Item) -> str:
            tried.append(each.id)
            if each.id == "0":
                return ""
            raise ConnectionError("S3 is out of reach")

    failing: Any = Failing()
    planned = RemovalReport(NOW, False, 30, tuple(item(RUN, str(number)) for number in range(20)), ())
    done = collect.remove_items(planned, failing)
    assert [each.id for each in done.removed] == ["0"]
    assert len(tried) == 1 + collect.FAILURES and len(done.failed) == 19
    assert done.failed[0].kept == "ConnectionError: S3 is out of reach"
    assert done.failed[-1].kept.startswith("not tried after")


@pytest.mark.parametrize("text", ["-1", "3651", "nan", "inf", "1e300", "a month"])
def test_invalid_grace_period_is_refused(text: str) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--older-than", type=collect.days)
    with pytest.raises(argparse.ArgumentError, match=r"--older-than: (must be 0 to 3650 days|invalid days value)"):
        parser.parse_args([f"--older-than={text}"])
    assert parser.parse_args(["--older-than", "0.5"]).older_than == timedelta(hours=12)
