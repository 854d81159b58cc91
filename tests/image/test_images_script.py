"""images.py: what is listed, what is swept, and what never is."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import images
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto import mock_aws

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


def image(number: int, *, finished: bool = True, kept: bool = False, hours_old: float = 48) -> images.Image:
    tags = (
        {images.OURS: "x"}
        | ({"mlflow-ami:format": "1"} if finished else {})
        | ({"mlflow-ami:keep": ""} if kept else {})
    )
    made = (NOW - timedelta(hours=hours_old)).isoformat().replace("+00:00", "Z")
    return images.Image(f"ami-{number}", f"image {number}", made, "available", tags, (f"snap-{number}",))


def test_newest_finished_images_stay() -> None:
    found = [image(number) for number in range(7)]
    assert [gone.id for gone in images.superfluous(found, set(), 5, NOW)] == ["ami-5", "ami-6"]


def test_unfinished_images_go_once_no_bake_can_be_at_them() -> None:
    found = [image(0, finished=False, hours_old=1), image(1, finished=False, hours_old=7), image(2)]
    assert [gone.id for gone in images.superfluous(found, set(), 5, NOW)] == ["ami-1"]


@given(
    found=st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans(), st.floats(0, 100)), max_size=12),
    keep=st.integers(1, 8),
)
def test_image_in_use_or_tagged_to_be_kept_never_goes(found: list[tuple[bool, bool, bool, float]], keep: int) -> None:
    every = [image(n, finished=f, kept=k, hours_old=hours) for n, (f, k, _, hours) in enumerate(found)]
    used = {f"ami-{n}" for n, (_, _, in_use, _) in enumerate(found) if in_use}
    gone = images.superfluous(every, used, keep, NOW)
    assert not {each.id for each in gone} & used
    assert not any(each.kept for each in gone)
    left = [each for each in every if each.finished and each not in gone]
    assert len(left) >= min(keep, sum(each.finished for each in every))


@pytest.fixture
def ec2() -> Iterator[Any]:
    with mock_aws():
        yield boto3.client("ec2", "eu-central-1", aws_access_key_id="x", aws_secret_access_key="y")


def make(ec2: Any, name: str, *, finished: bool = True) -> tuple[str, str]:
    """An image of ours and its snapshot, the instance it was made from terminated."""
    source = ec2.describe_images(Owners=["099720109477"])["Images"][0]["ImageId"]
    instance = ec2.run_instances(ImageId=source, MinCount=1, MaxCount=1)["Instances"][0]["InstanceId"]
    made = str(ec2.create_image(InstanceId=instance, Name=name)["ImageId"])
    ec2.terminate_instances(InstanceIds=[instance])
    snapshot = ec2.describe_images(ImageIds=[made])["Images"][0]["BlockDeviceMappings"][0]["Ebs"]["SnapshotId"]
    tags = [{"Key": images.OURS, "Value": name}, *([{"Key": "mlflow-ami:format", "Value": "1"}] if finished else [])]
    ec2.create_tags(Resources=[made, snapshot], Tags=tags)
    return made, str(snapshot)


def snapshots(ec2: Any) -> set[str]:
    every = ec2.describe_snapshots(OwnerIds=["self"], Filters=[{"Name": "tag-key", "Values": [images.OURS]}])
    return {each["SnapshotId"] for each in every["Snapshots"]}


def test_sweep_deletes_images_with_their_snapshots_and_dry_run_deletes_nothing(ec2: Any) -> None:
    made = dict(make(ec2, f"image {number}") for number in range(3))
    newest = images.find(ec2)[0].id
    planned = images.sweep(ec2, keep=1, dry_run=True)
    assert {each.id for each in images.find(ec2)} == made.keys()
    assert snapshots(ec2) == set(made.values())
    assert images.sweep(ec2, keep=1, dry_run=False) == planned
    assert {each.id for each in images.find(ec2)} == {newest}
    assert snapshots(ec2) == {made[newest]}
    assert images.sweep(ec2, keep=1, dry_run=False) == []


def test_image_that_runs_stays(ec2: Any) -> None:
    running, _ = make(ec2, "first")
    make(ec2, "second")
    ec2.run_instances(ImageId=running, MinCount=1, MaxCount=1)
    images.sweep(ec2, keep=1, dry_run=False)
    assert running in {each.id for each in images.find(ec2)}


def test_snapshot_whose_image_is_gone_is_swept(ec2: Any) -> None:
    made, snapshot = make(ec2, "first")
    ec2.deregister_image(ImageId=made)
    assert images.sweep(ec2, keep=5, dry_run=False) == [f"snapshot {snapshot}"]
    assert snapshots(ec2) == set()


def test_images_of_others_are_not_listed(ec2: Any) -> None:
    source = ec2.describe_images(Owners=["099720109477"])["Images"][0]["ImageId"]
    instance = ec2.run_instances(ImageId=source, MinCount=1, MaxCount=1)["Instances"][0]["InstanceId"]
    ec2.create_image(InstanceId=instance, Name="somebody's")
    assert images.find(ec2) == []


def test_line_tells_what_is_in_the_image_and_why_it_stays() -> None:
    told = images.line(image(1, finished=False, kept=True), {"ami-1"})
    assert told.startswith("ami-1") and told.endswith("in use, kept, unfinished")
