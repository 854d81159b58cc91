"""Look up moto's EC2 records of all regions. Callers of these functions must hold the API lock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from moto.ec2.exceptions import EC2ClientError
from moto.ec2.models import ec2_backends

from scripts.local_cloud.ec2 import EmbodiedEC2
from scripts.local_cloud.layout import ACCOUNT


def of_region(region: str) -> EmbodiedEC2:
    backends: Any = ec2_backends[ACCOUNT]
    backend: EmbodiedEC2 = backends[region]
    return backend


def all_backends() -> Iterator[EmbodiedEC2]:
    backends: Any = ec2_backends[ACCOUNT]
    yield from list(backends.values())


def all_instances() -> Iterator[Any]:
    for backend in all_backends():
        yield from backend.all_instances()


def find(instance_id: str) -> Any:
    """Return the record of an instance, or None if the instance does not exist."""
    return next((instance for instance in all_instances() if instance.id == instance_id), None)


def free_address(addresses: Iterable[str]) -> str:
    """Return the first address in `addresses` that no network interface and no Elastic IP uses."""
    taken: set[str | None] = {a.public_ip for backend in all_backends() for a in backend.addresses}
    taken |= {n.public_ip for backend in all_backends() for n in backend.enis.values()}
    for address in addresses:
        if address not in taken:
            return address
    raise EC2ClientError("AddressLimitExceeded", "The maximum number of addresses has been reached.")


def disks_of(record: Any) -> list[str]:
    """Return the IDs of the volumes attached to an instance, in the order of device names, without the root volume."""
    return [
        block.volume_id
        for device, block in sorted(record.get_block_device_mapping)
        if device != record.root_device_name
    ]


def disks_in_use() -> set[str]:
    """Return the IDs of volumes whose instances are in the states pending, running, stopping or shutting-down."""
    return {
        volume
        for record in all_instances()
        if record.state in ("pending", "running", "stopping", "shutting-down")
        for volume in disks_of(record)
    }
