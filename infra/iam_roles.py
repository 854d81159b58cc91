"""The IAM roles of the machine and of MLflow's processes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pulumi
import pulumi_aws as aws

from contract import alarms, audit_trail
from credentials import Parameters
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
"""The permissions of Session Manager's agent. AWS's managed policy for this agent is not used, because it also allows
reading all parameters."""


@dataclass(frozen=True)
class Role:
    profile: aws.iam.InstanceProfile
    mlflow: aws.iam.Role
    """The role of MLflow's processes."""
    ready: list[pulumi.Resource]
    """The policies that must exist before the machine boots."""


def role(
    config: Settings,
    kept: Storage,
    parameters: Parameters,
    logs: aws.cloudwatch.LogGroup | None,
    opts: pulumi.ResourceOptions,
) -> Role:
    """Create two roles. The machine's role can access the stack's buckets and parameters, CloudWatch metrics and logs,
    and Session Manager. The role of MLflow's processes can access only objects of two buckets. Only the machine's role
    may assume the role of MLflow."""
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
    mlflow = aws.iam.Role(
        "mlflow",
        description="MLflow's processes on the server: objects of the artifacts and models buckets",
        assume_role_policy=pulumi.Output.json_dumps(
            {
                "Version": "2012-10-17",
                "Statement": [{"Effect": "Allow", "Principal": {"AWS": machine.arn}, "Action": "sts:AssumeRole"}],
            }
        ),
        opts=opts,
    )
    policy = aws.iam.RolePolicy(
        "server",
        role=machine.name,
        policy=pulumi.Output.json_dumps(machine_policy(config, kept, parameters, mlflow, logs)),
        opts=opts,
    )
    mlflow_policy = aws.iam.RolePolicy(
        "mlflow",
        role=mlflow.name,
        policy=pulumi.Output.json_dumps(
            {"Version": "2012-10-17", "Statement": objects_of(kept.buckets["artifacts"], kept.buckets["models"])}
        ),
        opts=opts,
    )
    profile = aws.iam.InstanceProfile("server", role=machine.name, opts=opts)
    return Role(profile, mlflow, [policy, mlflow_policy])


def objects_of(*buckets: aws.s3.Bucket) -> list[dict[str, Any]]:
    """Statements that allow reading and writing objects in these buckets, without access to old versions."""
    arns = [bucket.arn for bucket in buckets]
    return [
        {"Sid": "Buckets", "Effect": "Allow", "Action": list(OF_A_BUCKET), "Resource": arns},
        {
            "Sid": "Objects",
            "Effect": "Allow",
            "Action": [*READ_AND_WRITE, *MULTIPART],
            "Resource": [pulumi.Output.concat(arn, "/*") for arn in arns],
        },
    ]


def added_only(backups: aws.s3.Bucket) -> list[dict[str, Any]]:
    """Statements for the audit trail: objects below its prefix can be added, but never replaced or deleted. The first
    statement requires the header `If-None-Match: *` for every PutObject, so that S3 refuses to replace an object."""
    below = pulumi.Output.concat(backups.arn, "/", audit_trail.PREFIX, "*")
    return [
        {
            "Sid": "AddToAuditTrail",
            "Effect": "Deny",
            "Action": "s3:PutObject",
            "Resource": [below],
            "Condition": {"StringNotEquals": {"s3:if-none-match": "*"}},
        },
        {"Sid": "KeepAuditTrail", "Effect": "Deny", "Action": "s3:DeleteObject", "Resource": [below]},
    ]


def machine_policy(
    config: Settings, kept: Storage, parameters: Parameters, mlflow: aws.iam.Role, logs: aws.cloudwatch.LogGroup | None
) -> dict[str, Any]:
    """The machine's permissions. In the backups bucket, the machine's role can overwrite and hide objects, but cannot
    delete old versions. In the audit trail, the machine's role cannot replace or hide objects. In the log group, the
    machine's role can only add lines."""
    read = [each.arn for each in (parameters.credentials, parameters.reader) if each]
    publish = [
        {"Sid": sid, "Effect": "Allow", "Action": "ssm:PutParameter", "Resource": parameter.arn}
        for sid, parameter in {"Authority": parameters.authority, "InService": parameters.in_service}.items()
        if parameter
    ]
    added = [
        {
            "Sid": "Logs",
            "Effect": "Allow",
            "Action": ["logs:CreateLogStream", "logs:PutLogEvents"],
            # These two actions need the ARN of the group's streams, which ends in ":*".
            "Resource": pulumi.Output.concat(group.arn, ":*"),
        }
        for group in (logs,)
        if group
    ]
    return {
        "Version": "2012-10-17",
        "Statement": [
            *objects_of(*kept.buckets.values()),
            *added_only(kept.buckets["backups"]),
            {"Sid": "ActAsMlflow", "Effect": "Allow", "Action": "sts:AssumeRole", "Resource": mlflow.arn},
            {
                "Sid": "Credentials",
                "Effect": "Allow",
                "Action": "ssm:GetParameter",
                "Resource": read,
            },
            *publish,
            *added,
            {
                "Sid": "Metrics",
                "Effect": "Allow",
                "Action": "cloudwatch:PutMetricData",
                # PutMetricData supports no resource-level permissions.
                "Resource": "*",
                "Condition": {"StringEquals": {"cloudwatch:namespace": alarms.namespace(config.stack)}},
            },
            {"Sid": "SessionManager", "Effect": "Allow", "Action": list(SESSION_MANAGER), "Resource": "*"},
        ],
    }
