"""README's IAM policy for an operator who bakes and launches allows all recorded calls, and no unused action."""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROVIDER_CALLS = ROOT / "tests/local_cloud/provider_calls.tsv"
"""Calls that the Terraform AWS provider inside pulumi-aws makes to launch, change and destroy this stack."""

BAKE = {
    "ec2:AuthorizeSecurityGroupIngress", "ec2:CreateImage", "ec2:CreateKeyPair", "ec2:CreateSecurityGroup",
    "ec2:CreateTags", "ec2:DeleteKeyPair", "ec2:DeleteSecurityGroup", "ec2:DeleteSnapshot", "ec2:DeregisterImage",
    "ec2:DescribeImages", "ec2:DescribeInstanceTypeOfferings", "ec2:DescribeInstances", "ec2:DescribeKeyPairs",
    "ec2:DescribeRegions", "ec2:DescribeSecurityGroups", "ec2:DescribeSnapshots", "ec2:DescribeSubnets",
    "ec2:DescribeVolumes", "ec2:DescribeVpcs", "ec2:ModifyImageAttribute", "ec2:ModifyInstanceAttribute",
    "ec2:ModifyInstanceMetadataOptions", "ec2:RunInstances", "ec2:StopInstances", "ec2:TerminateInstances",
    "ssm:DeleteParameters", "ssm:GetParametersByPath", "ssm:PutParameter",
}  # fmt: skip
"""Calls of Packer (1.6 and 1.16), bake.py and images.py. tests/image/test_aws_calls_of_a_bake.py checks this list."""

LATER = {
    "ec2:DeleteTags": "a tag that was removed from aws:defaultTags",
    "iam:UntagInstanceProfile": "the same",
    "iam:UntagRole": "the same",
    "cloudwatch:UntagResource": "the same",
    "ssm:RemoveTagsFromResource": "the same",
    "s3:UntagResource": "the same",
    "s3:TagResource": "tags of buckets, by version 6 of the provider, which pulumi-aws 7 has",
    "s3:ListTagsForResource": "the same",
    "iam:CreateServiceLinkedRole": "the role by which CloudWatch reboots the machine, once per account",
    **dict.fromkeys(
        ("cloudwatch:DeleteDashboards", "cloudwatch:GetDashboard", "cloudwatch:PutDashboard"),
        "the setting dashboard, which was recorded without; by the provider's source, dashboard.go",
    ),
    **dict.fromkeys(
        ("logs:CreateLogGroup", "logs:DeleteLogGroup", "logs:DescribeLogGroups", "logs:ListTagsForResource",
         "logs:PutRetentionPolicy", "logs:TagResource", "logs:UntagResource"),
        "the setting logRetentionDays, which was recorded without; by the provider's source, group.go",
    ),
    "ec2:StartInstances": "another instanceType: the machine is stopped, changed and started",
    "ec2:ModifySecurityGroupRules": "another description of a rule",
    "ec2:ModifyVpcEndpoint": "another route table of the S3 endpoint",
    "ec2:ReplaceRouteTableAssociation": "another route table of a subnet",
    "iam:UpdateRoleDescription": "a release with another description of the role",
    "iam:UpdateAssumeRolePolicy": "a release that changes who can assume the role",
    "iam:PassRole": "RunInstances with an instance profile",
    "ssm:GetParametersByPath": "preview looks up the stack's parameters; the recorded provider did not yet",
    "ssm:StartSession": "a shell on the machine, by `pulumi stack output shell`",
    "s3:DeleteObject": "a stack's buckets are emptied before they can be deleted",
    "s3:DeleteObjectVersion": "the same",
    "s3:ListBucketVersions": "the same",
}  # fmt: skip
"""Actions in the policy that do not occur in the recorded calls, and the purpose of each action."""

S3 = {
    "GET bucket?accelerate": "s3:GetAccelerateConfiguration",
    "GET bucket?acl": "s3:GetBucketAcl",
    "GET bucket?cors": "s3:GetBucketCORS",
    "GET bucket?encryption": "s3:GetEncryptionConfiguration",
    "GET bucket?lifecycle": "s3:GetLifecycleConfiguration",
    "GET bucket?logging": "s3:GetBucketLogging",
    "GET bucket?object-lock": "s3:GetBucketObjectLockConfiguration",
    "GET bucket?ownershipControls": "s3:GetBucketOwnershipControls",
    "GET bucket?policy": "s3:GetBucketPolicy",
    "GET bucket?publicAccessBlock": "s3:GetBucketPublicAccessBlock",
    "GET bucket?replication": "s3:GetReplicationConfiguration",
    "GET bucket?requestPayment": "s3:GetBucketRequestPayment",
    "GET bucket?tagging": "s3:GetBucketTagging",
    "GET bucket?versioning": "s3:GetBucketVersioning",
    "GET bucket?website": "s3:GetBucketWebsite",
    "HEAD bucket": "s3:ListBucket",
    "PUT bucket": "s3:CreateBucket",
    "PUT bucket?encryption": "s3:PutEncryptionConfiguration",
    "PUT bucket?lifecycle": "s3:PutLifecycleConfiguration",
    "PUT bucket?ownershipControls": "s3:PutBucketOwnershipControls",
    "PUT bucket?policy": "s3:PutBucketPolicy",
    "PUT bucket?publicAccessBlock": "s3:PutBucketPublicAccessBlock",
    "PUT bucket?tagging": "s3:PutBucketTagging",
    "PUT bucket?versioning": "s3:PutBucketVersioning",
    "DELETE bucket": "s3:DeleteBucket",
    "DELETE bucket?encryption": "s3:PutEncryptionConfiguration",
    "DELETE bucket?lifecycle": "s3:PutLifecycleConfiguration",
    "DELETE bucket?ownershipControls": "s3:PutBucketOwnershipControls",
    "DELETE bucket?policy": "s3:DeleteBucketPolicy",
    "DELETE bucket?publicAccessBlock": "s3:PutBucketPublicAccessBlock",
}
"""Call of S3 → the action that this call needs, as listed in AWS's Service Authorization Reference."""
NO_RIGHT_NEEDED = {"sts:GetCallerIdentity"}

STATEMENTS = {
    "LaunchNetworkAndMachine": ("ec2",),
    "LaunchBuckets": ("s3",),
    "LaunchAlarm": ("cloudwatch",),
    "LaunchLogs": ("logs",),
    "LaunchRoleAndSecret": ("iam", "ssm"),
}
"""Statement of the policy → the only services whose actions the statement may allow."""


@pytest.fixture(scope="module")
def policy() -> dict[str, list[str]]:
    """Return the actions of each statement of the IAM policy in infra/README.md."""
    text = (ROOT / "infra" / "README.md").read_text().split("<summary>IAM policy</summary>")[1]
    found: Any = json.loads(re.findall(r"```json\n(.*?)```", text, re.S)[0])
    assert all(each["Effect"] == "Allow" for each in found["Statement"])
    return {each["Sid"]: each["Action"] for each in found["Statement"]}


def launch() -> set[str]:
    """Return the actions that the recorded calls of the provider need."""
    lines = [line.split("\t") for line in PROVIDER_CALLS.read_text().splitlines() if not line.startswith("#")]
    calls = {(service, action) for service, action, *_ in lines[1:]}
    prefixes = {"monitoring": "cloudwatch"}
    needed = {
        S3[action] if service == "s3" else f"{prefixes.get(service, service)}:{action}" for service, action in calls
    }
    return needed - NO_RIGHT_NEEDED


def allows(actions: list[str], action: str) -> bool:
    return any(fnmatch.fnmatchcase(action, pattern) for pattern in actions)


def test_each_launch_statement_allows_the_providers_calls_of_its_services(policy: dict[str, list[str]]) -> None:
    needed = launch() | LATER.keys()
    assert len(needed) > 100
    for sid, services in STATEMENTS.items():
        missing = {each for each in needed if each.split(":")[0] in services and not allows(policy[sid], each)}
        assert missing == set(), sid
    assert {each.split(":")[0] for each in needed} == {service for names in STATEMENTS.values() for service in names}


def test_bake_statement_allows_the_calls_of_a_bake(policy: dict[str, list[str]]) -> None:
    assert {each for each in BAKE if not allows(policy["Bake"], each)} == set()


def test_policy_allows_no_unused_call(policy: dict[str, list[str]]) -> None:
    assert set(policy) == {"Bake", "Images", "RecoverBackups", "RetireStack", *STATEMENTS}
    for sid, actions in policy.items():
        if sid == "Images":  # tests/image/test_images_script.py checks the statement "Images"
            continue
        if sid in ("RetireStack", "RecoverBackups"):  # statements for scripts, whose calls are not recorded
            assert {each.split(":")[0] for each in actions} == {"s3"}
            continue
        used = BAKE if sid == "Bake" else launch() | LATER.keys()
        assert [each for each in actions if not fnmatch.filter(used, each)] == [], sid


def test_reasons_are_for_unrecorded_actions() -> None:
    assert launch() & LATER.keys() == set()


def test_actions_are_sorted_and_named_once(policy: dict[str, list[str]]) -> None:
    for sid, actions in policy.items():
        assert actions == sorted(set(actions)), sid
