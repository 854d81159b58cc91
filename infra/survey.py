"""What is there already: the image, the zones, and the data volume with the record of its last image.

The record is the volume's own tags. They are written by Pulumi ahead of the boot they announce, so after an upgrade
that failed half way they name the newer schema, which errs on the safe side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pulumi
import pulumi_aws as aws
from host import sizing
from settings import Settings

IMAGE_FORMAT = "1"
"""Version of the image facts this stack understands (tag mlflow-ami:format)."""
ROLE_OF_DATA_VOLUME = "data"


@dataclass(frozen=True)
class Facts:
    """What an image says of itself in its tags; also what the data volume remembers of the last one."""

    image_id: str
    image_version: str
    mlflow_version: str
    migration_head: str
    migration_count: int
    """Number of migrations up to and including the head: two images compare by it."""
    postgresql_major: int
    launch_revision: int = field(default=1, compare=False)
    """Revision of the launch document that it reads."""

    @property
    def described(self) -> str:
        return f"{self.image_id} (MLflow {self.mlflow_version}, image {self.image_version})"


@dataclass(frozen=True)
class DataVolume:
    id: str
    zone: str
    gib: int
    last: Facts | None
    """The image that last owned it; None if the volume holds no record."""


@dataclass(frozen=True)
class Survey:
    image: Facts
    zones: tuple[str, str]
    """The zone of the server and its data volume, and a second one."""
    volume: DataVolume | None
    """The stack's data volume, None before the first launch."""
    image_gib: int = 0
    """Size of the image's root volume, 0 when EC2 does not tell."""


def look(config: Settings, provider: pulumi.ProviderResource) -> tuple[Survey, list[str]]:
    """The survey, and a sentence for everything that would fail or lose data later on.

    With refusals the survey is not to be built on: what could not be found is empty.
    """
    refusals: list[str] = []
    asked = pulumi.InvokeOptions(provider=provider)
    if not config.region:
        return Survey(_no_image(config), ("", ""), None), refusals
    image, architecture, image_gib = _image(config, asked, refusals)
    volume = _data_volume(config, asked, refusals)
    zones = _zones(config, volume, asked, refusals)
    _instance_type(config, architecture, asked, refusals)
    _names(config, asked, refusals)
    if volume:
        refusals += _misfits(config, image, volume)
    return Survey(image, zones, volume, image_gib), refusals


def outlook(found: Survey) -> str:
    """One line on what the boot of this image will do with the data."""
    image, last = found.image, found.volume.last if found.volume else None
    if found.volume is None:
        return f"New data volume: {image.described} creates schema {image.migration_head} on it."
    if last is None:
        return f"Data volume {found.volume.id} has no record of an image: {image.described} decides at boot."
    if image == last:
        return f"Same image as before, {image.described}, and the same schema {image.migration_head}."
    was = f"{found.volume.id} was last on {last.described}"
    if image.migration_head == last.migration_head:
        return f"Same schema {image.migration_head}, nothing to migrate: {was}, now {image.described}."
    steps = image.migration_count - last.migration_count
    migrations = "1 migration" if abs(steps) == 1 else f"{abs(steps)} migrations"
    direction = "Upgrade" if steps > 0 else "Rollback"
    return (
        f"{direction} over {migrations}, schema {last.migration_head} → {image.migration_head}: "
        f"{was}, now {image.described}."
    )


def restoring(config: Settings) -> str:
    """One line on what restoreFrom will do."""
    return (
        f"Restore of {config.restore_from}, unless this data volume has it already: what is there now is kept aside, "
        "and the schema is brought to the image's afterwards."
    )


def record(image: Facts) -> dict[str, str]:
    """The tags that remember an image on the data volume; `_facts` reads them back."""
    return {
        "mlflow-ami:last-image": image.image_id,
        "mlflow-ami:image-version": image.image_version,
        "mlflow-ami:mlflow-version": image.mlflow_version,
        "mlflow-ami:migration-head": image.migration_head,
        "mlflow-ami:migration-count": str(image.migration_count),
        "mlflow-ami:postgresql-major": str(image.postgresql_major),
    }


def identity(config: Settings) -> dict[str, str]:
    """The tags by which the stack's own resources are known; they go on everything as default tags."""
    return {"mlflow-ami:project": config.project, "mlflow-ami:stack": config.stack}


def _image(config: Settings, asked: pulumi.InvokeOptions, refusals: list[str]) -> tuple[Facts, str, int]:
    """The image's facts, its architecture ("x86_64", "arm64"; "" when there is no such image) and its size in GiB."""
    if not config.ami_id:
        return _no_image(config), "", 0
    try:
        # Deprecated images must stay pinnable: that is what a rollback is.
        ami = aws.ec2.get_ami(
            filters=[{"name": "image-id", "values": [config.ami_id]}], include_deprecated=True, opts=asked
        )
    except Exception as error:
        refusals.append(
            _unanswered(
                error,
                f"amiId: there is no image {config.ami_id} in {config.region} that this account may launch; it may "
                "have been deregistered, or baked in another region.",
                f"amiId: {config.ami_id} could not be looked up",
            )
        )
        return _no_image(config), "", 0
    if ami.state != "available":
        refusals.append(f"amiId: {config.ami_id} is {ami.state}, not available: wait for it, or bake it again.")
    kind = ami.tags.get("mlflow-ami:format")
    if kind is None:
        refusals.append(
            f"amiId: {config.ami_id} ({ami.name}) is not an image that scripts/bake.py made: it has no tag "
            "mlflow-ami:format. Tags are seen only in the account that owns the image."
        )
        return _no_image(config), ami.architecture, 0
    if kind != IMAGE_FORMAT:
        refusals.append(
            f"amiId: {config.ami_id} is of image format {kind}, but this stack knows format {IMAGE_FORMAT}: launch it "
            "with the release of this project that baked it."
        )
        return _no_image(config), ami.architecture, 0
    root = next((m for m in ami.block_device_mappings if m.device_name == ami.root_device_name), None)
    root_gib = int(root.ebs.get("volume_size") or 0) if root else 0
    if 0 < config.root_volume_gib < root_gib:
        refusals.append(
            f"rootVolumeGib: {config.root_volume_gib} is less than the {root_gib} GiB of {config.ami_id}: "
            f"set it to {root_gib} or more."
        )
    facts = _facts(config.ami_id, ami.tags)
    if facts is None:
        refusals.append(
            f"amiId: the tags of {config.ami_id} are incomplete, so what it would do to the data is not known: "
            "bake it again, or tag it as its build manifest says."
        )
    return facts or _no_image(config), ami.architecture, root_gib


def _data_volume(config: Settings, asked: pulumi.InvokeOptions, refusals: list[str]) -> DataVolume | None:
    tags = {**identity(config), "mlflow-ami:role": ROLE_OF_DATA_VOLUME}
    try:
        ids = aws.ebs.get_ebs_volumes(
            filters=[{"name": f"tag:{key}", "values": [value]} for key, value in tags.items()], opts=asked
        ).ids
        if len(ids) > 1:
            refusals.append(
                f"The volumes {', '.join(sorted(ids))} all carry the tags of this stack's data volume: remove the tag "
                "mlflow-ami:role from those that are not."
            )
        if len(ids) != 1:
            return None
        volume = aws.ebs.get_volume(filters=[{"name": "volume-id", "values": [ids[0]]}], opts=asked)
    except Exception as error:
        refusals.append(_unanswered(error, "", "The stack's data volume could not be looked up"))
        return None
    last = _facts(volume.tags.get("mlflow-ami:last-image", ""), volume.tags)
    return DataVolume(ids[0], volume.availability_zone, volume.size, last)


def _zones(
    config: Settings, volume: DataVolume | None, asked: pulumi.InvokeOptions, refusals: list[str]
) -> tuple[str, str]:
    """The data volume's zone stays whatever AWS offers today; a new stack gets one that has the instance type."""
    try:
        names = sorted(
            aws.get_availability_zones(
                state="available",
                filters=[{"name": "opt-in-status", "values": ["opt-in-not-required"]}],
                opts=asked,
            ).names
        )
        offered = set(
            aws.ec2.get_instance_type_offerings(
                filters=[{"name": "instance-type", "values": [config.instance_type]}],
                location_type="availability-zone",
                opts=asked,
            ).locations
        )
    except Exception as error:
        refusals.append(_unanswered(error, "", f"The zones of {config.region} could not be looked up"))
        return "", ""
    if not offered:
        refusals.append(f"instanceType: EC2 offers no {config.instance_type!r} in {config.region}.")
    elif config.availability_zone and config.availability_zone not in names:
        refusals.append(
            f"availabilityZone: {config.region} has no zone {config.availability_zone!r}; it has {', '.join(names)}."
        )
    usable = [zone for zone in names if zone in offered]
    first = (volume.zone if volume else "") or config.availability_zone or next(iter(usable), "")
    if offered and first in names and first not in offered:
        refusals.append(
            f"instanceType: EC2 offers no {config.instance_type} in {first}, where the server is to run; it does in "
            f"{', '.join(usable)}."
        )
    second = next((zone for zone in names if zone != first), "")
    if names and not second:
        refusals.append(f"{config.region} offers one zone only, {first}: the network needs two.")
    return first, second


def _instance_type(config: Settings, architecture: str, asked: pulumi.InvokeOptions, refusals: list[str]) -> None:
    """Whether the machine fits the image. A type that is offered nowhere was refused with the zones."""
    if any(refusal.startswith("instanceType:") for refusal in refusals):
        return
    try:
        kind = aws.ec2.get_instance_type(instance_type=config.instance_type, opts=asked)
    except Exception as error:
        refusals.append(_unanswered(error, "", f"instanceType: {config.instance_type} could not be looked up"))
        return
    if architecture and architecture not in kind.supported_architectures:
        refusals.append(
            f"instanceType: {config.instance_type} is a machine for {' or '.join(kind.supported_architectures)}, but "
            f"the image {config.ami_id} is for {architecture}: choose a type of that architecture."
        )
    needed = sizing.SYSTEM_MB + sizing.SERVER_MB + (sizing.JOBS_MB if config.job_execution else 0)
    if kind.memory_size < needed:
        refusals.append(
            f"instanceType: {config.instance_type} has {kind.memory_size} MiB of memory and the server needs {needed}"
            f"{' with jobExecution' if config.job_execution else ''}: choose a larger type."
        )


def _names(config: Settings, asked: pulumi.InvokeOptions, refusals: list[str]) -> None:
    """The key pair and the hosted zone, which a launch would find missing too late."""
    if config.key_name:
        try:
            aws.ec2.get_key_pair(key_name=config.key_name, opts=asked)
        except Exception as error:
            refusals.append(
                _unanswered(
                    error,
                    f"keyName: there is no key pair {config.key_name!r} in {config.region}.",
                    f"keyName: {config.key_name!r} could not be looked up",
                )
            )
    if config.hosted_zone_id and config.domain_name:
        try:
            zone = aws.route53.get_zone(zone_id=config.hosted_zone_id, opts=asked).name.rstrip(".")
        except Exception as error:
            refusals.append(
                _unanswered(
                    error,
                    f"hostedZoneId: there is no hosted zone {config.hosted_zone_id} in this account.",
                    f"hostedZoneId: {config.hosted_zone_id} could not be looked up",
                )
            )
            return
        if config.domain_name != zone and not config.domain_name.endswith(f".{zone}"):
            refusals.append(
                f"domainName: {config.domain_name} is not in the hosted zone {config.hosted_zone_id}, which is for "
                f"{zone}."
            )


def _misfits(config: Settings, image: Facts, volume: DataVolume) -> list[str]:
    """Why this image or these settings cannot go with the data volume that is there."""
    refusals = []
    if config.data_volume_gib < volume.gib:
        refusals.append(
            f"dataVolumeGib: {config.data_volume_gib} is less than the {volume.gib} GiB that {volume.id} has, and EBS "
            f"volumes do not shrink: set it to {volume.gib} or more."
        )
    if config.availability_zone and config.availability_zone != volume.zone:
        refusals.append(
            f"availabilityZone: {config.availability_zone} is not where the data volume {volume.id} is, and volumes "
            f"do not move: set it to {volume.zone}, or launch a second stack there."
        )
    other_major = volume.last and image.postgresql_major not in (0, volume.last.postgresql_major)
    if volume.last and other_major and not config.restore_from:
        refusals.append(
            f"amiId: {image.image_id} has PostgreSQL {image.postgresql_major}, but the data volume {volume.id} holds "
            f"a cluster of PostgreSQL {volume.last.postgresql_major}, which it cannot read: pin an image with "
            f"PostgreSQL {volume.last.postgresql_major}, or move by dump and restore: take a dump with "
            "`mlflow-host-dump` on the machine, and set restoreFrom to the name it prints together with this image."
        )
    return refusals


def _facts(image_id: str, tags: Mapping[str, str]) -> Facts | None:
    """Facts from an image's or a volume's tags, None unless all are there."""
    try:
        return Facts(
            image_id=image_id,
            image_version=tags["mlflow-ami:image-version"],
            mlflow_version=tags["mlflow-ami:mlflow-version"],
            migration_head=tags["mlflow-ami:migration-head"],
            migration_count=int(tags["mlflow-ami:migration-count"]),
            postgresql_major=int(tags["mlflow-ami:postgresql-major"]),
            launch_revision=int(tags.get("mlflow-ami:launch-revision", "1")),
        )
    except (KeyError, ValueError):
        return None


def _no_image(config: Settings) -> Facts:
    return Facts(config.ami_id, "", "", "", 0, 0)


def _unanswered(error: Exception, missing: str, failed: str) -> str:
    """A sentence for a look-up that failed: `missing` when AWS has no such thing, else `failed` with AWS's reason."""
    reason: Any = str(error)
    if missing and any(sign in reason for sign in ("returned no results", "NotFound", "no matching", "NoSuch")):
        return missing
    return f"{failed}: {' '.join(reason.split())[:300]}"
