"""The object store holds many buckets on a disk with little free space."""

from __future__ import annotations

import pytest

from scripts.local_cloud import LocalCloud

pytestmark = pytest.mark.machine


def test_twenty_four_buckets_hold_an_object_each(cloud: LocalCloud) -> None:
    """By default, SeaweedFS counts 7 GiB of free disk space as used by each bucket."""
    s3 = cloud.client("s3")
    names = [f"bucket-{number}" for number in range(24)]
    try:
        for name in names:
            s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": cloud.region})
            s3.put_object(Bucket=name, Key="object", Body=name.encode())
        assert [s3.get_object(Bucket=name, Key="object")["Body"].read().decode() for name in names] == names
    finally:
        for name in names:
            s3.delete_object(Bucket=name, Key="object")
            s3.delete_bucket(Bucket=name)
