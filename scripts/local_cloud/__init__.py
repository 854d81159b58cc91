"""The embedded cloud: EC2, S3 and the other AWS services that this project uses, on one machine.

moto implements the AWS APIs; EC2 instances are real systemd machines, S3 is a real object store. No code outside this
package depends on it: Packer, Pulumi, boto3 and the machines use it like any other AWS endpoint.

    from scripts.local_cloud import LocalCloud
    cloud = LocalCloud()
    cloud.up()
    cloud.client("ec2").run_instances(ImageId=cloud.source_ami(), …)
"""

from scripts.local_cloud.cloud import LocalCloud
from scripts.local_cloud.layout import LocalCloudError

__all__ = ["LocalCloud", "LocalCloudError"]
