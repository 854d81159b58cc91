"""The resource types the rehearsal can apply, by Pulumi type token."""

from rehearsal.kinds import Kind
from rehearsal.resources import cloudwatch, ec2, iam, local, route53, s3, ssm

KINDS: dict[str, Kind] = {
    **ec2.KINDS,
    **s3.KINDS,
    **iam.KINDS,
    **ssm.KINDS,
    **cloudwatch.KINDS,
    **route53.KINDS,
    **local.KINDS,
}
