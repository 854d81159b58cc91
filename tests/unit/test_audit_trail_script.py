"""scripts/audit_trail.py reads the objects that the machine added to the bucket. moto stands in for S3."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mlflow_host.contract import audit_trail as names
from scripts import audit_trail, aws_session
from tests.support.moto_cloud import moto_cloud

NOON = datetime(2026, 11, 29, 12, tzinfo=UTC)


def line(minutes: int, **changed: Any) -> dict[str, Any]:
    at = NOON + timedelta(minutes=minutes)
    return {
        "time": at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "user": "ada",
        "role": "writer",
        "login": "accepted",
        "address": "203.0.113.7",
        "method": "POST",
        "route": "/api/2.0/mlflow/runs/log-metric",
        "ids": {"run_id": "abc"},
        "status": 200,
    } | changed


LINES = [
    [line(-30 * 60), line(-29 * 60, user="bob")],
    [line(0), line(5, ids={"experiment_id": "7", "trace_ids": "t1,t2"}, route="/api/2.0/mlflow/experiments/delete")],
    [line(10, user="eve", role=None, login="refused", status=401), line(11, status=403, user="rita", role="reader")],
    [line(11, ids={"artifact_path": "7/ab12/artifacts/notes/hello.txt"})],
    [line(12, login="refused", more_refusals=9, address="203.0.113.9")],
]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with moto_cloud() as cloud, pytest.MonkeyPatch.context() as patch:
        s3 = cloud.client("s3")
        s3.create_bucket(Bucket="backups", CreateBucketConfiguration={"LocationConstraint": cloud.region})
        for number, lines in enumerate(LINES):
            times = [datetime.fromisoformat(each["time"]) for each in lines]
            key = names.key(names.file_name(names.Span(min(times), max(times)), f"{number}"), "vol-1")
            content = "".join(json.dumps(each) + "\n" for each in lines)
            s3.put_object(Bucket="backups", Key=key, Body=gzip.compress(content.encode()))
        s3.put_object(Bucket="backups", Key="audit/2026/11/29/other", Body=b"no trail")

        class Session:
            def client(self, service: str) -> Any:
                return cloud.client(service)

        patch.setattr(aws_session, "choose", lambda region, profile: Session())
        yield "backups"


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert audit_trail.main(["--bucket", "backups", "--json", *arguments]) == 0
    return [json.loads(text) for text in capsys.readouterr().out.splitlines()]


ALL = ("--since", "2026-11-28", "--until", "2026-11-30")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (ALL, [each for lines in LINES for each in lines]),
        ((*ALL, "--id", "ab12"), LINES[3]),
        (("--since", "2026-11-29T12:00", "--until", "2026-11-29T14:05:00+02:00"), LINES[1]),
        (("--since", "2026-11-29T12:05:00Z", "--until", "2026-11-29T12:10"), [LINES[1][1], LINES[2][0]]),
        ((*ALL, "--user", "bob"), [LINES[0][1]]),
        ((*ALL, "--refused"), [*LINES[2], *LINES[4]]),
        ((*ALL, "--id", "t2"), [LINES[1][1]]),
        ((*ALL, "--route", "experiments"), [LINES[1][1]]),
        ((*ALL, "--id", "nothing"), []),
    ],
)
def test_lines_of_the_time_that_match_are_printed_oldest_first(
    arguments: tuple[str, ...], wanted: list[dict[str, Any]], bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert found(capsys, *arguments) == wanted


def test_only_objects_of_the_time_are_read(bucket: str) -> None:
    s3: Any = aws_session.choose(None, None).client("s3")
    wanted = audit_trail.Wanted(NOON + timedelta(minutes=9), NOON + timedelta(minutes=10))
    assert audit_trail.read(s3, bucket, wanted)[0] == 1


def test_text_is_for_people_and_cannot_change_the_terminal(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit_trail.main(["--bucket", bucket, *ALL]) == 0
    out, err = capsys.readouterr()
    assert "2026-11-29T12:10:00Z  eve (login refused)  203.0.113.7  POST /api/2.0/mlflow/runs/log-metric  401" in out
    assert "rita (reader)" in out and "203.0.113.9  9 more refusals in this minute" in out
    assert err == "audit_trail: 8 lines in 5 objects of backups\n"
    assert "\x1b" not in audit_trail.shown(line(0, user="\x1b[2J"))


def test_damaged_object_is_one_sentence(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    s3: Any = aws_session.choose(None, None).client("s3")
    key = names.key(names.file_name(names.Span(NOON + timedelta(days=9), NOON + timedelta(days=9)), "x"), "vol-1")
    s3.put_object(Bucket=bucket, Key=key, Body=b"\x1f\x8bno")
    assert audit_trail.main(["--bucket", bucket, "--since", "2026-12-08", "--until", "2026-12-09"]) == 2
    assert key in capsys.readouterr().err


def test_missing_bucket_is_one_sentence(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit_trail.main(["--bucket", "no-such-bucket"]) == 2
    assert "NoSuchBucket" in (said := capsys.readouterr().err) and said.count("\n") == 1


@pytest.mark.parametrize("arguments", [("--since", "yesterday"), ("--region", "x"), ("--bucket", "b", "--stack", "s")])
def test_wrong_arguments_are_refused(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        audit_trail.main([*arguments])
    assert ended.value.code == 2


def test_age_counts_from_now() -> None:
    assert abs(datetime.now(UTC) - timedelta(days=7) - audit_trail.moment("7d")) < timedelta(minutes=1)
