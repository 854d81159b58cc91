"""The embedded cloud: EC2, S3 and the rest of AWS that this project touches, on one machine.

moto answers the AWS APIs; behind EC2 stand real systemd machines, behind S3 a real object store. Nothing outside this
package knows it exists: to Packer, Pulumi, boto3 and the machines it is an AWS endpoint like any other.

    from local_cloud import LocalCloud
    cloud = LocalCloud()
    cloud.up()
    cloud.client("ec2").run_instances(ImageId=cloud.source_ami(), …)
"""

from local_cloud.cloud import LocalCloud
from local_cloud.state import LocalCloudError

__all__ = ["LocalCloud", "LocalCloudError"]
