"""Look up the existing image, zones, parameters and data volume, and refuse settings that would fail or lose data.

The schema of the data volume is read from two sources. The volume's tags contain the image of the last `pulumi up`.
Pulumi writes the volume's tags before the boot, and the boot may then be interrupted or fail. The parameter
`in-service` contains the report of a machine whose boot finished. Machines of images with a launch revision below
REPORTS write no report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pulumi
import pulumi_aws as aws

from contract import in_service, sizing
from settings import Settings

BUCKETS = ("artifacts", "models", "backups")
IMAGE_FORMAT = "1"
"""Version of the image facts (tag mlflow-ami:format) that this program reads."""
ROLE_OF_DATA_VOLUME = "data"
CHANNELS = "/mlflow-ami/images"
"""Path of the channels' parameters in Systems Manager, which contain image IDs (scripts/images.py promote)."""
EXAMPLES = {"x86_64": "t3.small", "arm64": "t4g.small"}
"""An instance type by architecture."""
REPORTS = 4
"""The first launch revision whose images report the schema in service."""


@dataclass(frozen=True)
class Facts:
    """Facts of an image, from the image's tags, from the data volume's tags, or from a machine's report."""

    image_id: str
    """Empty in a machine's report, which contains no image ID."""
    image_version: str
    mlflow_version: str
    migration_head: str
    migration_count: int
    """Number of migrations up to and including the head. A newer schema has more migrations."""
    postgresql_major: int
    launch_revision: int = field(default=1, compare=False)
    """Revision of the launch document that the image reads."""
    architecture: str = field(default="", compare=False)
    """Architecture; empty in a machine's report, and on a volume that an earlier release of this program created."""

    @property
    def described(self) -> str:
        versions = f"MLflow {self.mlflow_version}, image {self.image_version}"
        return f"{self.image_id} ({versions})" if self.image_id else versions


@dataclass(frozen=True)
class ExistingVolume:
    id: str
    zone: str
    gib: int
    meant_for: Facts | None
    """The image of the last `pulumi up`, even if its boot failed; None if the volume's tags contain no image."""
    buckets: Mapping[str, str] = field(default_factory=dict)
    """Purpose → name of the stack's buckets; empty for a volume that an earlier release of this program created."""
    restore_from: str = ""
    """The value of the setting restoreFrom at the last `pulumi up`."""
    reported: Facts | None = None
    """The image in the last report of a machine with this volume; None if the report is missing or outdated."""

    @property
    def last(self) -> Facts | None:
        return self.reported or self.meant_for


@dataclass(frozen=True)
class Existing:
    image: Facts
    zones: tuple[str, str]
    """(the zone of the server and its data volume, a second zone)."""
    volume: ExistingVolume | None
    """The stack's data volume; None before the first launch."""
    image_gib: int = 0
    """Size of the image's root volume; 0 if unknown."""
    parameters: frozenset[str] = frozenset()
    """Full names of the stack's existing parameters."""
    addresses: tuple[str, ...] = ()
    """Allocation IDs of the stack's Elastic IPs."""
    machines: tuple[str, ...] = ()
    """IDs of the stack's instances."""


def inspect(config: Settings, provider: pulumi.ProviderResource) -> tuple[Existing, list[str]]:
    """Return (existing resources, refusals). Each refusal is a sentence with a reason why `pulumi up` would fail or
    lose data.

    If there are refusals, do not use the resources, because fields that could not be looked up are empty.
    """
    refusals: list[str] = []
    asked = pulumi.InvokeOptions(provider=provider)
    if not config.region:
        return Existing(_no_image(config.ami_id), ("", ""), None), refusals
    wanted = _ami_id(config, asked, refusals)
    image, architecture, image_gib = _image(config, wanted, asked, refusals)
    parameters = _parameters(config, asked, refusals)
    volume = _data_volume(config, parameters.get(config.parameter("in-service"), ""), asked, refusals)
    zones = _zones(config, volume, asked, refusals)
    _instance_type(config, wanted, architecture, asked, refusals)
    _names(config, asked, refusals)
    if volume:
        refusals += _misfits(config, image, volume)
    if config.restore_from and not refusals and volume is None and not parameters:
        refusals.append(
            f"restoreFrom: {config.restore_from} cannot be restored, because this stack is new and its backups bucket "
            "is empty: remove it with `pulumi config rm restoreFrom`."
        )
    beside = _beside(config, asked) if volume or parameters else ((), ())
    return Existing(image, zones, volume, image_gib, frozenset(parameters), *beside), refusals


def upgrade_summary(found: Existing) -> str:
    """One line that describes how the boot of this image changes the data."""
    meant_for = found.volume.meant_for if found.volume else None
    before, after = (meant_for.architecture if meant_for else ""), found.image.architecture
    moved = ""
    if before and after and before != after:
        moved = (
            f" The architecture changes from {before} to {after}, which was never tried with the cluster of a data "
            "volume: take a dump with `mlflow-host-dump` on the machine first."
        )
    return f"{_schema_summary(found)}{moved}"


def _schema_summary(found: Existing) -> str:
    image, volume = found.image, found.volume
    if volume is None:
        return f"New data volume: {image.described} creates schema {image.migration_head} on it."
    last = volume.last
    if last is None:
        return (
            f"Data volume {volume.id} has no record of an image: the boot of {image.described} determines the schema "
            "change."
        )
    same = (image.image_version, image.migration_head) == (last.image_version, last.migration_head)
    if volume.reported is None:
        silence = "no machine reported that its boot finished"
        if last.launch_revision < REPORTS:
            silence = "whose machines do not report whether their boot finished"
        caution = f"{volume.id} was last assigned to {last.described}, {silence}"
        if same:
            return f"Same image as at the last `up`, with schema {image.migration_head}: {caution}."
        return f"{_change(image, last)}: {caution}; now {image.described}."
    before, overtaken = "before", "."
    if volume.meant_for and volume.meant_for.image_version != last.image_version:
        before = "last reported"
        overtaken = f". The last `up` was for {volume.meant_for.described}: no machine reported that its boot finished."
    if same:
        return f"Same image as {before}, {image.described}, and the same schema {image.migration_head}{overtaken}"
    return f"{_change(image, last)}: {volume.id} was last on {last.described}, now {image.described}{overtaken}"


def _change(image: Facts, last: Facts) -> str:
    if image.migration_head == last.migration_head:
        return f"Same schema {image.migration_head}, nothing to migrate"
    steps = image.migration_count - last.migration_count
    migrations = "1 migration" if abs(steps) == 1 else f"{abs(steps)} migrations"
    direction = "Upgrade" if steps > 0 else "Rollback"
    return f"{direction} over {migrations}, schema {last.migration_head} → {image.migration_head}"


def channel_summary(config: Settings, found: Existing) -> str:
    """One line with the channel's current image. The stack's output amiId is the ID of this image."""
    return (
        f"The channel {config.channel} names {found.image.described}. To stay on this image after later promotions: "
        f"`pulumi config rm channel && pulumi config set amiId {found.image.image_id}`."
    )


def restore_summary(config: Settings) -> str:
    """One line that describes the effect of restoreFrom."""
    return (
        f"Restore of {config.restore_from}, if it was not restored to this data volume before: the current database is "
        "kept on the data volume, and the restored database is changed to the image's schema."
    )


def record(image: Facts) -> dict[str, str]:
    """The tags in which the data volume records an image's facts. `_facts` reads these tags."""
    return {
        "mlflow-ami:last-image": image.image_id,
        "mlflow-ami:image-version": image.image_version,
        "mlflow-ami:mlflow-version": image.mlflow_version,
        "mlflow-ami:migration-head": image.migration_head,
        "mlflow-ami:migration-count": str(image.migration_count),
        "mlflow-ami:postgresql-major": str(image.postgresql_major),
        "mlflow-ami:launch-revision": str(image.launch_revision),
        **({"mlflow-ami:architecture": image.architecture} if image.architecture else {}),
    }


def identity(config: Settings) -> dict[str, str]:
    """The tags that identify the stack's resources. The provider sets these tags as default tags."""
    return {"mlflow-ami:project": config.project, "mlflow-ami:stack": config.stack}


def _ami_id(config: Settings, asked: pulumi.InvokeOptions, refusals: list[str]) -> str:
    """The ID of the image to run: the setting amiId, or the channel's current image; "" after a refusal."""
    if not config.channel:
        return config.ami_id
    if config.ami_id:
        return ""
    name = f"{CHANNELS}/{config.channel}"
    try:
        found = aws.ssm.get_parameters_by_path(path=CHANNELS, recursive=False, with_decryption=False, opts=asked)
    except Exception as error:
        refusals.append(_unanswered(error, "", f"channel: {name} could not be looked up"))
        return ""
    channels = dict(zip(found.names, found.values, strict=True))
    if name in channels:
        return channels[name]
    known = ", ".join(sorted(each.removeprefix(f"{CHANNELS}/") for each in channels))
    refusals.append(
        f"channel: {config.region} has no channel {config.channel} ({f'it has {known}' if known else 'it has none'}): "
        f"make it with `scripts/images.py promote IMAGE {config.channel}`."
    )
    return ""


def _image(config: Settings, ami_id: str, asked: pulumi.InvokeOptions, refusals: list[str]) -> tuple[Facts, str, int]:
    """(facts of the image, its architecture, the size of its root volume in GiB). The architecture is "x86_64" or
    "arm64", or "" if there is no such image."""
    if not ami_id:
        return _no_image(ami_id), "", 0
    setting = "channel" if config.channel else "amiId"
    try:
        # Deprecated images are included, because a rollback pins an old image.
        ami = aws.ec2.get_ami(filters=[{"name": "image-id", "values": [ami_id]}], include_deprecated=True, opts=asked)
    except Exception as error:
        refusals.append(
            _unanswered(
                error,
                f"{setting}: there is no image {ami_id} in {config.region} that this account may launch; it may "
                "have been disabled or deregistered, or baked in another region.",
                f"{setting}: {ami_id} could not be looked up",
            )
        )
        return _no_image(ami_id), "", 0
    if ami.state != "available":
        refusals.append(f"{setting}: {ami_id} is {ami.state}, not available: wait for it, or bake it again.")
    kind = ami.tags.get("mlflow-ami:format")
    if kind is None:
        refusals.append(
            f"{setting}: {ami_id} ({ami.name}) is not an image that scripts/bake.py made: it has no tag "
            "mlflow-ami:format. Tags are visible only in the account that owns the image."
        )
        return _no_image(ami_id), ami.architecture, 0
    if kind != IMAGE_FORMAT:
        refusals.append(
            f"{setting}: {ami_id} is of image format {kind}, but this stack reads format {IMAGE_FORMAT}: launch it "
            "with the release of this project that baked it."
        )
        return _no_image(ami_id), ami.architecture, 0
    root = next((m for m in ami.block_device_mappings if m.device_name == ami.root_device_name), None)
    root_gib = int(root.ebs.get("volume_size") or 0) if root else 0
    if 0 < config.root_volume_gib < root_gib:
        refusals.append(
            f"rootVolumeGib: {config.root_volume_gib} is less than the {root_gib} GiB of {ami_id}: "
            f"set it to {root_gib} or more."
        )
    facts = _facts(ami_id, ami.tags)
    if facts is None:
        refusals.append(
            f"{setting}: the tags of {ami_id} are incomplete, so its schema is unknown: bake it again, or add "
            "the tags of its build manifest."
        )
    return facts or _no_image(ami_id), ami.architecture, root_gib


def _parameters(config: Settings, asked: pulumi.InvokeOptions, refusals: list[str]) -> dict[str, str]:
    """The stack's parameters by full name. Secret values stay encrypted."""
    try:
        there = aws.ssm.get_parameters_by_path(
            path=config.parameter("").rstrip("/"), recursive=True, with_decryption=False, opts=asked
        )
    except Exception as error:
        refusals.append(_unanswered(error, "", "The stack's parameters could not be looked up"))
        return {}
    return dict(zip(there.names, there.values, strict=True))


def _data_volume(
    config: Settings, report: str, asked: pulumi.InvokeOptions, refusals: list[str]
) -> ExistingVolume | None:
    tags = {**identity(config), "mlflow-ami:role": ROLE_OF_DATA_VOLUME}
    try:
        ids = aws.ebs.get_ebs_volumes(
            filters=[{"name": f"tag:{key}", "values": [value]} for key, value in tags.items()], opts=asked
        ).ids
        if len(ids) > 1:
            refusals.append(
                f"The volumes {', '.join(sorted(ids))} all have the tags of this stack's data volume: remove the tag "
                f"mlflow-ami:role from each volume that is not the data volume."
            )
        if len(ids) != 1:
            return None
        volume = aws.ebs.get_volume(filters=[{"name": "volume-id", "values": [ids[0]]}], opts=asked)
    except Exception as error:
        refusals.append(_unanswered(error, "", "The stack's data volume could not be looked up"))
        return None
    meant_for = _facts(volume.tags.get("mlflow-ami:last-image", ""), volume.tags)
    return ExistingVolume(
        ids[0],
        volume.availability_zone,
        volume.size,
        meant_for,
        buckets={name: volume.tags[key] for name in BUCKETS if (key := f"mlflow-ami:bucket-{name}") in volume.tags},
        restore_from=volume.tags.get("mlflow-ami:restore-from", ""),
        reported=_reported(in_service.parse(report), ids[0], meant_for),
    )


def _reported(report: in_service.InService | None, volume: str, meant_for: Facts | None) -> Facts | None:
    """The facts in a machine's report; None if the report is about another volume. The result is also None if the image
    of the last `pulumi up` writes no reports, because the report is then outdated."""
    if report is None or report.volume != volume:
        return None
    image_id = ""
    if meant_for and meant_for.image_version == report.image_version:
        image_id = meant_for.image_id
    elif meant_for and meant_for.launch_revision < REPORTS:
        return None
    return Facts(
        image_id,
        report.image_version,
        report.mlflow_version,
        report.migration_head,
        report.migration_count,
        report.postgresql_major,
    )


def _beside(config: Settings, asked: pulumi.InvokeOptions) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """IDs of the stack's addresses and machines. The IDs are used only in messages, so a failed look-up is no error."""
    tags, states = identity(config), ["pending", "running", "stopping", "stopped"]
    try:
        addresses = aws.ec2.get_eips(tags=tags, opts=asked).allocation_ids
        machines = aws.ec2.get_instances(instance_tags=tags, instance_state_names=states, opts=asked).ids
    except Exception:
        return (), ()
    return tuple(sorted(addresses)), tuple(sorted(machines))


def _zones(
    config: Settings, volume: ExistingVolume | None, asked: pulumi.InvokeOptions, refusals: list[str]
) -> tuple[str, str]:
    """(the server's zone, a second zone). The server's zone is the data volume's zone, even if AWS no longer offers the
    instance type in this zone. A new stack gets the zone in the setting availabilityZone, or the first zone that offers
    the instance type."""
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
            f"instanceType: EC2 offers no {config.instance_type} in {first}, the server's zone, but in "
            f"{', '.join(usable)}."
        )
    second = next((zone for zone in names if zone != first), "")
    if names and not second:
        refusals.append(f"{config.region} offers one zone only, {first}: the network needs two.")
    return first, second


def _instance_type(
    config: Settings, ami_id: str, architecture: str, asked: pulumi.InvokeOptions, refusals: list[str]
) -> None:
    """Check the instance type's architecture and memory. `_zones` refuses a type that no zone offers."""
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
            f"the image {ami_id} is for {architecture}: choose a type of that architecture, such as "
            f"{EXAMPLES.get(architecture, 't3.small')}, or an image baked with `scripts/bake.py --architecture "
            f"{kind.supported_architectures[0]}`."
        )
    needed = sizing.SYSTEM_MB + sizing.SERVER_MB + (sizing.JOBS_MB if config.job_execution else 0)
    if kind.memory_size < needed:
        refusals.append(
            f"instanceType: {config.instance_type} has {kind.memory_size} MiB of memory and the server needs {needed}"
            f"{' with jobExecution' if config.job_execution else ''}: choose a larger type."
        )


def _names(config: Settings, asked: pulumi.InvokeOptions, refusals: list[str]) -> None:
    """Check that the key pair and the hosted zone exist, because `pulumi up` would otherwise fail halfway."""
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


def _misfits(config: Settings, image: Facts, volume: ExistingVolume) -> list[str]:
    """The reasons why this image or these settings do not fit the existing data volume, one sentence each."""
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
            f"a cluster of PostgreSQL {volume.last.postgresql_major}, which the image cannot read. Pin an image with "
            f"PostgreSQL {volume.last.postgresql_major}, or move by dump and restore: run `mlflow-host-dump` on the "
            "machine, and set restoreFrom to the name that it prints, together with this image."
        )
    return refusals


def _facts(image_id: str, tags: Mapping[str, str]) -> Facts | None:
    """The facts in the tags of an image or a volume; None if any tag is missing."""
    try:
        return Facts(
            image_id=image_id,
            image_version=tags["mlflow-ami:image-version"],
            mlflow_version=tags["mlflow-ami:mlflow-version"],
            migration_head=tags["mlflow-ami:migration-head"],
            migration_count=int(tags["mlflow-ami:migration-count"]),
            postgresql_major=int(tags["mlflow-ami:postgresql-major"]),
            launch_revision=int(tags.get("mlflow-ami:launch-revision", "1")),
            architecture=tags.get("mlflow-ami:architecture", ""),
        )
    except (KeyError, ValueError):
        return None


def _no_image(ami_id: str) -> Facts:
    return Facts(ami_id, "", "", "", 0, 0)


def _unanswered(error: Exception, missing: str, failed: str) -> str:
    """The sentence for a failed look-up: `missing` if AWS has no such resource, otherwise `failed` with AWS's
    reason."""
    reason: Any = str(error)
    if missing and any(sign in reason for sign in ("returned no results", "NotFound", "no matching", "NoSuch")):
        return missing
    return f"{failed}: {' '.join(reason.split())[:300]}"
