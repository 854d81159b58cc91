"""Who acts: the provider the stack is built with, and the role the machine has."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass
from typing import Any

import pulumi
import pulumi_aws as aws
import survey
from credentials import Parameters
from host import metrics
from settings import Settings
from storage import Storage

READ_AND_WRITE = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject")
MULTIPART = ("s3:AbortMultipartUpload", "s3:ListMultipartUploadParts")
OF_A_BUCKET = ("s3:ListBucket", "s3:GetBucketLocation", "s3:ListBucketMultipartUploads")
SESSION_MANAGER = (
    "ssm:UpdateInstanceInformation",
    "ssmmessages:CreateControlChannel",
    "ssmmessages:CreateDataChannel",
    "ssmmessages:OpenControlChannel",
    "ssmmessages:OpenDataChannel",
)
"""What the agent needs for Session Manager and no more: the managed policy would let it read every parameter."""


def provider(config: Settings) -> aws.Provider:
    """The provider with the stack's default tags. Whatever the user set in the namespace `aws:` holds for it too."""
    given: dict[str, Any] = {}
    for name in inspect.signature(aws.ProviderArgs).parameters:
        key = re.sub(r"_([a-z0-9])", lambda match: match[1].upper(), name)
        text = pulumi.Config("aws").get(key)
        if text is not None:
            given[name] = _parsed(text)
    tags = {**given.get("default_tags", {}).get("tags", {}), **survey.identity(config)}
    return aws.Provider("aws", **{**given, "region": config.region, "default_tags": {"tags": tags}})


@dataclass(frozen=True)
class Role:
    profile: aws.iam.InstanceProfile
    ready: list[pulumi.Resource]
    """What must be allowed before the machine boots."""


def role(config: Settings, kept: Storage, parameters: Parameters, opts: pulumi.ResourceOptions) -> Role:
    """The machine's role: its three buckets, its parameters, its metrics, Session Manager."""
    machine = aws.iam.Role(
        "server",
        description="MLflow server: its own buckets and parameters, Session Manager",
        assume_role_policy=json.dumps(
            {
                "Version": "2012-10-17",
                "Statement": [
                    {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
                ],
            }
        ),
        opts=opts,
    )
    policy = aws.iam.RolePolicy(
        "server",
        role=machine.name,
        policy=pulumi.Output.json_dumps(machine_policy(config, kept, parameters)),
        opts=opts,
    )
    profile = aws.iam.InstanceProfile("server", role=machine.name, opts=opts)
    return Role(profile, [policy])


def machine_policy(config: Settings, kept: Storage, parameters: Parameters) -> dict[str, Any]:
    """What the machine may do. In the backups bucket a delete only hides an object: its versions stay out of reach."""
    buckets = [bucket.arn for bucket in kept.buckets.values()]
    read = [each.arn for each in (parameters.credentials, parameters.reader) if each]
    publish = [
        {"Sid": "Authority", "Effect": "Allow", "Action": "ssm:PutParameter", "Resource": authority.arn}
        for authority in [parameters.authority]
        if authority
    ]
    return {
        "Version": "2012-10-17",
        "Statement": [
            {"Sid": "Buckets", "Effect": "Allow", "Action": list(OF_A_BUCKET), "Resource": buckets},
            {
                "Sid": "Objects",
                "Effect": "Allow",
                "Action": [*READ_AND_WRITE, *MULTIPART],
                "Resource": [pulumi.Output.concat(arn, "/*") for arn in buckets],
            },
            {
                "Sid": "Credentials",
                "Effect": "Allow",
                "Action": "ssm:GetParameter",
                "Resource": read,
            },
            *publish,
            {
                "Sid": "Metrics",
                "Effect": "Allow",
                "Action": "cloudwatch:PutMetricData",
                # It knows no resources.
                "Resource": "*",
                "Condition": {"StringEquals": {"cloudwatch:namespace": metrics.namespace(config.stack)}},
            },
            {"Sid": "SessionManager", "Effect": "Allow", "Action": list(SESSION_MANAGER), "Resource": "*"},
        ],
    }


def _parsed(text: str) -> Any:
    """Lists, objects, numbers and truth values arrive from Pulumi as JSON, text as it was set."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
