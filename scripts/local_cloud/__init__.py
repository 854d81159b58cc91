"""The local cloud: EC2, S3 and the other AWS services that this project uses, on one machine.

moto implements the AWS APIs. EC2 instances are systemd machines in containers, and S3 is an object store. Packer,
Pulumi, boto3 and the machines need no special code for the local cloud, and only need other AWS endpoint URLs.

    from scripts.local_cloud import LocalCloud
    cloud = LocalCloud()
    cloud.up()
    cloud.client("ec2").run_instances(ImageId=cloud.source_ami(), …)
"""

from scripts.local_cloud.cloud import LocalCloud
from scripts.local_cloud.layout import LocalCloudError

__all__ = ["LocalCloud", "LocalCloudError"]
