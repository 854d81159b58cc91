"""Replay the real AWS provider's calls for this stack. Each response must have the status, the error code and the form
of AWS's response.

`provider_calls.tsv` lists the recorded calls. Each test makes all calls of one service in this file at least once, with
the provider's arguments: before the resource exists, while it exists, and after its deletion. If a test omits a call
that the file lists for its service, the test fails.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from scripts.local_cloud import LocalCloud

from .conftest import wait_until

pytestmark = pytest.mark.machine

ACCOUNT = "123456789012"
LIST = Path(__file__).with_name("provider_calls.tsv")
TRUST = json.dumps(
    {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"},
        ],
    }
)
ANYWHERE = {"IpProtocol": "-1", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}


class Replay:
    """Clients of all AWS services. The clients record each call that a test makes."""

    def __init__(self, cloud: LocalCloud) -> None:
        self.cloud = cloud
        self.made: set[tuple[str, str]] = set()
        self.clients = {each: self._client(each) for each in ("ec2", "iam", "s3", "ssm", "sts", "cloudwatch", "logs")}

    def _client(self, service: str) -> Any:
        client = self.cloud.client(service)
        client.meta.events.register("before-call", self._note)
        return client

    def _note(self, model: Any, params: Any, **_: Any) -> None:
        service = model.service_model.signing_name
        if service != "s3":
            self.made.add((service, model.name))
            return
        settings = [
            name for name in (*params["url_path"].partition("?")[2].split("&"), *params["query_string"]) if name
        ]
        self.made.add((service, f"{params['method']} bucket" + (f"?{settings[0]}" if settings else "")))

    def require_all(self, service: str) -> None:
        lines = [line.split("\t") for line in LIST.read_text().splitlines() if not line.startswith("#")][1:]
        left = {action for name, action in lines if name == service} - {
            each for name, each in self.made if name == service
        }
        assert not left, f"calls of the provider that this test does not make: {sorted(left)}"


@pytest.fixture
def replay(cloud: LocalCloud) -> Replay:
    return Replay(cloud)


@pytest.fixture
def name() -> str:
    return f"replay-{uuid.uuid4().hex[:10]}"


def refused(code: str, call: Callable[..., Any], /, status: int = 400, **arguments: Any) -> None:
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    answer = caught.value.response
    found = (answer["Error"]["Code"], answer["ResponseMetadata"]["HTTPStatusCode"])
    assert found == (code, status), f"{caught.value.operation_name}: {found}"


def content(call: Callable[..., Any], /, **arguments: Any) -> dict[str, Any]:
    """Make a call, and return the response without `ResponseMetadata`."""
    answer: dict[str, Any] = call(**arguments)
    assert answer.pop("ResponseMetadata")["HTTPStatusCode"] in (200, 204)
    return answer


def tags(kind: str, title: str) -> list[dict[str, Any]]:
    return [{"ResourceType": kind, "Tags": [{"Key": "Name", "Value": title}]}]


# S3

ON = {"BlockPublicAcls": True, "IgnorePublicAcls": True, "BlockPublicPolicy": True, "RestrictPublicBuckets": True}
ENFORCED = {"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]}
AES256 = {"Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}, "BucketKeyEnabled": False}]}
LIFECYCLE = [
    {
        "ID": "old-versions",
        "Status": "Enabled",
        "Filter": {"Prefix": ""},
        "NoncurrentVersionExpiration": {"NoncurrentDays": 14},
        "Expiration": {"ExpiredObjectDeleteMarker": True},
    },
    {
        "ID": "unfinished-uploads",
        "Status": "Enabled",
        "Filter": {"Prefix": ""},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7},
    },
]
NEW_BUCKET: dict[str, tuple[int, Any]] = {
    "get_bucket_accelerate_configuration": (200, {}),
    "get_bucket_cors": (404, "NoSuchCORSConfiguration"),
    "get_bucket_encryption": (200, {"ServerSideEncryptionConfiguration": AES256}),
    "get_bucket_lifecycle_configuration": (404, "NoSuchLifecycleConfiguration"),
    "get_bucket_logging": (200, {}),
    "get_object_lock_configuration": (404, "ObjectLockConfigurationNotFoundError"),
    "get_bucket_ownership_controls": (200, {"OwnershipControls": ENFORCED}),
    "get_bucket_policy": (404, "NoSuchBucketPolicy"),
    "get_public_access_block": (200, {"PublicAccessBlockConfiguration": ON}),
    "get_bucket_replication": (404, "ReplicationConfigurationNotFoundError"),
    "get_bucket_request_payment": (200, {"Payer": "BucketOwner"}),
    "get_bucket_tagging": (404, "NoSuchTagSet"),
    "get_bucket_versioning": (200, {}),
    "get_bucket_website": (404, "NoSuchWebsiteConfiguration"),
    "get_bucket_location": (200, {"LocationConstraint": "eu-central-1"}),
}
"""Call of S3 → AWS's response to the call about a new bucket, since April 2023."""


def tls_only(bucket: str) -> str:
    everything = {
        "Principal": "*",
        "Action": "s3:*",
        "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
    }
    plain = {"Sid": "OnlyTls", "Effect": "Deny", **everything, "Condition": {"Bool": {"aws:SecureTransport": "false"}}}
    old = {**plain, "Sid": "OnlyCurrentTls", "Condition": {"NumericLessThan": {"s3:TlsVersion": "1.2"}}}
    return json.dumps({"Version": "2012-10-17", "Statement": [plain, old]})


def require_settings(s3: Any, bucket: str, wanted: dict[str, tuple[int, Any]]) -> None:
    for call, (status, answer) in wanted.items():
        if status == 200:
            found = content(getattr(s3, call), Bucket=bucket)
            if "Policy" in found:
                found["Policy"] = json.loads(found["Policy"])
            assert found == answer, call
        else:
            refused(answer, getattr(s3, call), status, Bucket=bucket)


def test_buckets_have_aws_defaults_and_keep_settings_until_deleted(replay: Replay, name: str) -> None:
    s3, region = replay.clients["s3"], replay.cloud.region
    where = {"LocationConstraint": region}
    refused("404", s3.head_bucket, 404, Bucket=name)
    s3.create_bucket(Bucket=name, CreateBucketConfiguration=where)
    refused("BucketAlreadyOwnedByYou", s3.create_bucket, 409, Bucket=name, CreateBucketConfiguration=where)
    assert content(s3.head_bucket, Bucket=name)["BucketRegion"] == region
    require_settings(s3, name, NEW_BUCKET)
    acl = content(s3.get_bucket_acl, Bucket=name)
    assert len(acl["Owner"]["ID"]) == 64
    [grant] = acl["Grants"]
    assert (grant["Permission"], grant["Grantee"]["Type"], grant["Grantee"]["ID"]) == (
        "FULL_CONTROL",
        "CanonicalUser",
        acl["Owner"]["ID"],
    )
    refused("AccessControlListNotSupported", s3.put_bucket_acl, Bucket=name, ACL="private")

    pairs = [{"Key": "Project", "Value": "mlflow-ami"}]
    rules = {"Rules": LIFECYCLE}
    s3.put_bucket_tagging(Bucket=name, Tagging={"TagSet": pairs})
    s3.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    s3.put_bucket_encryption(Bucket=name, ServerSideEncryptionConfiguration=AES256)
    s3.put_public_access_block(Bucket=name, PublicAccessBlockConfiguration=ON)
    s3.put_bucket_ownership_controls(Bucket=name, OwnershipControls=ENFORCED)
    s3.put_bucket_lifecycle_configuration(Bucket=name, LifecycleConfiguration=rules)
    s3.put_bucket_policy(Bucket=name, Policy=tls_only(name))
    require_settings(
        s3,
        name,
        NEW_BUCKET
        | {
            "get_bucket_tagging": (200, {"TagSet": pairs}),
            "get_bucket_versioning": (200, {"Status": "Enabled"}),
            "get_bucket_lifecycle_configuration": (
                200,
                {**rules, "TransitionDefaultMinimumObjectSize": "all_storage_classes_128K"},
            ),
            "get_bucket_policy": (200, {"Policy": json.loads(tls_only(name))}),
        },
    )

    # S3 refuses to delete a bucket that contains a version or a delete marker.
    s3.put_object(Bucket=name, Key="folder/kept", Body=b"x")
    refused("BucketNotEmpty", s3.delete_bucket, 409, Bucket=name)
    marker = s3.delete_object(Bucket=name, Key="folder/kept")["VersionId"]
    refused("BucketNotEmpty", s3.delete_bucket, 409, Bucket=name)
    [version] = s3.list_object_versions(Bucket=name)["Versions"]
    for each in (version["VersionId"], marker):
        s3.delete_object(Bucket=name, Key="folder/kept", VersionId=each)

    for _ in range(2):  # AWS returns status 204 even if the setting is already deleted
        for delete in (
            s3.delete_bucket_policy,
            s3.delete_bucket_lifecycle,
            s3.delete_bucket_encryption,
            s3.delete_public_access_block,
            s3.delete_bucket_ownership_controls,
            s3.delete_bucket_tagging,
        ):
            assert delete(Bucket=name)["ResponseMetadata"]["HTTPStatusCode"] == 204
    s3.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Suspended"})
    require_settings(
        s3,
        name,
        NEW_BUCKET
        | {
            "get_public_access_block": (404, "NoSuchPublicAccessBlockConfiguration"),
            "get_bucket_ownership_controls": (404, "OwnershipControlsNotFoundError"),
            "get_bucket_versioning": (200, {"Status": "Suspended"}),
        },
    )
    off = {**ON, "BlockPublicPolicy": False}
    s3.put_public_access_block(Bucket=name, PublicAccessBlockConfiguration=off)
    assert content(s3.get_public_access_block, Bucket=name) == {"PublicAccessBlockConfiguration": off}

    s3.delete_bucket(Bucket=name)
    refused("NoSuchBucket", s3.delete_bucket, 404, Bucket=name)
    for call in (*NEW_BUCKET, "get_bucket_acl", "delete_public_access_block", "delete_bucket_encryption"):
        refused("NoSuchBucket", getattr(s3, call), 404, Bucket=name)
    refused("NoSuchBucket", s3.put_object, 404, Bucket=name, Key="k", Body=b"x")

    # A new bucket does not get the settings of a deleted bucket with the same name.
    s3.create_bucket(Bucket=name, CreateBucketConfiguration=where)
    require_settings(s3, name, NEW_BUCKET)
    s3.delete_bucket(Bucket=name)
    replay.require_all("s3")


def test_the_tls_only_policy_shuts_http_out_of_objects_and_settings(replay: Replay, name: str) -> None:
    s3, region = replay.clients["s3"], replay.cloud.region
    plain = replay.cloud.client("s3", endpoint_url=replay.cloud.s3_plain_endpoint)
    s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": region})
    plain.put_object(Bucket=name, Key="k", Body=b"before the policy")
    s3.put_bucket_policy(Bucket=name, Policy=tls_only(name))
    for call in (*NEW_BUCKET, "get_bucket_acl", "delete_bucket", "delete_bucket_policy", "list_objects_v2"):
        refused("AccessDenied", getattr(plain, call), 403, Bucket=name)
    for call in ("get_object", "delete_object"):
        refused("AccessDenied", getattr(plain, call), 403, Bucket=name, Key="k")
    refused("AccessDenied", plain.put_public_access_block, 403, Bucket=name, PublicAccessBlockConfiguration=ON)
    assert s3.get_object(Bucket=name, Key="k")["Body"].read() == b"before the policy"
    s3.delete_object(Bucket=name, Key="k")
    s3.delete_bucket(Bucket=name)


def test_settings_are_refused_with_a_wrong_key_and_without_a_key(replay: Replay, name: str) -> None:
    s3, region = replay.clients["s3"], replay.cloud.region
    s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": region})
    wrong = replay.cloud.client("s3", aws_secret_access_key="x" * 40)
    for call in ("get_public_access_block", "get_bucket_encryption", "delete_public_access_block"):
        refused("SignatureDoesNotMatch", getattr(wrong, call), 403, Bucket=name)
    unknown = replay.cloud.client("s3", aws_access_key_id="AKIAAAAAAAAAAAAAAAAA")
    refused("InvalidAccessKeyId", unknown.get_public_access_block, 403, Bucket=name)
    s3.delete_bucket(Bucket=name)


def test_objects_are_stored_and_described_as_by_s3(replay: Replay, name: str) -> None:
    s3, region = replay.clients["s3"], replay.cloud.region
    s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": region})
    s3.put_object(Bucket=name, Key="plain", Body=b"text")
    s3.put_object(Bucket=name, Key="packed", Body=b"text", ContentEncoding="gzip", ContentType="text/plain")
    for describe in (s3.head_object, s3.get_object):
        plain, packed = describe(Bucket=name, Key="plain"), describe(Bucket=name, Key="packed")
        assert (plain["ContentType"], plain.get("ContentEncoding")) == ("binary/octet-stream", None)
        assert (packed["ContentType"], packed.get("ContentEncoding")) == ("text/plain", "gzip")
        assert plain["ServerSideEncryption"] == "AES256"
    for key in ("plain", "packed"):
        s3.delete_object(Bucket=name, Key=key)
    s3.delete_bucket(Bucket=name)


# IAM, Systems Manager, CloudWatch, STS


def test_roles_and_instance_profiles(replay: Replay, name: str) -> None:
    iam = replay.clients["iam"]
    refused("NoSuchEntity", iam.get_role, 404, RoleName=name)
    pairs = [{"Key": "Project", "Value": "mlflow-ami"}]
    made = iam.create_role(RoleName=name, AssumeRolePolicyDocument=TRUST, Path="/", MaxSessionDuration=3600, Tags=pairs)
    assert made["Role"]["RoleId"].startswith("AROA")
    refused("EntityAlreadyExists", iam.create_role, 409, RoleName=name, AssumeRolePolicyDocument=TRUST)
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:ListBucket", "Resource": "*"}]}
    refused("NoSuchEntity", iam.get_role_policy, 404, RoleName=name, PolicyName="own")
    iam.put_role_policy(RoleName=name, PolicyName="own", PolicyDocument=json.dumps(policy))
    assert iam.get_role_policy(RoleName=name, PolicyName="own")["PolicyDocument"] == policy
    assert content(iam.list_role_policies, RoleName=name)["PolicyNames"] == ["own"]
    assert content(iam.list_attached_role_policies, RoleName=name)["AttachedPolicies"] == []
    iam.tag_role(RoleName=name, Tags=[{"Key": "later", "Value": "1"}])
    role = iam.get_role(RoleName=name)["Role"]
    assert role["Arn"] == f"arn:aws:iam::{ACCOUNT}:role/{name}"
    assert [tag["Key"] for tag in role["Tags"]] == ["Project", "later"]

    refused("NoSuchEntity", iam.get_instance_profile, 404, InstanceProfileName=name)
    profile = iam.create_instance_profile(InstanceProfileName=name, Path="/", Tags=pairs)["InstanceProfile"]
    assert profile["InstanceProfileId"].startswith("AIPA") and profile["Roles"] == []
    iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    refused("LimitExceeded", iam.add_role_to_instance_profile, 409, InstanceProfileName=name, RoleName=name)
    iam.tag_instance_profile(InstanceProfileName=name, Tags=[{"Key": "later", "Value": "1"}])
    profile = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
    assert [each["RoleName"] for each in profile["Roles"]] == [name]
    assert [tag["Key"] for tag in profile["Tags"]] == ["Project", "later"]
    [found] = iam.list_instance_profiles_for_role(RoleName=name)["InstanceProfiles"]
    assert found["InstanceProfileName"] == name

    refused("DeleteConflict", iam.delete_instance_profile, 409, InstanceProfileName=name)
    refused("DeleteConflict", iam.delete_role, 409, RoleName=name)
    iam.remove_role_from_instance_profile(InstanceProfileName=name, RoleName=name)
    refused("NoSuchEntity", iam.remove_role_from_instance_profile, 404, InstanceProfileName=name, RoleName=name)
    iam.delete_instance_profile(InstanceProfileName=name)
    refused("NoSuchEntity", iam.get_instance_profile, 404, InstanceProfileName=name)
    refused("NoSuchEntity", iam.delete_instance_profile, 404, InstanceProfileName=name)
    refused("DeleteConflict", iam.delete_role, 409, RoleName=name)
    iam.delete_role_policy(RoleName=name, PolicyName="own")
    refused("NoSuchEntity", iam.delete_role_policy, 404, RoleName=name, PolicyName="own")
    iam.delete_role(RoleName=name)
    for call in (iam.get_role, iam.delete_role, iam.list_role_policies, iam.list_attached_role_policies):
        refused("NoSuchEntity", call, 404, RoleName=name)
    replay.require_all("iam")


def test_parameters(replay: Replay, name: str) -> None:
    ssm, path = replay.clients["ssm"], f"/mlflow-ami/{name}/credentials"
    equal = [{"Key": "Name", "Option": "Equals", "Values": [path]}]
    refused("ParameterNotFound", ssm.get_parameter, Name=path, WithDecryption=True)
    pairs = [{"Key": "Project", "Value": "mlflow-ami"}]
    secret: dict[str, Any] = {"Name": path, "Type": "SecureString", "Description": "d", "Tier": "Intelligent-Tiering"}
    assert content(ssm.put_parameter, **secret, Value="hush", Tags=pairs) == {"Version": 1, "Tier": "Standard"}
    refused("ParameterAlreadyExists", ssm.put_parameter, **secret, Value="hush")
    found = ssm.get_parameter(Name=path, WithDecryption=True)["Parameter"]
    assert (found["Value"], found["Version"], found["DataType"]) == ("hush", 1, "text")
    assert found["ARN"] == f"arn:aws:ssm:{replay.cloud.region}:{ACCOUNT}:parameter{path}"
    assert "hush" not in ssm.get_parameter(Name=path, WithDecryption=False)["Parameter"]["Value"]
    [described] = ssm.describe_parameters(ParameterFilters=equal)["Parameters"]
    assert (described["Tier"], described["KeyId"], described["Description"]) == ("Standard", "alias/aws/ssm", "d")
    ssm.add_tags_to_resource(ResourceType="Parameter", ResourceId=path, Tags=[{"Key": "later", "Value": "1"}])
    told = ssm.list_tags_for_resource(ResourceType="Parameter", ResourceId=path)["TagList"]
    assert {tag["Key"] for tag in told} == {"Project", "later"}
    long = "x" * 4097
    assert content(ssm.put_parameter, **secret, Value=long, Overwrite=True) == {"Version": 2, "Tier": "Advanced"}
    assert ssm.get_parameter(Name=path, WithDecryption=True)["Parameter"]["Value"] == long

    ssm.delete_parameter(Name=path)
    refused("ParameterNotFound", ssm.get_parameter, Name=path)
    refused("ParameterNotFound", ssm.delete_parameter, Name=path)
    assert ssm.describe_parameters(ParameterFilters=equal)["Parameters"] == []
    refused("InvalidResourceId", ssm.list_tags_for_resource, ResourceType="Parameter", ResourceId=path)
    replay.require_all("ssm")


def test_alarms_begin_without_data_and_are_deleted_with_their_tags(replay: Replay, name: str) -> None:
    watch = replay.clients["cloudwatch"]
    alarm: dict[str, Any] = {
        "AlarmName": name,
        "AlarmDescription": "d",
        "Namespace": "AWS/EC2",
        "MetricName": "StatusCheckFailed_System",
        "Dimensions": [{"Name": "InstanceId", "Value": "i-0123456789abcdef0"}],
        "Statistic": "Maximum",
        "Period": 60,
        "EvaluationPeriods": 2,
        "Threshold": 0.0,
        "ComparisonOperator": "GreaterThanThreshold",
        "TreatMissingData": "missing",
        "ActionsEnabled": True,
        "AlarmActions": [f"arn:aws:automate:{replay.cloud.region}:ec2:recover"],
    }
    watch.put_metric_alarm(**alarm, Tags=[{"Key": "Project", "Value": "mlflow-ami"}])
    [found] = watch.describe_alarms(AlarmNames=[name])["MetricAlarms"]
    assert {key: found[key] for key in alarm} == alarm
    assert found["StateValue"] == "INSUFFICIENT_DATA"
    arn = found["AlarmArn"]
    assert arn == f"arn:aws:cloudwatch:{replay.cloud.region}:{ACCOUNT}:alarm:{name}"
    watch.tag_resource(ResourceARN=arn, Tags=[{"Key": "later", "Value": "1"}])
    watch.put_metric_alarm(**{**alarm, "Threshold": 1.0})
    assert {tag["Key"] for tag in watch.list_tags_for_resource(ResourceARN=arn)["Tags"]} == {"Project", "later"}
    [found] = watch.describe_alarms(AlarmNames=[name])["MetricAlarms"]
    assert (found["Threshold"], found["StateValue"]) == (1.0, "INSUFFICIENT_DATA")
    watch.delete_alarms(AlarmNames=[name])
    assert watch.describe_alarms(AlarmNames=[name])["MetricAlarms"] == []
    refused("ResourceNotFoundException", watch.list_tags_for_resource, 404, ResourceARN=arn)
    watch.put_metric_alarm(**alarm)
    assert watch.list_tags_for_resource(ResourceARN=arn)["Tags"] == []
    watch.delete_alarms(AlarmNames=[name])
    replay.require_all("monitoring")


def test_log_groups_and_dashboards(replay: Replay, name: str) -> None:
    """Make the calls in the provider's group.go and dashboard.go, because `provider_calls.tsv` does not list these
    calls."""
    logs, watch, group = replay.clients["logs"], replay.clients["cloudwatch"], f"/mlflow-ami/{name}"
    assert content(logs.describe_log_groups, logGroupNamePrefix=group) == {"logGroups": []}
    logs.create_log_group(logGroupName=group, tags={"Project": "mlflow-ami"})
    refused("ResourceAlreadyExistsException", logs.create_log_group, logGroupName=group)
    for days in (7, 30):
        logs.put_retention_policy(logGroupName=group, retentionInDays=days)
        [found] = logs.describe_log_groups(logGroupNamePrefix=group)["logGroups"]
        assert found["retentionInDays"] == days
    arn = f"arn:aws:logs:{replay.cloud.region}:{ACCOUNT}:log-group:{group}"
    assert found["arn"] == f"{arn}:*"
    logs.tag_resource(resourceArn=arn, tags={"later": "1"})
    logs.untag_resource(resourceArn=arn, tagKeys=["Project"])
    assert content(logs.list_tags_for_resource, resourceArn=arn) == {"tags": {"later": "1"}}
    logs.delete_log_group(logGroupName=group)
    refused("ResourceNotFoundException", logs.delete_log_group, logGroupName=group)
    refused("ResourceNotFoundException", logs.list_tags_for_resource, resourceArn=arn)
    logs.create_log_group(logGroupName=group)
    assert content(logs.list_tags_for_resource, resourceArn=arn) == {"tags": {}}
    logs.delete_log_group(logGroupName=group)

    refused("ResourceNotFound", watch.get_dashboard, 404, DashboardName=name)
    refused("ResourceNotFound", watch.delete_dashboards, 404, DashboardNames=[name])
    for body in ('{"widgets": []}', '{"widgets": [], "start": "-PT6H"}'):
        watch.put_dashboard(DashboardName=name, DashboardBody=body)
        shown = content(watch.get_dashboard, DashboardName=name)
        assert shown == {
            "DashboardArn": f"arn:aws:cloudwatch::{ACCOUNT}:dashboard/{name}",
            "DashboardBody": body,
            "DashboardName": name,
        }
    watch.delete_dashboards(DashboardNames=[name])


def test_the_accounts_own_keys_are_its_root_users(replay: Replay) -> None:
    who = content(replay.clients["sts"].get_caller_identity)
    assert who == {"UserId": ACCOUNT, "Account": ACCOUNT, "Arn": f"arn:aws:iam::{ACCOUNT}:root"}
    replay.require_all("sts")


# EC2


def test_networks_volumes_addresses_and_machines(replay: Replay, name: str) -> None:
    machine_type = "t3.micro"
    ec2, region = replay.clients["ec2"], replay.cloud.region
    zone = f"{region}a"
    in_zone = {"AvailabilityZone": zone}

    # The provider makes the following look-ups before it creates a resource.
    usable = [{"Name": "state", "Values": ["available"]}, {"Name": "opt-in-status", "Values": ["opt-in-not-required"]}]
    zones = ec2.describe_availability_zones(Filters=usable)["AvailabilityZones"]
    assert zone in {each["ZoneName"] for each in zones} and len(zones) >= 2
    kinds = [{"Name": "instance-type", "Values": [machine_type]}]
    offers = ec2.describe_instance_type_offerings(LocationType="availability-zone", Filters=kinds)
    assert {each["Location"] for each in offers["InstanceTypeOfferings"]} >= {zone}
    [kind] = ec2.describe_instance_types(InstanceTypes=[machine_type])["InstanceTypes"]
    assert (kind["MemoryInfo"]["SizeInMiB"], kind["VCpuInfo"]["DefaultVCpus"]) == (1024, 2)
    refused("InvalidInstanceType", ec2.describe_instance_types, InstanceTypes=["m99.huge"])
    refused("InvalidKeyPair.NotFound", ec2.describe_key_pairs, KeyNames=[name])
    refused("InvalidAMIID.NotFound", ec2.describe_images, ImageIds=["ami-0123456789abcdef0"])
    ami = replay.cloud.source_ami()
    [image] = ec2.describe_images(ImageIds=[ami])["Images"]
    assert image["RootDeviceType"] == "ebs" and image["BlockDeviceMappings"][0]["Ebs"]["SnapshotId"]
    refused("InvalidInstanceID.NotFound", ec2.get_instance_uefi_data, InstanceId="i-0123456789abcdef0")

    # Network
    vpc = ec2.create_vpc(CidrBlock="10.42.0.0/24", TagSpecifications=tags("vpc", name))["Vpc"]["VpcId"]
    for setting, value in (
        ("enableDnsSupport", True),
        ("enableDnsHostnames", False),
        ("enableNetworkAddressUsageMetrics", False),
    ):
        found = ec2.describe_vpc_attribute(VpcId=vpc, Attribute=setting)
        assert found[setting[0].upper() + setting[1:]] == {"Value": value}
    ec2.modify_vpc_attribute(VpcId=vpc, EnableDnsHostnames={"Value": True})
    assert ec2.describe_vpc_attribute(VpcId=vpc, Attribute="enableDnsHostnames")["EnableDnsHostnames"]["Value"]
    [described] = ec2.describe_vpcs(VpcIds=[vpc])["Vpcs"]
    assert described["DhcpOptionsId"].startswith("dopt-") and not described["IsDefault"]
    inside = {"Name": "vpc-id", "Values": [vpc]}
    [acl] = ec2.describe_network_acls(Filters=[inside, {"Name": "default", "Values": ["true"]}])["NetworkAcls"]
    assert acl["IsDefault"]
    [main] = ec2.describe_route_tables(Filters=[inside, {"Name": "association.main", "Values": ["true"]}])[
        "RouteTables"
    ]
    assert main["Associations"][0]["Main"]
    groups = ec2.describe_security_groups(Filters=[inside, {"Name": "group-name", "Values": ["default"]}])
    assert len(groups["SecurityGroups"]) == 1

    made = ec2.create_subnet(VpcId=vpc, CidrBlock="10.42.0.0/25", **in_zone, TagSpecifications=tags("subnet", name))
    subnet = made["Subnet"]["SubnetId"]
    ec2.modify_subnet_attribute(SubnetId=subnet, MapPublicIpOnLaunch={"Value": True})
    assert ec2.describe_subnets(SubnetIds=[subnet])["Subnets"][0]["MapPublicIpOnLaunch"]
    made = ec2.create_internet_gateway(TagSpecifications=tags("internet-gateway", name))
    gateway = made["InternetGateway"]["InternetGatewayId"]
    ec2.attach_internet_gateway(InternetGatewayId=gateway, VpcId=vpc)
    [described] = ec2.describe_internet_gateways(InternetGatewayIds=[gateway])["InternetGateways"]
    assert described["Attachments"] == [{"State": "available", "VpcId": vpc}]
    table = ec2.create_route_table(VpcId=vpc, TagSpecifications=tags("route-table", name))["RouteTable"]["RouteTableId"]
    out = {"RouteTableId": table, "DestinationCidrBlock": "0.0.0.0/0"}
    assert ec2.create_route(**out, GatewayId=gateway)["Return"]
    link = ec2.associate_route_table(RouteTableId=table, SubnetId=subnet)["AssociationId"]
    service = f"com.amazonaws.{region}.s3"
    made = ec2.create_vpc_endpoint(
        VpcId=vpc,
        ServiceName=service,
        VpcEndpointType="Gateway",
        RouteTableIds=[table],
        TagSpecifications=tags("vpc-endpoint", name),
    )
    endpoint = made["VpcEndpoint"]["VpcEndpointId"]
    [described] = ec2.describe_vpc_endpoints(VpcEndpointIds=[endpoint])["VpcEndpoints"]
    assert (described["State"], described["RouteTableIds"]) == ("available", [table])
    [prefixes] = ec2.describe_prefix_lists(Filters=[{"Name": "prefix-list-name", "Values": [service]}])["PrefixLists"]
    assert prefixes["Cidrs"]
    [described] = ec2.describe_route_tables(RouteTableIds=[table])["RouteTables"]
    assert {each.get("GatewayId") for each in described["Routes"]} == {"local", gateway, endpoint}
    assert [each["RouteTableAssociationId"] for each in described["Associations"]] == [link]

    # The provider creates a security group, removes the default rules, and adds each rule in its own call.
    made = ec2.create_security_group(
        GroupName=name, Description="d", VpcId=vpc, TagSpecifications=tags("security-group", name)
    )
    group = made["GroupId"]
    ec2.revoke_security_group_egress(GroupId=group, IpPermissions=[ANYWHERE])
    everywhere = {"IpProtocol": "-1", "FromPort": 0, "ToPort": 0, "Ipv6Ranges": [{"CidrIpv6": "::/0"}]}
    refused("InvalidPermission.NotFound", ec2.revoke_security_group_egress, GroupId=group, IpPermissions=[everywhere])
    web = {"IpProtocol": "tcp", "FromPort": 443, "ToPort": 443, "IpRanges": [{"CidrIp": "203.0.113.0/24"}]}
    made = ec2.authorize_security_group_ingress(
        GroupId=group, IpPermissions=[web], TagSpecifications=tags("security-group-rule", name)
    )
    [ingress] = [each["SecurityGroupRuleId"] for each in made["SecurityGroupRules"]]
    refused("InvalidPermission.Duplicate", ec2.authorize_security_group_ingress, GroupId=group, IpPermissions=[web])
    made = ec2.authorize_security_group_egress(GroupId=group, IpPermissions=[ANYWHERE])
    [egress] = [each["SecurityGroupRuleId"] for each in made["SecurityGroupRules"]]
    [rule] = ec2.describe_security_group_rules(SecurityGroupRuleIds=[ingress])["SecurityGroupRules"]
    assert (rule["CidrIpv4"], rule["FromPort"], rule["IsEgress"]) == ("203.0.113.0/24", 443, False)
    of_group = [{"Name": "group-id", "Values": [group]}]
    rules = ec2.describe_security_group_rules(Filters=of_group)["SecurityGroupRules"]
    assert {each["SecurityGroupRuleId"] for each in rules} == {ingress, egress}
    assert ec2.describe_network_interfaces(Filters=of_group)["NetworkInterfaces"] == []

    # Volume and address
    made = ec2.create_volume(
        **in_zone, Size=1, VolumeType="gp3", Encrypted=True, ClientToken=name, TagSpecifications=tags("volume", name)
    )
    volume = made["VolumeId"]
    [described] = ec2.describe_volumes(VolumeIds=[volume])["Volumes"]
    assert (described["Iops"], described["Throughput"], described["Encrypted"]) == (3000, 125, True)
    assert (described["State"], described["Attachments"]) == ("available", [])
    ec2.create_tags(Resources=[volume], Tags=[{"Key": "later", "Value": "1"}])
    told = ec2.describe_tags(Filters=[{"Name": "resource-id", "Values": [volume]}])["Tags"]
    assert {tag["Key"]: tag["Value"] for tag in told} == {"Name": name, "later": "1"}
    ec2.modify_volume(VolumeId=volume, Size=2)
    assert ec2.describe_volumes(VolumeIds=[volume])["Volumes"][0]["Size"] == 2
    refused("InvalidParameterValue", ec2.modify_volume, VolumeId=volume, Size=1)
    allocation = ec2.allocate_address(Domain="vpc", TagSpecifications=tags("elastic-ip", name))["AllocationId"]
    [address] = ec2.describe_addresses(AllocationIds=[allocation])["Addresses"]
    assert (address["PublicIpv4Pool"], address["NetworkBorderGroup"]) == ("amazon", region)
    assert not {"InstanceId", "NetworkInterfaceId", "AssociationId", "PrivateIpAddress"} & address.keys()
    [reverse] = ec2.describe_addresses_attribute(AllocationIds=[allocation], Attribute="domain-name")["Addresses"]
    assert reverse == {"PublicIp": address["PublicIp"], "AllocationId": allocation}

    # Machine
    launched = ec2.run_instances(
        ImageId=ami,
        InstanceType=machine_type,
        MinCount=1,
        MaxCount=1,
        ClientToken=name,
        SubnetId=subnet,
        SecurityGroupIds=[group],
        UserData="#cloud-config\n",
        MetadataOptions={"HttpTokens": "required", "HttpEndpoint": "enabled", "HttpPutResponseHopLimit": 1},
        TagSpecifications=tags("instance", name),
    )
    instance = launched["Instances"][0]["InstanceId"]
    assert launched["Instances"][0]["State"]["Name"] == "pending"

    def state() -> str:
        found = ec2.describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"][0]
        return str(found["State"]["Name"])

    def attribute(wanted: str) -> Any:
        found = content(ec2.describe_instance_attribute, InstanceId=instance, Attribute=wanted)
        assert found.pop("InstanceId") == instance
        [value] = found.values()
        return value

    wait_until(lambda: state() == "running", 120, "the machine does not run")
    assert attribute("disableApiTermination") == {"Value": False}
    assert attribute("disableApiStop") == {"Value": False}
    assert attribute("instanceInitiatedShutdownBehavior") == {"Value": "stop"}
    assert base64.b64decode(attribute("userData")["Value"]) == b"#cloud-config\n"
    [credits] = ec2.describe_instance_credit_specifications(InstanceIds=[instance])["InstanceCreditSpecifications"]
    assert credits == {"InstanceId": instance, "CpuCredits": "unlimited"}
    ec2.modify_instance_attribute(InstanceId=instance, DisableApiTermination={"Value": True})
    refused("OperationNotPermitted", ec2.terminate_instances, InstanceIds=[instance])
    ec2.modify_instance_attribute(InstanceId=instance, DisableApiTermination={"Value": False})
    refused(
        "IncorrectInstanceState", ec2.modify_instance_attribute, InstanceId=instance, InstanceType={"Value": "t3.small"}
    )

    attachment = ec2.attach_volume(VolumeId=volume, InstanceId=instance, Device="/dev/sdf")
    assert attachment["State"] in ("attaching", "attached")
    refused("VolumeInUse", ec2.delete_volume, VolumeId=volume)
    link_of_address = ec2.associate_address(AllocationId=allocation, InstanceId=instance)["AssociationId"]
    [address] = ec2.describe_addresses(AllocationIds=[allocation])["Addresses"]
    assert (address["InstanceId"], address["AssociationId"]) == (instance, link_of_address)
    refused("InvalidIPAddress.InUse", ec2.release_address, AllocationId=allocation)
    for kind_of_thing, call, arguments in (
        ("group", ec2.delete_security_group, {"GroupId": group}),
        ("subnet", ec2.delete_subnet, {"SubnetId": subnet}),
        ("network", ec2.delete_vpc, {"VpcId": vpc}),
        ("gateway", ec2.delete_internet_gateway, {"InternetGatewayId": gateway}),
        ("table", ec2.delete_route_table, {"RouteTableId": table}),
        ("mapped addresses", ec2.detach_internet_gateway, {"InternetGatewayId": gateway, "VpcId": vpc}),
    ):
        try:
            refused("DependencyViolation", call, **arguments)
        except BaseException as error:
            raise AssertionError(f"{kind_of_thing}: {error}") from error

    # Away again
    ec2.stop_instances(InstanceIds=[instance])
    wait_until(lambda: state() == "stopped", 60, "the machine does not stop")
    ec2.detach_volume(VolumeId=volume, InstanceId=instance, Device="/dev/sdf")
    wait_until(lambda: ec2.describe_volumes(VolumeIds=[volume])["Volumes"][0]["State"] == "available", 30, "detaching")
    refused("IncorrectState", ec2.detach_volume, VolumeId=volume, InstanceId=instance, Device="/dev/sdf")
    ec2.disassociate_address(AssociationId=link_of_address)
    refused("InvalidAssociationID.NotFound", ec2.disassociate_address, AssociationId=link_of_address)
    ec2.terminate_instances(InstanceIds=[instance])
    wait_until(lambda: state() == "terminated", 60, "the machine does not end")
    ec2.release_address(AllocationId=allocation)
    for call in (ec2.describe_addresses, ec2.describe_addresses_attribute):
        refused("InvalidAllocationID.NotFound", call, AllocationIds=[allocation])
    refused("InvalidAllocationID.NotFound", ec2.release_address, AllocationId=allocation)
    ec2.delete_volume(VolumeId=volume)
    refused("InvalidVolume.NotFound", ec2.describe_volumes, VolumeIds=[volume])
    refused("InvalidVolume.NotFound", ec2.delete_volume, VolumeId=volume)

    ec2.revoke_security_group_ingress(GroupId=group, SecurityGroupRuleIds=[ingress])
    refused("InvalidSecurityGroupRuleId.NotFound", ec2.describe_security_group_rules, SecurityGroupRuleIds=[ingress])
    refused(
        "InvalidSecurityGroupRuleId.NotFound",
        ec2.revoke_security_group_ingress,
        GroupId=group,
        SecurityGroupRuleIds=[ingress],
    )
    ec2.revoke_security_group_egress(GroupId=group, SecurityGroupRuleIds=[egress])
    ec2.delete_security_group(GroupId=group)
    refused("InvalidGroup.NotFound", ec2.describe_security_groups, GroupIds=[group])
    refused("InvalidGroup.NotFound", ec2.delete_security_group, GroupId=group)
    assert content(ec2.delete_vpc_endpoints, VpcEndpointIds=[endpoint]) == {"Unsuccessful": []}
    refused("InvalidVpcEndpointId.NotFound", ec2.describe_vpc_endpoints, VpcEndpointIds=[endpoint])
    [left] = ec2.delete_vpc_endpoints(VpcEndpointIds=[endpoint])["Unsuccessful"]
    assert (left["ResourceId"], left["Error"]["Code"]) == (endpoint, "InvalidVpcEndpoint.NotFound")
    ec2.delete_route(**out)
    refused("InvalidRoute.NotFound", ec2.delete_route, **out)
    ec2.disassociate_route_table(AssociationId=link)
    refused("InvalidAssociationID.NotFound", ec2.disassociate_route_table, AssociationId=link)
    link = ec2.associate_route_table(RouteTableId=table, SubnetId=subnet)["AssociationId"]
    ec2.delete_subnet(SubnetId=subnet)  # EC2 also deletes the route table association of the subnet
    refused("InvalidSubnetID.NotFound", ec2.describe_subnets, SubnetIds=[subnet])
    refused("InvalidAssociationID.NotFound", ec2.disassociate_route_table, AssociationId=link)
    ec2.delete_route_table(RouteTableId=table)
    refused("InvalidRouteTableID.NotFound", ec2.describe_route_tables, RouteTableIds=[table])
    ec2.detach_internet_gateway(InternetGatewayId=gateway, VpcId=vpc)
    refused("Gateway.NotAttached", ec2.detach_internet_gateway, InternetGatewayId=gateway, VpcId=vpc)
    ec2.delete_internet_gateway(InternetGatewayId=gateway)
    refused("InvalidInternetGatewayID.NotFound", ec2.describe_internet_gateways, InternetGatewayIds=[gateway])
    ec2.delete_vpc(VpcId=vpc)
    refused("InvalidVpcID.NotFound", ec2.describe_vpcs, VpcIds=[vpc])
    refused("InvalidVpcID.NotFound", ec2.describe_vpc_attribute, VpcId=vpc, Attribute="enableDnsSupport")
    refused("InvalidVpcID.NotFound", ec2.delete_vpc, VpcId=vpc)
    replay.require_all("ec2")
