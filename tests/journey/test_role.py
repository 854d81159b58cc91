"""What the machine's role may do with the buckets, by the very credentials that the machine is given.

The object store holds each session to the policy that the stack wrote. What Systems Manager and the other services
would allow is tested against the same policy in tests/stack/test_permissions.py.
"""

from __future__ import annotations

import json
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from local_cloud import LocalCloud
from servers import Server

pytestmark = pytest.mark.machine

ASK = """
import json, urllib.request
at = "http://169.254.169.254/latest/"
ask = lambda path, method="GET", **headers: urllib.request.urlopen(
    urllib.request.Request(at + path, method=method, headers=headers), timeout=5).read().decode()
token = ask("api/token", "PUT", **{"X-aws-ec2-metadata-token-ttl-seconds": "60"})
known = {"X-aws-ec2-metadata-token": token}
role = ask("meta-data/iam/security-credentials/", **known)
print(ask("meta-data/iam/security-credentials/" + role, **known))
"""


@pytest.fixture(scope="module")
def role(server: Server, cloud: LocalCloud) -> Any:
    """An S3 client that signs with the machine's role."""
    done = cloud.exec(server.instance_id, ["python3", "-c", ASK])
    assert done.returncode == 0, done.stderr
    given = json.loads(done.stdout)
    return boto3.client(
        "s3",
        endpoint_url=cloud.s3_endpoint,
        region_name=cloud.region,
        aws_access_key_id=given["AccessKeyId"],
        aws_secret_access_key=given["SecretAccessKey"],
        aws_session_token=given["Token"],
        config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1}),
    )


@pytest.mark.parametrize("bucket", ["artifacts", "models", "backups"])
def test_role_reads_and_writes_the_objects_of_its_buckets(server: Server, role: Any, bucket: str) -> None:
    name = server.buckets[bucket]
    role.put_object(Bucket=name, Key="of-the-role", Body=b"kept")
    assert role.get_object(Bucket=name, Key="of-the-role")["Body"].read() == b"kept"
    assert "of-the-role" in [each["Key"] for each in role.list_objects_v2(Bucket=name)["Contents"]]
    role.delete_object(Bucket=name, Key="of-the-role")


@pytest.fixture
def elsewhere(cloud: LocalCloud) -> Any:
    """A bucket of the account that is not the stack's, with an object in it."""
    owner = cloud.client("s3")
    owner.create_bucket(Bucket="of-somebody-else", CreateBucketConfiguration={"LocationConstraint": cloud.region})
    owner.put_object(Bucket="of-somebody-else", Key="secret", Body=b"secret")
    yield "of-somebody-else"
    owner.delete_object(Bucket="of-somebody-else", Key="secret")
    owner.delete_bucket(Bucket="of-somebody-else")


def test_role_does_nothing_else(server: Server, cloud: LocalCloud, role: Any, elsewhere: str) -> None:
    backups, owner = server.buckets["backups"], cloud.client("s3")
    version = role.put_object(Bucket=backups, Key="a-backup", Body=b"kept")["VersionId"]
    role.delete_object(Bucket=backups, Key="a-backup")
    bucket, there = {"Bucket": backups}, {"Bucket": elsewhere}
    denied = {
        "delete a version": lambda: role.delete_object(**bucket, Key="a-backup", VersionId=version),
        "suspend versions": lambda: role.put_bucket_versioning(
            **bucket, VersioningConfiguration={"Status": "Suspended"}
        ),
        "expire objects": lambda: role.put_bucket_lifecycle_configuration(
            **bucket,
            LifecycleConfiguration={
                "Rules": [{"ID": "x", "Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": 1}}]
            },
        ),
        "open the bucket": lambda: role.put_bucket_policy(**bucket, Policy="{}"),
        "delete the policy": lambda: role.delete_bucket_policy(**bucket),
        "delete the bucket": lambda: role.delete_bucket(**bucket),
        "make a bucket": lambda: role.create_bucket(Bucket="of-the-role"),
        "read elsewhere": lambda: role.get_object(**there, Key="secret"),
        "list elsewhere": lambda: role.list_objects_v2(**there),
        "write elsewhere": lambda: role.put_object(**there, Key="secret", Body=b"mine"),
        "delete elsewhere": lambda: role.delete_object(**there, Key="secret"),
        "copy from elsewhere": lambda: role.copy_object(**bucket, Key="a", CopySource=f"{elsewhere}/secret"),
    }
    answers = {what: refusal(call) for what, call in denied.items()}
    assert {what: answer for what, answer in answers.items() if answer != "AccessDenied"} == {}
    assert owner.get_object(Bucket=backups, Key="a-backup", VersionId=version)["Body"].read() == b"kept"
    assert owner.get_bucket_versioning(Bucket=backups)["Status"] == "Enabled"
    owner.delete_object(Bucket=backups, Key="a-backup", VersionId=version)


def refusal(call: Any) -> str:
    try:
        call()
    except ClientError as error:
        return str(error.response["Error"]["Code"])
    return "allowed"
