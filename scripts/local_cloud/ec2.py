"""The EC2 API with real machines: this module connects moto's records with real instances, images and volumes.

moto handles every request and stores every record. This module overrides moto's methods that differ from real EC2. The
result: instances pass through the states pending, stopping and shutting-down, addresses exist on this host, and images
have real sizes and snapshots. This module also refuses requests that moto accepts and AWS refuses. `Bodies` changes
machines and volumes.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, Protocol

from moto.core.responses import ActionResult
from moto.core.types import Base64EncodedString
from moto.core.utils import utcnow
from moto.ec2 import urls as ec2_urls
from moto.ec2.exceptions import EC2ClientError, InvalidAMIIdError
from moto.ec2.models import ec2_backends
from moto.ec2.models import elastic_ip_addresses as eip_module
from moto.ec2.models import elastic_network_interfaces as eni_module
from moto.ec2.models.amis import Ami
from moto.ec2.models.instance_types import INSTANCE_TYPES
from moto.ec2.models.instances import Instance, InstanceState
from moto.ec2.responses.amis import AmisResponse
from moto.ec2.responses.general import General

from scripts.local_cloud.moto_corrections import CorrectedEC2

CANONICAL = "099720109477"
"""The account that owns Ubuntu's images on AWS."""

PENDING, RUNNING, SHUTTING_DOWN, TERMINATED, STOPPING, STOPPED = (
    ("pending", 0),
    ("running", 16),
    ("shutting-down", 32),
    ("terminated", 48),
    ("stopping", 64),
    ("stopped", 80),
)

DETACHING = "detaching"

ROOT_GIB = 8
"""Default size of an image's root volume in GiB, which is also the size of Ubuntu's images on AWS."""


class Bodies(Protocol):
    """The real machines, volumes and images that EC2's records describe."""

    def has_image(self, snapshot: str) -> bool: ...
    def make_root(self, instance: str, snapshot: str) -> None: ...
    def settle(self, instance: str) -> None: ...
    def pull_the_plug(self, instance: str) -> None: ...
    def reboot(self, instance: str) -> None: ...
    def make_image(self, image: str, instance: str, *, reboot: bool) -> None: ...
    def forget_snapshot(self, snapshot: str) -> None: ...
    def make_volume(self, volume: str, gib: int, snapshot: str | None) -> None: ...
    def forget_volume(self, volume: str) -> None: ...
    def snapshot_volume(self, volume: str, snapshot: str) -> None: ...
    def is_mounted(self, instance: str, volume: str) -> bool: ...
    def console(self, instance: str) -> str: ...


call = threading.local()
"""`call.parameters` contains all parameters of the current request, {name: value}. moto drops some parameters."""

_bodies: list[Bodies] = []


def bodies() -> Bodies:
    return _bodies[0]


def parameter(name: str) -> str:
    return str(getattr(call, "parameters", {}).get(name, ""))


def asked(name: str) -> bool:
    return parameter(name).lower() == "true"


def set_state(instance: Instance, state: tuple[str, int]) -> None:
    instance._state = InstanceState(*state)


class EmbodiedEC2(CorrectedEC2):
    """moto's EC2 of one region. This object contains records only, so that it can be pickled."""

    @property
    def _url_module(self) -> ModuleType:
        return ec2_urls

    # Instances

    def run_instances(self, image_id: str, count: int, *args: Any, **kwargs: Any) -> Any:
        """For a known ClientToken, return the existing reservation, so that a retry does not start more instances."""
        token = parameter("ClientToken")
        answered: dict[str, str] = self.__dict__.setdefault("answered_tokens", {})
        if token in answered:
            return self.reservations[answered[token]]
        image = self.amis.get(image_id)
        if image is None or not bodies().has_image(image.ebs_snapshot.id):
            raise InvalidAMIIdError([image_id])
        if image.state != "available":
            raise EC2ClientError("InvalidAMIID.Unavailable", f"The image '{image_id}' is {image.state}")
        if image_asks_for_tokens(image):
            kwargs["metadata_options"] = {"HttpTokens": "required", "HttpPutResponseHopLimit": 2} | (
                kwargs.get("metadata_options") or {}
            )
        wanted = kwargs.get("block_device_mappings") or []
        if all(mapping["DeviceName"] != image.root_device_name for mapping in wanted):
            root = {"VolumeSize": image.ebs_snapshot.volume.size, "VolumeType": "gp3", "DeleteOnTermination": True}
            kwargs["block_device_mappings"] = [{"DeviceName": image.root_device_name, "Ebs": root}, *wanted]
        reservation = super().run_instances(image_id, count, *args, **kwargs)
        for instance in reservation.instances:
            set_state(instance, PENDING)
            instance.nics[0].delete_on_termination = True
            instance.cpu_credits = parameter("CreditSpecification.CpuCredits")  # type: ignore[attr-defined]
            for device, block in instance.get_block_device_mapping:
                if device != instance.root_device_name:
                    volume = self.volumes[block.volume_id]
                    bodies().make_volume(volume.id, volume.size, volume.snapshot_id)
            bodies().make_root(instance.id, image.ebs_snapshot.id)
            bodies().settle(instance.id)
        if token:
            answered[token] = reservation.id
        return reservation

    def start_instances(self, instance_ids: list[str]) -> list[tuple[Instance, InstanceState]]:
        instances = self.get_multi_instances_by_id(instance_ids)
        _require_state(instances, {"stopped", "running", "pending"}, "started")
        result = []
        for instance in instances:
            before = copy.copy(instance._state)
            if before.name == "stopped":
                instance.start()
                self._restore_elastic_addresses(instance)
                instance.launch_time = utcnow()
                set_state(instance, PENDING)
                bodies().settle(instance.id)
            result.append((instance, before))
        return result

    def stop_instances(self, instance_ids: list[str]) -> list[tuple[Instance, InstanceState]]:
        instances = self.get_multi_instances_by_id(instance_ids)
        _require_state(instances, {"pending", "running", "stopping", "stopped"}, "stopped")
        result = []
        for instance in instances:
            if instance.disable_api_stop is True:
                raise EC2ClientError(
                    "OperationNotPermitted", f"The instance '{instance.id}' has stop protection (disableApiStop)"
                )
            before = copy.copy(instance._state)
            if before.name in ("pending", "running", "stopping"):
                set_state(instance, STOPPING)
                if asked("Force"):
                    bodies().pull_the_plug(instance.id)
                bodies().settle(instance.id)
            result.append((instance, before))
        return result

    def terminate_instances(self, instance_ids: list[str]) -> list[tuple[Instance, InstanceState]]:
        instances = self.get_multi_instances_by_id(instance_ids)
        result = []
        for instance in instances:
            if instance.disable_api_termination is True:
                raise EC2ClientError(
                    "OperationNotPermitted",
                    f"The instance '{instance.id}' may not be terminated. Modify its 'disableApiTermination' "
                    "instance attribute and try again.",
                )
            before = copy.copy(instance._state)
            if before.name != "terminated":
                set_state(instance, SHUTTING_DOWN)
                bodies().settle(instance.id)
            result.append((instance, before))
        return result

    def reboot_instances(self, instance_ids: list[str]) -> list[Instance]:
        instances = self.get_multi_instances_by_id(instance_ids)
        _require_state(instances, {"running"}, "rebooted")
        for instance in instances:
            bodies().reboot(instance.id)
        return instances

    def finish_stop(self, instance: Instance) -> None:
        """Record that the machine of this instance is off."""
        instance.stop()
        self._restore_elastic_addresses(instance)

    def _restore_elastic_addresses(self, instance: Instance) -> None:
        """Keep Elastic IPs on a stopped instance, because moto removes every address when an instance stops."""
        for address in self.addresses:
            if address.eni and address.eni.instance is instance:
                address.eni.public_ip = address.public_ip

    def finish_termination(self, instance: Instance) -> None:
        """Record that the instance is terminated. Remove the instance's addresses, and delete those of its volumes that
        have the setting DeleteOnTermination."""
        for address in list(self.addresses):
            if address.instance is instance or (address.eni and address.eni.instance is instance):
                self.disassociate_address(address=address.public_ip)
        reason = instance.state_reason
        instance.terminate()
        if reason.code.startswith("Server."):
            instance.state_reason = reason

    def modify_instance_security_groups(self, instance_id: str, new_group_id_list: list[str]) -> Instance:
        instance = super().modify_instance_security_groups(instance_id, new_group_id_list)
        instance.nics[0]._group_set = list(instance.security_groups)  # because moto keeps the previous groups
        return instance

    def modify_network_interface_attribute(self, eni_id: str, group_ids: list[str], *args: Any, **kwargs: Any) -> None:
        super().modify_network_interface_attribute(eni_id, group_ids, *args, **kwargs)
        interface = self.get_network_interface(eni_id)
        if group_ids and interface.instance is not None and interface.device_index == 0:
            interface.instance.security_groups = list(interface._group_set)

    # Images

    def create_image(
        self, instance_id: str, name: str, description: str, tag_specifications: list[dict[str, Any]]
    ) -> Ami:
        instance = self.get_instance(instance_id)
        _require_state([instance], {"running", "stopped", "stopping"}, "imaged")
        self._require_new_image_name(name)
        others = [each for each in tag_specifications if each["ResourceType"] != "snapshot"]
        image = super().create_image(instance_id, name, description, others)
        for each in tag_specifications:
            if each["ResourceType"] == "snapshot":  # moto does not implement it
                image.ebs_snapshot.add_tags({tag["Key"]: tag["Value"] for tag in each["Tags"]})
        root = instance.block_device_mapping[instance.root_device_name]
        self._describe_body(image, root.size, encrypted=self.volumes[root.volume_id].encrypted)
        image.root_device_name = instance.root_device_name
        image.state = "pending"
        bodies().make_image(image.id, instance_id, reboot=not asked("NoReboot"))
        return image

    def register_source_image(
        self, name: str, description: str, architecture: str = "x86_64", gib: int = ROOT_GIB
    ) -> Ami:
        """Register a public image of Canonical's account. The caller must record the layers of the image's snapshot."""
        image = self.register_image(name, description)
        image.owner_id, image.owner_alias = CANONICAL, "amazon"
        image.architecture, image.virtualization_type, image.hypervisor = architecture, "hvm", "xen"
        image.launch_permissions.append({"Group": "all"})
        self._describe_body(image, gib, encrypted=False)
        image.ebs_snapshot.owner_id = CANONICAL
        return image

    def _describe_body(self, image: Ami, gib: int, *, encrypted: bool) -> None:
        image.root_device_type = "ebs"
        image.ebs_snapshot.volume.size = gib
        image.ebs_snapshot.volume.volume_type = "gp3"
        image.ebs_snapshot.encrypted = encrypted

    def _require_new_image_name(self, name: str) -> None:
        for image in self.amis.values():
            if image.name == name and image.owner_id == self.account_id:
                raise EC2ClientError("InvalidAMIName.Duplicate", f"AMI name {name} is already in use by AMI {image.id}")

    def deregister_image(self, ami_id: str) -> None:
        image = self.amis.get(ami_id)
        super().deregister_image(ami_id)
        if image is not None and asked("DeleteAssociatedSnapshots"):
            self.delete_snapshot(image.ebs_snapshot.id)

    # Volumes

    def create_volume(self, size: int, *args: Any, **kwargs: Any) -> Any:
        volume = super().create_volume(size, *args, **kwargs)
        if parameter("Action") == "CreateVolume":
            bodies().make_volume(volume.id, volume.size, volume.snapshot_id)
        return volume

    def modify_volume(self, volume_id: str, *args: Any, **kwargs: Any) -> Any:
        before = self.get_volume(volume_id).size
        volume = super().modify_volume(volume_id, *args, **kwargs)
        if volume.size < before:
            volume.size = before
            raise EC2ClientError("InvalidParameterValue", "New size cannot be smaller than existing size")
        if not self._is_root(volume):
            bodies().make_volume(volume.id, volume.size, None)
        return volume

    def delete_volume(self, volume_id: str) -> Any:
        volume = super().delete_volume(volume_id)
        bodies().forget_volume(volume_id)
        return volume

    def attach_volume(self, volume_id: str, instance_id: str, device_path: str, *args: Any, **kwargs: Any) -> Any:
        if parameter("Action") == "AttachVolume":
            self._require_attachable(volume_id, instance_id, device_path)
        return super().attach_volume(volume_id, instance_id, device_path, *args, **kwargs)

    def _require_attachable(self, volume_id: str, instance_id: str, device_path: str) -> None:
        volume, instance = self.get_volume(volume_id), self.get_instance(instance_id)
        if volume.attachment:
            raise EC2ClientError("VolumeInUse", f"{volume_id} is already attached to an instance")
        if instance.state not in ("running", "stopped"):
            raise EC2ClientError("IncorrectState", f"Instance '{instance_id}' is not 'running' but {instance.state}")
        if device_path in instance.block_device_mapping:
            raise EC2ClientError(
                "InvalidParameterValue",
                f"Invalid value '{device_path}' for unixDevice. Attachment point {device_path} is already in use",
            )
        if volume.zone and volume.zone.name != instance.placement.zone:
            raise EC2ClientError(
                "InvalidVolume.ZoneMismatch",
                f"The volume '{volume_id}' is not in the same availability zone as instance '{instance_id}'",
            )

    def detach_volume(self, volume_id: str, instance_id: str, device_path: str) -> Any:
        """Detach a volume. A mounted volume stays in state detaching until it is unmounted or its machine stops."""
        attachment = self.get_volume(volume_id).attachment
        if attachment is None:
            raise EC2ClientError("IncorrectState", f"Volume '{volume_id}' is in the 'available' state.")
        if parameter("Action") == "DetachVolume":
            if attachment.device == attachment.instance.root_device_name and attachment.instance.state != "stopped":
                raise EC2ClientError("OperationNotPermitted", f"Unable to detach root volume '{volume_id}'")
            if bodies().is_mounted(attachment.instance.id, volume_id):
                attachment.status = DETACHING
                return attachment
        return super().detach_volume(volume_id, instance_id or attachment.instance.id, device_path)

    def create_snapshot(self, volume_id: str, *args: Any, **kwargs: Any) -> Any:
        volume = self.get_volume(volume_id)
        if self._is_root(volume):
            raise EC2ClientError(
                "UnsupportedOperation", f"{volume_id} is a root volume: create an image of its instance instead"
            )
        snapshot = super().create_snapshot(volume_id, *args, **kwargs)
        if snapshot.from_ami is None:
            bodies().snapshot_volume(volume_id, snapshot.id)
            snapshot.volume = copy.copy(volume)  # later resizing does not change the snapshot
        return snapshot

    def delete_snapshot(self, snapshot_id: str) -> Any:
        snapshot = super().delete_snapshot(snapshot_id)
        bodies().forget_snapshot(snapshot_id)
        return snapshot

    def _is_root(self, volume: Any) -> bool:
        attachment = volume.attachment
        return attachment is not None and attachment.device == attachment.instance.root_device_name


def image_asks_for_tokens(image: Ami) -> bool:
    """Return whether the image's machines require IMDSv2 tokens by default. RunInstances can override this default."""
    return getattr(image, "imds_support", None) == "v2.0"


def _require_state(instances: Iterable[Instance], allowed: set[str], participle: str) -> None:
    for instance in instances:
        if instance.state not in allowed:
            raise EC2ClientError(
                "IncorrectInstanceState",
                f"The instance '{instance.id}' is not in a state from which it can be {participle}: {instance.state}",
            )


def size_of(instance_type: str) -> tuple[int, int]:
    """Return the number of cores and the MiB of memory of an instance type. Raises KeyError for an unknown type."""
    facts = INSTANCE_TYPES[instance_type]
    return int(facts["VCpuInfo"]["DefaultVCpus"]), int(facts["MemoryInfo"]["SizeInMiB"])


def install(behind: Bodies, free_address: Callable[[], str]) -> None:
    """Connect moto's EC2 to the real machines and volumes. Call this function once, before any region is used."""
    _bodies[:] = [behind]
    ec2_backends.backend = EmbodiedEC2
    eni_module.random_public_ip = free_address  # type: ignore[attr-defined]
    eip_module.random_ip = free_address  # type: ignore[attr-defined]
    Ami.block_device_mappings = property(_image_block_devices)  # type: ignore[assignment, method-assign]
    General.get_console_output = _get_console_output  # type: ignore[method-assign]
    AmisResponse.modify_image_attribute = _modify_image_attribute(AmisResponse.modify_image_attribute)  # type: ignore[assignment, method-assign]


def _image_block_devices(image: Ami) -> list[dict[str, Any]]:
    """Return the real block devices of an image. moto returns 15 GiB of magnetic disk for every image."""
    snapshot = image.ebs_snapshot
    body = {"SnapshotId": snapshot.id, "VolumeSize": snapshot.volume.size, "VolumeType": "gp3"}
    body |= {"DeleteOnTermination": True, "Encrypted": snapshot.encrypted}
    return [{"DeviceName": image.root_device_name, "Ebs": body}]


def _get_console_output(self: General) -> ActionResult:
    instance = self.ec2_backend.get_instance(self._get_param("InstanceId"))
    text = bodies().console(instance.id)[-64 * 1024 :]
    output = Base64EncodedString.from_raw_string(text)
    return ActionResult({"InstanceId": instance.id, "Timestamp": utcnow(), "Output": output})


def _modify_image_attribute(original: Callable[[AmisResponse], Any]) -> Callable[[AmisResponse], Any]:
    """Make ModifyImageAttribute also change Description and ImdsSupport. moto supports only launch permissions."""

    def modify(self: AmisResponse) -> Any:
        image = self.ec2_backend.describe_images(ami_ids=[self._get_param("ImageId")])[0]
        if support := parameter("ImdsSupport.Value"):
            image.imds_support = support
        if description := parameter("Description.Value"):
            image.description = description
        return original(self)

    return modify
