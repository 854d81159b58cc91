"""The three buckets and the data volume, which outlive machines. Pulumi protects these resources from deletion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pulumi
import pulumi_aws as aws

import backups
import lost_state
import preflight
from settings import Settings

UPLOAD_DAYS = 7
"""Days after which S3 deletes the parts of an unfinished upload."""
ELSEWHERE = ["lifecycleRules", "policy", "serverSideEncryptionConfiguration", "versioning"]
"""Bucket properties that other Pulumi resources manage. The bucket resource ignores these properties, because `pulumi
up` would otherwise remove values that `pulumi refresh` has read into the bucket's state (pulumi/pulumi-aws#6244)."""
NAME_ONCE_GIVEN = ["bucket"]
"""Pulumi keeps the name of an imported bucket, instead of choosing a new name and replacing the bucket."""


@dataclass(frozen=True)
class Storage:
    artifacts: aws.s3.Bucket
    models: aws.s3.Bucket
    backups: aws.s3.Bucket
    volume: aws.ebs.Volume
    """The volume with PostgreSQL's cluster. The volume's tags contain facts of the image of the last `pulumi up`."""
    ready: list[pulumi.Resource]
    """The bucket settings that must be in effect before the machine writes its first object."""
    restore_from: pulumi.Output[str]
    """The backup to restore at the next boot, after the check that the backups bucket contains it."""

    @property
    def buckets(self) -> dict[str, aws.s3.Bucket]:
        return {"artifacts": self.artifacts, "models": self.models, "backups": self.backups}


def build(config: Settings, found: preflight.Existing, opts: pulumi.ResourceOptions) -> Storage:
    """Create the data volume, and three buckets that are versioned, encrypted, private and reachable by TLS only."""
    ready: list[pulumi.Resource] = []
    buckets = {name: _bucket(f"mlflow-{name}", config.backup_retention_days, ready, opts) for name in preflight.BUCKETS}
    restore_from = backups.restore_from(config, found, buckets["backups"].bucket, opts)
    restored = {"mlflow-ami:restore-from": restore_from} if config.restore_from else {}
    volume = aws.ebs.Volume(
        "data",
        availability_zone=found.zones[0],
        size=config.data_volume_gib,
        type="gp3",
        encrypted=True,
        tags={
            "Name": f"{config.title}-data",
            "mlflow-ami:role": preflight.ROLE_OF_DATA_VOLUME,
            **preflight.record(found.image),
            **{f"mlflow-ami:bucket-{name}": bucket.bucket for name, bucket in buckets.items()},
            **restored,
        },
        opts=_protected(opts, hooks=lost_state.refuse_second_volume(config, found)),
    )
    return Storage(**buckets, volume=volume, ready=ready, restore_from=restore_from)


def _bucket(
    name: str, retention_days: int, ready: list[pulumi.Resource], opts: pulumi.ResourceOptions
) -> aws.s3.Bucket:
    bucket = aws.s3.Bucket(name, opts=_protected(opts, ignore_changes=[*ELSEWHERE, *NAME_ONCE_GIVEN]))
    ownership = aws.s3.BucketOwnershipControls(
        name, bucket=bucket.id, rule={"object_ownership": "BucketOwnerEnforced"}, opts=opts
    )
    private = aws.s3.BucketPublicAccessBlock(
        name,
        bucket=bucket.id,
        block_public_acls=True,
        block_public_policy=True,
        ignore_public_acls=True,
        restrict_public_buckets=True,
        opts=opts,
    )
    encryption = aws.s3.BucketServerSideEncryptionConfiguration(
        name,
        bucket=bucket.id,
        rules=[{"apply_server_side_encryption_by_default": {"sse_algorithm": "AES256"}}],
        opts=opts,
    )
    versioning = aws.s3.BucketVersioning(
        name, bucket=bucket.id, versioning_configuration={"status": "Enabled"}, opts=opts
    )
    policy = aws.s3.BucketPolicy(
        name,
        bucket=bucket.id,
        policy=pulumi.Output.json_dumps(tls_only(bucket)),
        # S3 refuses two concurrent changes to a bucket's access settings.
        opts=_after(opts, private),
    )
    lifecycle = aws.s3.BucketLifecycleConfiguration(
        name,
        bucket=bucket.id,
        rules=[
            {
                "id": "old-versions",
                "status": "Enabled",
                "filter": {"prefix": ""},
                "noncurrent_version_expiration": {"noncurrent_days": retention_days},
                "expiration": {"expired_object_delete_marker": True},
            },
            {
                "id": "unfinished-uploads",
                "status": "Enabled",
                "filter": {"prefix": ""},
                "abort_incomplete_multipart_upload": {"days_after_initiation": UPLOAD_DAYS},
            },
        ],
        opts=_after(opts, versioning),
    )
    ready += [ownership, private, encryption, versioning, policy, lifecycle]
    return bucket


def tls_only(bucket: aws.s3.Bucket) -> dict[str, Any]:
    """A bucket policy that denies all requests without TLS 1.2 or newer."""
    resources = [bucket.arn, pulumi.Output.concat(bucket.arn, "/*")]
    denied = {"Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": resources}
    return {
        "Version": "2012-10-17",
        "Statement": [
            {"Sid": "OnlyTls", **denied, "Condition": {"Bool": {"aws:SecureTransport": "false"}}},
            {"Sid": "OnlyCurrentTls", **denied, "Condition": {"NumericLessThan": {"s3:TlsVersion": "1.2"}}},
        ],
    }


def _protected(opts: pulumi.ResourceOptions, **more: Any) -> pulumi.ResourceOptions:
    return pulumi.ResourceOptions.merge(opts, pulumi.ResourceOptions(protect=True, **more))


def _after(opts: pulumi.ResourceOptions, *resources: pulumi.Resource) -> pulumi.ResourceOptions:
    return pulumi.ResourceOptions.merge(opts, pulumi.ResourceOptions(depends_on=list(resources)))
