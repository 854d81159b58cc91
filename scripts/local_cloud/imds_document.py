"""Build the metadata of an instance from the instance's record in EC2."""

from __future__ import annotations

import base64
import json
from typing import Any

from scripts.local_cloud.imds_server import Metadata, Tree
from scripts.local_cloud.layout import ACCOUNT
from scripts.local_cloud.roles import Roles


def describe(instance: Any, roles: Roles) -> Metadata:
    """Build the metadata. `instance` is moto's record of the instance. The caller holds the API lock."""
    options = instance.metadata_options
    key = instance.ec2_backend.key_pairs.get(instance.key_name) if instance.key_name else None
    return Metadata(
        tree=_tree(instance, roles),
        identity_document=_identity_document(instance),
        user_data=_user_data(instance),
        public_keys={key.key_name: _text(key.material_public)} if key else {},
        enabled=options.http_endpoint != "disabled",
        tokens=options.http_tokens or "optional",
        hop_limit=options.http_put_response_hop_limit or 1,
    )


def _user_data(instance: Any) -> bytes | None:
    """Decode the user data, because moto stores the user data in Base64, as in the request."""
    data = instance.user_data
    if not data:
        return None
    return base64.b64decode(data if isinstance(data, bytes) else str(data))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _tree(instance: Any, roles: Roles) -> Tree:
    zone = instance.placement.zone
    nic = instance.nics[0]
    groups = sorted(nic.group_set, key=lambda group: str(group.id))
    tree: dict[str, Any] = {
        "ami-id": instance.image_id,
        "ami-launch-index": str(instance.ami_launch_index),
        "ami-manifest-path": "(unknown)",
        "block-device-mapping": _block_devices(instance),
        "hostname": instance.private_dns_name,
        "instance-action": "none",
        "instance-id": instance.id,
        "instance-life-cycle": "on-demand",
        "instance-type": instance.instance_type,
        "local-hostname": instance.private_dns_name,
        "local-ipv4": instance.private_ip,
        "mac": nic.mac_address,
        "network": {"interfaces": {"macs": {nic.mac_address: _interface(instance, nic, groups)}}},
        "placement": {"availability-zone": zone, "region": instance.ec2_backend.region_name},
        "profile": "default-hvm",
        "reservation-id": _reservation(instance),
        "security-groups": "\n".join(group.name for group in groups),
        "services": {"domain": "amazonaws.com", "partition": "aws"},
    }
    if instance.public_ip:
        tree["public-ipv4"] = instance.public_ip
        tree["public-hostname"] = instance.public_dns_name
    if iam := _iam(instance, roles):
        tree["iam"] = iam
    if instance.metadata_options.instance_metadata_tags == "enabled":
        tree["tags"] = {"instance": {tag["key"]: tag["value"] for tag in instance.get_tags()}}
    return tree


def _block_devices(instance: Any) -> dict[str, str]:
    root = instance.root_device_name
    devices = {"ami": root, "root": root}
    others = sorted(device for device, _ in instance.get_block_device_mapping if device != root)
    return devices | {f"ebs{index}": device for index, device in enumerate(others, start=1)}


def _interface(instance: Any, nic: Any, groups: list[Any]) -> dict[str, str]:
    vpc = instance.ec2_backend.get_vpc(nic.vpc_id)
    facts = {
        "device-number": str(nic.device_index),
        "interface-id": nic.id,
        "local-hostname": instance.private_dns_name,
        "local-ipv4s": nic.private_ip_address,
        "mac": nic.mac_address,
        "owner-id": ACCOUNT,
        "security-group-ids": "\n".join(group.id for group in groups),
        "security-groups": "\n".join(group.name for group in groups),
        "subnet-id": nic.subnet.id,
        "subnet-ipv4-cidr-block": nic.subnet.cidr_block,
        "vpc-id": nic.vpc_id,
        "vpc-ipv4-cidr-block": vpc.cidr_block,
        "vpc-ipv4-cidr-blocks": vpc.cidr_block,
    }
    if nic.public_ip:
        facts |= {"public-ipv4s": nic.public_ip, "public-hostname": instance.public_dns_name}
    return facts


def _reservation(instance: Any) -> str:
    for reservation in instance.ec2_backend.reservations.values():
        if instance in reservation.instances:
            return str(reservation.id)
    return ""


def _iam(instance: Any, roles: Roles) -> Tree | None:
    association = instance.ec2_backend.iam_instance_profile_associations.get(instance.id)
    if association is None:
        return None
    profile = association.iam_instance_profile
    info = {"Code": "Success", "InstanceProfileArn": profile.arn, "InstanceProfileId": profile.id}
    return {
        "info": json.dumps(info, indent=2),
        "security-credentials": {
            role.name: json.dumps(roles.credentials(instance.id, role), indent=2) for role in profile.roles
        },
    }


def _identity_document(instance: Any) -> dict[str, Any]:
    return {
        "accountId": ACCOUNT,
        "architecture": instance.architecture or "x86_64",
        "availabilityZone": instance.placement.zone,
        "billingProducts": None,
        "devpayProductCodes": None,
        "imageId": instance.image_id,
        "instanceId": instance.id,
        "instanceType": instance.instance_type,
        "kernelId": None,
        "marketplaceProductCodes": None,
        "pendingTime": instance.launch_time.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "privateIp": instance.private_ip,
        "ramdiskId": None,
        "region": instance.ec2_backend.region_name,
        "version": "2017-09-30",
    }
