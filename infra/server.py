"""The machine, its attachments and its DNS record. The machine contains no data, so Pulumi can replace it for a new
image or new user-data."""

from __future__ import annotations

from dataclasses import dataclass

import pulumi
import pulumi_aws as aws

import user_data
from credentials import Parameters
from iam_roles import Role
from network import Network
from preflight import Existing
from settings import Settings
from storage import Storage

DATA_DEVICE = "/dev/sdf"
"""Device name of the attachment. The kernel gives the device another name, so the machine finds the volume by its
ID."""
RECORD_SECONDS = 300


@dataclass(frozen=True)
class Server:
    instance: aws.ec2.Instance
    hostnames: pulumi.Output[list[str]]
    """The server's host names. The server's URL contains the first host name."""


def launch(
    config: Settings,
    found: Existing,
    net: Network,
    kept: Storage,
    parameters: Parameters,
    role: Role,
    opts: pulumi.ResourceOptions,
) -> Server:
    """Create the instance, attach the data volume and the address, and write the DNS record in the hosted zone, if any.

    Pulumi deletes the old instance before it creates the new one, because a volume can be attached to one instance
    only. Pulumi stops the old instance before it detaches the volume and the address. During the stop, the server
    answers the requests that it has accepted, and then PostgreSQL shuts down.
    """
    hostnames = net.address.public_ip.apply(lambda ip: [name for name in (config.domain_name, ip) if name])
    instance = aws.ec2.Instance(
        "server",
        ami=found.image.image_id,
        instance_type=config.instance_type,
        subnet_id=net.subnet.id,
        vpc_security_group_ids=[net.group.id],
        iam_instance_profile=role.profile.name,
        key_name=config.key_name or None,
        user_data=user_data.written(config, found.image, hostnames, kept, parameters, role.mlflow.arn),
        user_data_replace_on_change=True,
        metadata_options={
            "http_endpoint": "enabled",
            "http_tokens": "required",
            "http_put_response_hop_limit": 1,
            "instance_metadata_tags": "disabled",
        },
        root_block_device={
            "volume_type": "gp3",
            "volume_size": config.root_volume_gib or found.image_gib or None,
            "encrypted": True,
            "delete_on_termination": True,
        },
        tags={"Name": config.title},
        opts=_with(
            opts,
            delete_before_replace=True,
            depends_on=[*net.ready, *kept.ready, *role.ready, *parameters.ready],
        ),
    )
    association = aws.ec2.EipAssociation("server", instance_id=instance.id, allocation_id=net.address.id, opts=opts)
    aws.ec2.VolumeAttachment(
        "data",
        instance_id=instance.id,
        volume_id=kept.volume.id,
        device_name=DATA_DEVICE,
        stop_instance_before_detaching=True,
        opts=_with(opts, delete_before_replace=True, depends_on=[association]),
    )
    # The tag stays when the stack launches another image, so that scripts/images.py keeps this image for a rollback.
    aws.ec2.Tag(
        "image",
        resource_id=found.image.image_id,
        key=f"mlflow-ami:stack:{config.stack}",
        value=kept.volume.id,
        opts=_with(opts, retain_on_delete=True, depends_on=[instance]),
    )
    if config.hosted_zone_id:
        aws.route53.Record(
            "server",
            zone_id=config.hosted_zone_id,
            name=config.domain_name,
            type="A",
            ttl=RECORD_SECONDS,
            records=[net.address.public_ip],
            opts=opts,
        )
    return Server(instance, hostnames)


def _with(opts: pulumi.ResourceOptions, **more: object) -> pulumi.ResourceOptions:
    return pulumi.ResourceOptions.merge(opts, pulumi.ResourceOptions(**more))  # type: ignore[arg-type]
