"""The resource types of S3: buckets and bucket settings. In pulumi-aws 7, each bucket setting is a separate
resource."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from botocore.exceptions import ClientError

from scripts.rehearsal.resource_types import Aws, Kind, physical_name
from scripts.rehearsal.resources.tags import as_list
from scripts.rehearsal.wire import Props

ABSENT = {
    "404",
    "NoSuchBucket",
    "NoSuchBucketPolicy",
    "NoSuchLifecycleConfiguration",
    "NoSuchPublicAccessBlockConfiguration",
    "NoSuchTagSet",
    "OwnershipControlsNotFoundError",
    "ServerSideEncryptionConfigurationNotFoundError",
}


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _create_bucket(aws: Aws, inputs: Props) -> str:
    client = aws.client("s3")
    name = inputs["bucket"]
    where = {} if aws.region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": aws.region}}
    client.create_bucket(Bucket=name, **where)
    if inputs.get("tagsAll"):
        _tag_bucket(aws, name, inputs["tagsAll"])
    return str(name)


def _tag_bucket(aws: Aws, name: str, tags: Props) -> None:
    aws.client("s3").put_bucket_tagging(Bucket=name, Tagging={"TagSet": as_list(tags)})


def _read_bucket(aws: Aws, id_: str, inputs: Props) -> Props | None:
    try:
        aws.client("s3").head_bucket(Bucket=id_)
    except ClientError as error:
        if _code(error) in ABSENT:
            return None
        raise
    return {
        "arn": f"arn:aws:s3:::{id_}",
        "bucket": id_,
        "bucketDomainName": f"{id_}.s3.amazonaws.com",
        "bucketRegionalDomainName": f"{id_}.s3.{aws.region}.amazonaws.com",
        "region": aws.region,
    }


def _update_bucket(aws: Aws, id_: str, old: Props, new: Props) -> None:
    if old.get("tagsAll") != new.get("tagsAll"):
        _tag_bucket(aws, id_, new.get("tagsAll", {}))


def _delete_bucket(aws: Aws, id_: str, inputs: Props) -> None:
    aws.client("s3").delete_bucket(Bucket=id_)


def _part(
    put: Callable[[Any, str, Props], None],
    get: str,
    remove: Callable[[Any, str], None] | None,
) -> Kind:
    """Return the resource type of a bucket setting. The bucket's name is the ID of each resource of this type."""

    def apply(aws: Aws, inputs: Props) -> str:
        bucket = str(inputs["bucket"])
        put(aws.client("s3"), bucket, inputs)
        return bucket

    def read(aws: Aws, id_: str, inputs: Props) -> Props | None:
        try:
            getattr(aws.client("s3"), get)(Bucket=id_)
        except ClientError as error:
            if _code(error) in ABSENT:
                return None
            raise
        return {}

    def update(aws: Aws, id_: str, old: Props, new: Props) -> None:
        apply(aws, new)

    def delete(aws: Aws, id_: str, inputs: Props) -> None:
        if remove is None:
            return
        try:
            remove(aws.client("s3"), id_)
        except ClientError as error:
            if _code(error) not in ABSENT:
                raise

    return Kind(
        create=apply,
        read=read,
        update=update,
        delete=delete,
        recover=apply,
        replace_on=frozenset({"bucket", "expectedBucketOwner"}),
    )


def _put_versioning(client: Any, bucket: str, inputs: Props) -> None:
    status = inputs["versioningConfiguration"]["status"]
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": status})


def _suspend_versioning(client: Any, bucket: str) -> None:
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Suspended"})


def _put_encryption(client: Any, bucket: str, inputs: Props) -> None:
    rules = []
    for rule in inputs["rules"]:
        default = rule.get("applyServerSideEncryptionByDefault", {})
        entry: Props = {"BucketKeyEnabled": bool(rule.get("bucketKeyEnabled"))}
        if default:
            entry["ApplyServerSideEncryptionByDefault"] = {"SSEAlgorithm": default["sseAlgorithm"]} | (
                {"KMSMasterKeyID": default["kmsMasterKeyId"]} if default.get("kmsMasterKeyId") else {}
            )
        rules.append(entry)
    client.put_bucket_encryption(Bucket=bucket, ServerSideEncryptionConfiguration={"Rules": rules})


def _put_public_access_block(client: Any, bucket: str, inputs: Props) -> None:
    names = ["blockPublicAcls", "ignorePublicAcls", "blockPublicPolicy", "restrictPublicBuckets"]
    client.put_public_access_block(
        Bucket=bucket,
        PublicAccessBlockConfiguration={name[0].upper() + name[1:]: bool(inputs.get(name)) for name in names},
    )


def _put_ownership(client: Any, bucket: str, inputs: Props) -> None:
    client.put_bucket_ownership_controls(
        Bucket=bucket, OwnershipControls={"Rules": [{"ObjectOwnership": inputs["rule"]["objectOwnership"]}]}
    )


def lifecycle_rule(rule: Props) -> Props:
    """Convert a rule of BucketLifecycleConfiguration to the format of PutBucketLifecycleConfiguration."""
    made: Props = {"ID": rule["id"], "Status": rule["status"], "Filter": _lifecycle_filter(rule.get("filter", {}))}
    if upload := rule.get("abortIncompleteMultipartUpload"):
        made["AbortIncompleteMultipartUpload"] = {"DaysAfterInitiation": upload["daysAfterInitiation"]}
    if expiration := rule.get("expiration"):
        made["Expiration"] = _capitalised(expiration, {"days", "date", "expiredObjectDeleteMarker"})
    if old := rule.get("noncurrentVersionExpiration"):
        made["NoncurrentVersionExpiration"] = _capitalised(old, {"noncurrentDays", "newerNoncurrentVersions"})
    if transitions := rule.get("transitions"):
        made["Transitions"] = [_capitalised(each, {"days", "date", "storageClass"}) for each in transitions]
    if moves := rule.get("noncurrentVersionTransitions"):
        known = {"noncurrentDays", "newerNoncurrentVersions", "storageClass"}
        made["NoncurrentVersionTransitions"] = [_capitalised(each, known) for each in moves]
    return made


def _lifecycle_filter(filter_: Props) -> Props:
    if "and" in filter_:
        both = filter_["and"]
        return {"And": {"Prefix": both.get("prefix", ""), "Tags": as_list(both.get("tags", {}))}}
    if "tag" in filter_:
        return {"Tag": {"Key": filter_["tag"]["key"], "Value": filter_["tag"]["value"]}}
    return {"Prefix": filter_.get("prefix", "")}


def _capitalised(values: Props, known: set[str]) -> Props:
    return {name[0].upper() + name[1:]: value for name, value in values.items() if name in known}


def _put_lifecycle(client: Any, bucket: str, inputs: Props) -> None:
    rules = [lifecycle_rule(rule) for rule in inputs["rules"]]
    client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": rules})


def _put_policy(client: Any, bucket: str, inputs: Props) -> None:
    client.put_bucket_policy(Bucket=bucket, Policy=inputs["policy"])


KINDS = {
    "aws:s3/bucket:Bucket": Kind(
        create=_create_bucket,
        read=_read_bucket,
        update=_update_bucket,
        delete=_delete_bucket,
        recover=lambda aws, inputs: inputs["bucket"] if _read_bucket(aws, inputs["bucket"], inputs) else None,
        replace_on=frozenset({"bucket", "bucketPrefix", "objectLockEnabled", "region"}),
        generate={"bucket": lambda logical, inputs: physical_name(logical, inputs).lower()},
        tagged=True,
    ),
    "aws:s3/bucketVersioning:BucketVersioning": _part(_put_versioning, "get_bucket_versioning", _suspend_versioning),
    "aws:s3/bucketServerSideEncryptionConfiguration:BucketServerSideEncryptionConfiguration": _part(
        _put_encryption,
        "get_bucket_encryption",
        lambda client, bucket: client.delete_bucket_encryption(Bucket=bucket),
    ),
    "aws:s3/bucketPublicAccessBlock:BucketPublicAccessBlock": _part(
        _put_public_access_block,
        "get_public_access_block",
        lambda client, bucket: client.delete_public_access_block(Bucket=bucket),
    ),
    "aws:s3/bucketOwnershipControls:BucketOwnershipControls": _part(
        _put_ownership,
        "get_bucket_ownership_controls",
        lambda client, bucket: client.delete_bucket_ownership_controls(Bucket=bucket),
    ),
    "aws:s3/bucketLifecycleConfiguration:BucketLifecycleConfiguration": _part(
        _put_lifecycle,
        "get_bucket_lifecycle_configuration",
        lambda client, bucket: client.delete_bucket_lifecycle(Bucket=bucket),
    ),
    "aws:s3/bucketPolicy:BucketPolicy": _part(
        _put_policy, "get_bucket_policy", lambda client, bucket: client.delete_bucket_policy(Bucket=bucket)
    ),
}
