"""What outlives every machine: three buckets and the data volume. All of it is protected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pulumi
import pulumi_aws as aws
import survey
from settings import Settings

UPLOAD_DAYS = 7
"""Days after which S3 drops the parts of an upload nobody finished."""


@dataclass(frozen=True)
class Storage:
    artifacts: aws.s3.Bucket
    models: aws.s3.Bucket
    backups: aws.s3.Bucket
    volume: aws.ebs.Volume
    """PostgreSQL's cluster, and in the tags the record of the image that owns it from now on."""
    ready: list[pulumi.Resource]
    """What must hold before the machine writes its first object."""

    @property
    def buckets(self) -> dict[str, aws.s3.Bucket]:
        return {"artifacts": self.artifacts, "models": self.models, "backups": self.backups}


def build(config: Settings, found: survey.Survey, opts: pulumi.ResourceOptions) -> Storage:
    """Buckets that are versioned, encrypted, private and TLS only, and the data volume."""
    ready: list[pulumi.Resource] = []
    artifacts, models, backups = (
        _bucket(f"mlflow-{name}", config.backup_retention_days, ready, opts)
        for name in ("artifacts", "models", "backups")
    )
    volume = aws.ebs.Volume(
        "data",
        availability_zone=found.zones[0],
        size=config.data_volume_gib,
        type="gp3",
        encrypted=True,
        tags={
            "Name": f"{config.title}-data",
            "mlflow-ami:role": survey.ROLE_OF_DATA_VOLUME,
            **survey.record(found.image),
        },
        opts=_protected(opts),
    )
    return Storage(artifacts, models, backups, volume, ready)


def _bucket(
    name: str, retention_days: int, ready: list[pulumi.Resource], opts: pulumi.ResourceOptions
) -> aws.s3.Bucket:
    bucket = aws.s3.Bucket(name, opts=_protected(opts))
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
        # S3 refuses two changes of a bucket's access at the same time.
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
    """The bucket policy that refuses every request without TLS 1.2 or newer, whoever makes it."""
    resources = [bucket.arn, pulumi.Output.concat(bucket.arn, "/*")]
    denied = {"Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": resources}
    return {
        "Version": "2012-10-17",
        "Statement": [
            {"Sid": "OnlyTls", **denied, "Condition": {"Bool": {"aws:SecureTransport": "false"}}},
            {"Sid": "OnlyCurrentTls", **denied, "Condition": {"NumericLessThan": {"s3:TlsVersion": "1.2"}}},
        ],
    }


def _protected(opts: pulumi.ResourceOptions) -> pulumi.ResourceOptions:
    return pulumi.ResourceOptions.merge(opts, pulumi.ResourceOptions(protect=True))


def _after(opts: pulumi.ResourceOptions, *resources: pulumi.Resource) -> pulumi.ResourceOptions:
    return pulumi.ResourceOptions.merge(opts, pulumi.ResourceOptions(depends_on=list(resources)))
