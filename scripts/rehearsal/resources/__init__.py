"""The resource types that the rehearsal supports, by Pulumi type token."""

from scripts.rehearsal.resource_types import Kind
from scripts.rehearsal.resources import cloudwatch, ec2, iam, random_provider, route53, s3, ssm

KINDS: dict[str, Kind] = {
    **ec2.KINDS,
    **s3.KINDS,
    **iam.KINDS,
    **ssm.KINDS,
    **cloudwatch.KINDS,
    **route53.KINDS,
    **random_provider.KINDS,
}
