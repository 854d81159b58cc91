"""recover_backups.py restores the content that a bucket had at a given time, and deletes no object version."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from scripts import aws_session, recover_backups
from scripts.recover_backups import Entry
from tests.support.moto_cloud import MotoCloud, moto_cloud

NOON = datetime(2026, 11, 29, 12, tzinfo=UTC)


def entry(key: str, minutes: int, *, latest: bool = False, marker: bool = False) -> Entry:
    return Entry(key, f"{key}{minutes}", NOON + timedelta(minutes=minutes), latest, marker)


@pytest.mark.parametrize(
    ("versions", "copied", "hidden"),
    [
        ([entry("a", -9, latest=True)], None, False),
        ([entry("a", -9), entry("a", 5, latest=True)], -9, False),
        ([entry("a", -9), entry("a", 5, latest=True, marker=True)], -9, False),
        ([entry("a", -9), entry("a", -3), entry("a", 5), entry("a", 6, latest=True, marker=True)], -3, False),
        ([entry("a", 5, latest=True)], None, True),
        ([entry("a", 5), entry("a", 6, latest=True, marker=True)], None, False),
        ([entry("a", -9), entry("a", -3, latest=True, marker=True)], None, False),
        ([entry("a", -9), entry("a", -3, marker=True), entry("a", 5, latest=True)], None, True),
        ([entry("a", 0), entry("a", 1, latest=True)], 0, False),
    ],
)
def test_plan_is_the_difference_to_the_moment(versions: list[Entry], copied: int | None, hidden: bool) -> None:
    found = recover_backups.plan(versions, NOON)
    assert [each.version for each in found.copies] == ([f"a{copied}"] if copied is not None else [])
    assert found.hidden == (["a"] if hidden else [])


def test_the_oldest_version_is_copied_first() -> None:
    versions = [entry("a", -3), entry("a", 1, latest=True), entry("b", -9), entry("b", 1, latest=True)]
    assert [each.key for each in recover_backups.plan(versions, NOON).copies] == ["b", "a"]


@pytest.fixture(scope="module")
def cloud() -> Iterator[MotoCloud]:
    with moto_cloud() as found:
        yield found


def held(s3: Any) -> dict[str, bytes]:
    listed = s3.list_objects_v2(Bucket="backups").get("Contents", [])
    return {each["Key"]: s3.get_object(Bucket="backups", Key=each["Key"])["Body"].read() for each in listed}


def test_a_spoiled_bucket_is_as_it_was(
    cloud: MotoCloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    s3 = cloud.client("s3")
    s3.create_bucket(Bucket="backups", CreateBucketConfiguration={"LocationConstraint": cloud.region})
    s3.put_bucket_versioning(Bucket="backups", VersioningConfiguration={"Status": "Enabled"})
    for key, text in (("dumps/a.dump", b"old"), ("dumps/a.dump", b"a"), ("archive.info", b"info"), ("same", b"same")):
        s3.put_object(Bucket="backups", Key=key, Body=text)
    before = held(s3)
    time.sleep(1.1)
    then = datetime.now(UTC)
    time.sleep(1.1)
    s3.delete_object(Bucket="backups", Key="dumps/a.dump")
    s3.put_object(Bucket="backups", Key="archive.info", Body=b"spoiled")
    s3.put_object(Bucket="backups", Key="dumps/planted.dump", Body=b"planted")
    spoiled, versions = held(s3), len(recover_backups.entries(s3, "backups"))

    monkeypatch.setattr(aws_session, "choose", lambda region: cloud)
    arguments = ["--bucket", "backups", "--before", then.isoformat()]
    assert recover_backups.main([*arguments, "--dry-run"]) == 0
    assert held(s3) == spoiled
    assert recover_backups.main(arguments) == 2, "there is no terminal to ask at"
    assert held(s3) == spoiled
    arguments.append("--yes")
    assert recover_backups.main(arguments) == 0
    assert held(s3) == before
    assert len(recover_backups.entries(s3, "backups")) == versions + 3
    told = capsys.readouterr()
    assert "hidden, because it is newer: dumps/planted.dump" in told.err
    assert "2 objects would be restored" in told.err and "2 objects are restored" in told.err
    assert json.loads(told.out.split("}\n")[-2] + "}")["hidden"] == ["dumps/planted.dump"]
    assert recover_backups.main(arguments) == 0, "it can be run again"
    assert held(s3) == before


def test_a_bucket_that_is_not_there_is_an_error_to_correct(
    cloud: MotoCloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aws_session, "choose", lambda region: cloud)
    assert recover_backups.main(["--bucket", "never-was", "--before", "2026-11-29T12:00:00Z"]) == 2
    assert "NoSuchBucket" in capsys.readouterr().err
