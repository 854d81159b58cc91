"""Test the content of the instance metadata service, and the form of request that the service requires."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest

from .conftest import Account

pytestmark = [pytest.mark.machine, pytest.mark.slow]

URL = "http://169.254.169.254/latest"
TOKEN = f"T=$(curl -sf -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' {URL}/api/token)"
USER_DATA = "#cloud-config\nwrite_files:\n- path: /etc/told\n  content: by user-data\n"


@pytest.fixture(scope="module")
def role(shared: Account) -> Any:
    """Create an instance profile whose role may use one bucket and read one parameter."""
    iam, name = shared.cloud.client("iam"), f"test-{uuid.uuid4().hex[:8]}"
    trust = {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
    iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(policy(trust)))
    iam.put_role_policy(
        RoleName=name,
        PolicyName="own",
        PolicyDocument=json.dumps(
            policy(
                {
                    "Effect": "Allow",
                    "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"],
                    "Resource": f"arn:aws:s3:::{name}-own/*",
                },
                {"Effect": "Allow", "Action": "s3:ListBucket", "Resource": f"arn:aws:s3:::{name}-own"},
                {"Effect": "Allow", "Action": "ssm:GetParameter", "Resource": "*"},
            )
        ),
    )
    iam.create_instance_profile(InstanceProfileName=name)
    iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    s3 = shared.cloud.client("s3")
    for bucket in (f"{name}-own", f"{name}-other"):
        s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": shared.cloud.region})
        s3.put_object(Bucket=bucket, Key="there", Body=b"before")
    yield name
    for bucket in (f"{name}-own", f"{name}-other"):
        for entry in s3.list_objects_v2(Bucket=bucket).get("Contents", []):
            s3.delete_object(Bucket=bucket, Key=entry["Key"])
        s3.delete_bucket(Bucket=bucket)
    iam.remove_role_from_instance_profile(InstanceProfileName=name, RoleName=name)
    iam.delete_instance_profile(InstanceProfileName=name)
    iam.delete_role_policy(RoleName=name, PolicyName="own")
    iam.delete_role(RoleName=name)


def policy(*statements: dict[str, Any]) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": list(statements)}


@pytest.fixture(scope="module")
def instance(shared: Account, role: str) -> str:
    return shared.launch(
        IamInstanceProfile={"Name": role},
        UserData=USER_DATA,
        MetadataOptions={"HttpTokens": "required", "InstanceMetadataTags": "enabled"},
        TagSpecifications=[{"ResourceType": "instance", "Tags": [{"Key": "Name", "Value": "tested"}]}],
    )


def ask(account: Account, instance: str, path: str) -> str:
    return account.run(instance, f'{TOKEN}; curl -sf -H "X-aws-ec2-metadata-token: $T" {URL}/{path}')


def status(account: Account, instance: str, arguments: str) -> str:
    return account.run(instance, f"curl -s -o /dev/null -w '%{{http_code}}' {arguments}")


def test_cloud_init_executed_the_user_data(account: Account, instance: str) -> None:
    assert account.run(instance, "cat /etc/told") == "by user-data"
    assert "DataSourceEc2" in account.run(instance, "cloud-init status --long")
    assert account.run(instance, "hostname") == account.describe(instance)["PrivateDnsName"].partition(".")[0]
    account.run(instance, "sudo -u nobody getent hosts $(hostname)")


def test_without_a_token_there_is_no_answer(account: Account, instance: str) -> None:
    assert status(account, instance, f"{URL}/meta-data/instance-id") == "401"
    assert status(account, instance, f"-H 'X-aws-ec2-metadata-token: guessed' {URL}/meta-data/instance-id") == "401"
    assert status(account, instance, f"-X PUT {URL}/api/token") == "400"
    forwarded = "-H 'X-aws-ec2-metadata-token-ttl-seconds: 60' -H 'X-Forwarded-For: 1.2.3.4'"
    assert status(account, instance, f"-X PUT {forwarded} {URL}/api/token") == "403"


def test_answers_agree_with_the_api(account: Account, instance: str) -> None:
    described = account.describe(instance)
    assert ask(account, instance, "meta-data/instance-id") == instance
    assert ask(account, instance, "meta-data/ami-id") == described["ImageId"]
    assert ask(account, instance, "meta-data/local-ipv4") == described["PrivateIpAddress"]
    assert ask(account, instance, "meta-data/public-ipv4") == described["PublicIpAddress"]
    assert ask(account, instance, "meta-data/placement/region") == account.cloud.region
    assert ask(account, instance, "meta-data/tags/instance/Name") == "tested"
    assert ask(account, instance, "user-data") == USER_DATA.strip()
    document = json.loads(ask(account, instance, "dynamic/instance-identity/document"))
    assert document["instanceId"] == instance and document["region"] == account.cloud.region
    assert "iam/" in ask(account, instance, "meta-data/").split()
    assert described["PrivateIpAddress"] in account.run(instance, "ip -brief address")


def test_metadata_has_the_new_public_address(account: Account, instance: str) -> None:
    allocation, address = account.elastic_address()
    association = account.ec2.associate_address(AllocationId=allocation, InstanceId=instance)["AssociationId"]
    assert ask(account, instance, "meta-data/public-ipv4") == address
    account.ec2.disassociate_address(AssociationId=association)


def test_metadata_can_be_switched_off(account: Account) -> None:
    instance = account.launch()
    account.ec2.modify_instance_metadata_options(InstanceId=instance, HttpEndpoint="disabled", HttpTokens="required")
    assert status(account, instance, f"-X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' {URL}/api/token") == "403"


def test_a_unit_can_be_shut_off_from_the_metadata_service(account: Account, instance: str) -> None:
    asks = f"curl -s --max-time 3 -o /dev/null -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' {URL}/api/token"
    account.run(instance, f"systemd-run -q --wait -p IPAddressDeny=any -p IPAddressAllow=localhost {asks} && exit 1; :")
    account.run(instance, f"systemd-run -q --wait {asks}")


def session(account: Account, instance: str, role: str, service: str) -> Any:
    """Return a boto3 client with the credentials of the machine's role."""
    keys = json.loads(ask(account, instance, f"meta-data/iam/security-credentials/{role}"))
    return account.cloud.client(
        service,
        aws_access_key_id=keys["AccessKeyId"],
        aws_secret_access_key=keys["SecretAccessKey"],
        aws_session_token=keys["Token"],
    )


def test_role_credentials_give_only_the_rights_of_the_role(account: Account, instance: str, role: str) -> None:
    s3 = session(account, instance, role, "s3")
    s3.put_object(Bucket=f"{role}-own", Key="new", Body=b"x" * 6_000_000)
    assert s3.get_object(Bucket=f"{role}-own", Key="there")["Body"].read() == b"before"
    assert {entry["Key"] for entry in s3.list_objects_v2(Bucket=f"{role}-own")["Contents"]} == {"new", "there"}
    for call, arguments in (
        ("get_object", {"Bucket": f"{role}-other", "Key": "there"}),
        ("put_object", {"Bucket": f"{role}-other", "Key": "new", "Body": b"x"}),
        ("delete_object", {"Bucket": f"{role}-other", "Key": "there"}),
        ("list_objects_v2", {"Bucket": f"{role}-other"}),
        ("delete_bucket", {"Bucket": f"{role}-own"}),
        ("put_bucket_versioning", {"Bucket": f"{role}-own", "VersioningConfiguration": {"Status": "Suspended"}}),
        ("create_bucket", {"Bucket": f"{role}-third"}),
    ):
        with pytest.raises(s3.exceptions.ClientError, match="AccessDenied"):
            getattr(s3, call)(**arguments)


def test_apis_identify_the_role(account: Account, instance: str, role: str) -> None:
    arn = session(account, instance, role, "sts").get_caller_identity()["Arn"]
    assert arn == f"arn:aws:sts::123456789012:assumed-role/{role}/{instance}"


def test_parameter_can_be_read_with_the_role(account: Account, instance: str, role: str) -> None:
    name = f"/test/{role}"
    account.cloud.client("ssm").put_parameter(Name=name, Value="secret", Type="SecureString")
    found = session(account, instance, role, "ssm").get_parameter(Name=name, WithDecryption=True)
    assert found["Parameter"]["Value"] == "secret"
    account.cloud.client("ssm").delete_parameter(Name=name)
