"""Test the rights of the machine's IAM role with the machine's own credentials.

The object store and the local cloud's APIs check each request against the current policy of the machine's role.
tests/stack/test_permissions.py tests the policy document.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from scripts.local_cloud import LocalCloud
from tests.support.servers import Server

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
def given(server: Server, cloud: LocalCloud) -> dict[str, str]:
    """Return the credentials that the machine gets from the instance metadata service."""
    done = cloud.exec(server.instance_id, ["python3", "-c", ASK])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    names = {"aws_access_key_id": "AccessKeyId", "aws_secret_access_key": "SecretAccessKey"}
    return {ours: found[theirs] for ours, theirs in {**names, "aws_session_token": "Token"}.items()}


@pytest.fixture(scope="module")
def role(cloud: LocalCloud, given: dict[str, str]) -> Any:
    """Return an S3 client that signs its requests with the credentials of the machine's role."""
    once = Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1})
    return cloud.client("s3", config=once, **given)


@pytest.mark.parametrize("bucket", ["artifacts", "models", "backups"])
def test_role_reads_and_writes_the_objects_of_its_buckets(server: Server, role: Any, bucket: str) -> None:
    name = server.buckets[bucket]
    role.put_object(Bucket=name, Key="of-the-role", Body=b"kept")
    assert role.get_object(Bucket=name, Key="of-the-role")["Body"].read() == b"kept"
    assert "of-the-role" in [each["Key"] for each in role.list_objects_v2(Bucket=name)["Contents"]]
    role.delete_object(Bucket=name, Key="of-the-role")


def test_role_adds_to_the_audit_trail_and_never_replaces_or_deletes(server: Server, role: Any) -> None:
    there = {"Bucket": server.buckets["backups"], "Key": "audit/2000/01/01/of-the-role"}
    copied = f"{there['Bucket']}/copied"
    role.put_object(Bucket=there["Bucket"], Key="copied", Body=b"forged")
    denied = {
        "add without a condition": lambda: role.put_object(**there, Body=b"forged"),
        "replace another version": lambda: role.put_object(**there, Body=b"forged", IfNoneMatch='"0"'),
        "copy": lambda: role.copy_object(**there, CopySource=copied),
        "upload in parts": lambda: role.create_multipart_upload(**there),
        "delete": lambda: role.delete_object(**there),
    }
    assert allowed_of(denied) == {}
    role.put_object(**there, Body=b"kept", IfNoneMatch="*")
    assert allowed_of(denied) == {}
    assert refusal(lambda: role.put_object(**there, Body=b"forged", IfNoneMatch="*")) == "PreconditionFailed"
    deleted = role.delete_objects(Bucket=there["Bucket"], Delete={"Objects": [{"Key": there["Key"]}]})
    assert [each["Code"] for each in deleted["Errors"]] == ["AccessDenied"]
    assert role.get_object(**there)["Body"].read() == b"kept"


@pytest.fixture(scope="module")
def mlflow_keys(server: Server, cloud: LocalCloud) -> dict[str, str]:
    """The credentials of MLflow's processes."""
    done = cloud.exec(server.instance_id, ["cat", "/run/mlflow-host/server-credentials.json"])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    names = {"aws_access_key_id": "AccessKeyId", "aws_secret_access_key": "SecretAccessKey"}
    return {ours: found[theirs] for ours, theirs in {**names, "aws_session_token": "SessionToken"}.items()}


def test_mlflow_reaches_objects_of_two_buckets_and_not_the_backups(
    server: Server, cloud: LocalCloud, role: Any, mlflow_keys: dict[str, str]
) -> None:
    once = Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1})
    mlflow = cloud.client("s3", config=once, **mlflow_keys)
    for bucket in ("artifacts", "models"):
        mlflow.put_object(Bucket=server.buckets[bucket], Key="of-mlflow", Body=b"kept")
        assert mlflow.get_object(Bucket=server.buckets[bucket], Key="of-mlflow")["Body"].read() == b"kept"
        mlflow.delete_object(Bucket=server.buckets[bucket], Key="of-mlflow")
    backups = {"Bucket": server.buckets["backups"], "Key": "dumps/secret"}
    role.put_object(**backups, Body=b"everybody's runs")
    calls: list[Callable[[], Any]] = [
        lambda: mlflow.get_object(**backups),
        lambda: mlflow.put_object(**backups, Body=b"planted"),
        lambda: mlflow.delete_object(**backups),
        lambda: mlflow.list_objects_v2(Bucket=backups["Bucket"]),
    ]
    for refused in calls:
        with pytest.raises(ClientError) as error:
            refused()
        assert error.value.response["Error"]["Code"] == "AccessDenied"
    role.delete_object(**backups)


def test_mlflow_reads_no_parameter_and_becomes_no_other_role(
    server: Server, cloud: LocalCloud, mlflow_keys: dict[str, str]
) -> None:
    sts = cloud.client("sts", **mlflow_keys)
    caller = sts.get_caller_identity()["Arn"]
    assert caller.endswith("/mlflow-server")
    roles = [each["Arn"] for each in cloud.client("iam").list_roles()["Roles"]]
    calls: list[Callable[[], Any]] = [
        lambda: cloud.client("ssm", **mlflow_keys).get_parameter(Name="/mlflow-ami/rehearsal/credentials"),
        lambda: cloud.client("ssm", **mlflow_keys).describe_parameters(),
        *(partial(sts.assume_role, RoleArn=arn, RoleSessionName="probe") for arn in roles),
    ]
    for refused in calls:
        with pytest.raises(ClientError) as error:
            refused()
        assert error.value.response["Error"]["Code"] in ("AccessDenied", "AccessDeniedException")


@pytest.fixture
def elsewhere(cloud: LocalCloud) -> Any:
    """Yield a bucket of the same account that does not belong to the stack and contains one object."""
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
    assert allowed_of(denied) == {}
    assert owner.get_object(Bucket=backups, Key="a-backup", VersionId=version)["Body"].read() == b"kept"
    assert owner.get_bucket_versioning(Bucket=backups)["Status"] == "Enabled"
    owner.delete_object(Bucket=backups, Key="a-backup", VersionId=version)


@pytest.fixture
def secret_of_another_stack(cloud: LocalCloud) -> Any:
    """Yield the name of a parameter that belongs to another stack."""
    ssm, name = cloud.client("ssm"), "/mlflow-ami/of-another/credentials"
    ssm.put_parameter(Name=name, Value="secret", Type="SecureString")
    yield name
    ssm.delete_parameter(Name=name)


def test_role_reads_its_credentials_and_no_other_parameter(
    server: Server, cloud: LocalCloud, given: dict[str, str], secret_of_another_stack: str
) -> None:
    ssm, own = cloud.client("ssm", **given), parameter_of(cloud, "credentials")
    assert json.loads(ssm.get_parameter(Name=own, WithDecryption=True)["Parameter"]["Value"])["users"]
    other = secret_of_another_stack
    document = {"DocumentName": "AWS-RunShellScript", "InstanceIds": [server.instance_id]}
    denied = {
        "read another": lambda: ssm.get_parameter(Name=other, WithDecryption=True),
        "read the admin's password": lambda: ssm.get_parameter(
            Name=parameter_of(cloud, "admin-password"), WithDecryption=True
        ),
        "read another by its ARN": lambda: ssm.get_parameter(Name=arn_of(cloud, other), WithDecryption=True),
        "read both": lambda: ssm.get_parameters(Names=[own, other]),
        "read all below a path": lambda: ssm.get_parameters_by_path(Path="/mlflow-ami", Recursive=True),
        "read the history": lambda: ssm.get_parameter_history(Name=own),
        "list": lambda: ssm.describe_parameters(),
        "write its own": lambda: ssm.put_parameter(Name=own, Value="{}", Overwrite=True),
        "write another": lambda: ssm.put_parameter(Name=other, Value="mine", Overwrite=True),
        "create one": lambda: ssm.put_parameter(Name=f"{own}-new", Value="mine", Type="String"),
        "delete its own": lambda: ssm.delete_parameter(Name=own),
        "delete both": lambda: ssm.delete_parameters(Names=[own, other]),
        "tag it": lambda: ssm.add_tags_to_resource(
            ResourceType="Parameter", ResourceId=own, Tags=[{"Key": "a", "Value": "b"}]
        ),
        "run a command": lambda: ssm.send_command(**document),
    }
    assert allowed_of(denied) == {}
    owner = cloud.client("ssm")
    assert owner.get_parameter(Name=other, WithDecryption=True)["Parameter"]["Value"] == "secret"
    assert owner.get_parameter(Name=own, WithDecryption=True)["Parameter"]["Value"] != "{}"


def test_role_publishes_the_authority_and_does_not_delete_it(cloud: LocalCloud, given: dict[str, str]) -> None:
    ssm, name = cloud.client("ssm", **given), parameter_of(cloud, "certificate-authority")
    published = cloud.client("ssm").get_parameter(Name=name)["Parameter"]["Value"]
    ssm.put_parameter(Name=name, Value=published, Overwrite=True)
    assert refusal(lambda: ssm.delete_parameter(Name=name)) in DENIED


def test_role_reaches_no_machine_no_role_and_no_other_service(
    server: Server, cloud: LocalCloud, given: dict[str, str]
) -> None:
    ec2, iam, sts, cloudwatch = (cloud.client(each, **given) for each in ("ec2", "iam", "sts", "cloudwatch"))
    caller = sts.get_caller_identity()["Arn"]
    role = caller.split("/")[1]
    machine, anything = {"InstanceId": server.instance_id}, {"Version": "2012-10-17", "Statement": []}
    open_policy = json.dumps({**anything, "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]})
    denied = {
        "list machines": lambda: ec2.describe_instances(),
        "list volumes": lambda: ec2.describe_volumes(),
        "read user-data": lambda: ec2.describe_instance_attribute(**machine, Attribute="userData"),
        "change user-data": lambda: ec2.modify_instance_attribute(**machine, UserData={"Value": b"x"}),
        "allow IMDSv1": lambda: ec2.modify_instance_metadata_options(**machine, HttpTokens="optional"),
        "terminate itself": lambda: ec2.terminate_instances(InstanceIds=[server.instance_id]),
        "launch": lambda: ec2.run_instances(ImageId=server.ami_id, MinCount=1, MaxCount=1),
        "make an image": lambda: ec2.create_image(**machine, Name="mine"),
        "open the network": lambda: ec2.authorize_security_group_ingress(
            GroupId="sg-0", IpProtocol="tcp", FromPort=22, ToPort=22, CidrIp="0.0.0.0/0"
        ),
        "delete the volume": lambda: ec2.delete_volume(VolumeId="vol-0"),
        "copy the volume": lambda: ec2.create_snapshot(VolumeId="vol-0"),
        "list users": lambda: iam.list_users(),
        "make a user": lambda: iam.create_user(UserName="mine"),
        "read its own policies": lambda: iam.list_role_policies(RoleName=role),
        "extend its own policy": lambda: iam.put_role_policy(
            RoleName=role, PolicyName="mine", PolicyDocument=open_policy
        ),
        "attach a managed policy": lambda: iam.attach_role_policy(
            RoleName=role, PolicyArn="arn:aws:iam::aws:policy/AdministratorAccess"
        ),
        "assume a role": lambda: sts.assume_role(
            RoleArn=f"arn:aws:iam::123456789012:role/{role}", RoleSessionName="mine"
        ),
        "federate": lambda: sts.get_federation_token(Name="mine"),
    }
    metric = [{"MetricName": "mine", "Value": 1}]
    denied["metrics of AWS"] = lambda: cloudwatch.put_metric_data(Namespace="AWS/EC2", MetricData=metric)
    others = {
        "cloudwatch": ["list_metrics", "describe_alarms"],
        "kms": ["list_keys"],
        "logs": ["describe_log_groups"],
        "route53": ["list_hosted_zones"],
        "secretsmanager": ["list_secrets"],
    }
    for service, operations in others.items():
        client = cloud.client(service, **given)
        denied |= {f"{service} {operation}": getattr(client, operation) for operation in operations}
    assert allowed_of(denied) == {}
    assert role in caller and server.instance_id in caller
    assert cloud.client("iam").list_role_policies(RoleName=role)["PolicyNames"] != []


def test_tampered_credentials_are_refused(cloud: LocalCloud, given: dict[str, str]) -> None:
    token = given["aws_session_token"]
    for wrong in ({"aws_session_token": token[:-8] + "AAAAAAAA"}, {"aws_session_token": "x"}):
        ssm = cloud.client("ssm", **{**given, **wrong})
        assert refusal(lambda ssm=ssm: ssm.describe_parameters()) == "UnrecognizedClientException"


def parameter_of(cloud: LocalCloud, kind: str) -> str:
    """Return the full name of the stack's parameter whose name ends with `kind`."""
    pages = cloud.client("ssm").get_paginator("describe_parameters").paginate()
    found = [each for page in pages for each in page["Parameters"]]
    [name] = [str(each["Name"]) for each in found if str(each["Name"]).endswith(f"/rehearsal/{kind}")]
    return name


def arn_of(cloud: LocalCloud, name: str) -> str:
    return f"arn:aws:ssm:{cloud.region}:123456789012:parameter{name}"


DENIED = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation"}


def allowed_of(calls: dict[str, Any]) -> dict[str, str]:
    """Return the name and the result of each call that is not refused because of a missing permission."""
    answers = {what: refusal(call) for what, call in calls.items()}
    return {what: answer for what, answer in answers.items() if answer not in DENIED}


def refusal(call: Any) -> str:
    try:
        call()
    except ClientError as error:
        return str(error.response["Error"]["Code"])
    return "allowed"
