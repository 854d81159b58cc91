"""Command `promote` of scripts/images.py: set a channel to a new image, if a drill between the channel's current image
and the new image has passed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scripts.imaging import channels
from scripts.imaging.ec2_images import DRILL, Image, ImageRefused, Place, as_tags, find, named

COMPARED = ("mlflow_version", "migration_head", "postgresql_major")
"""Facts that must be equal in an image and in a drill's report. If one of these facts differs, `promote` refuses the
report."""


def promote(
    place: Place, image: Image, channel: str, *, without_drill: bool, drill: Mapping[str, Any] | None, dry_run: bool
) -> dict[str, Any]:
    """Set the channel to the image and return a summary of the change. Idempotent. Raises ImageRefused.

    `drill` is the JSON report of scripts/drill.py. If a report is given, the function records the drill in a tag of the
    new image.
    """
    name, before = channels.parameter(channel), channels.read(place.ssm).get(channel)
    done = {"region": place.region, "channel": channel, "parameter": name, "before": before, "image": image.id}
    require_usable(image)
    if before == image.id:
        return done | {"changed": False, "note": ""}
    held = named(find(place.ec2), before) if before else None
    if held and held.architecture != image.architecture:
        raise ImageRefused(
            f"{image.id} is for {image.architecture}, but the channel {channel} contains {held.id}, and the stacks of "
            f"the channel use {held.architecture} instance types: use a channel per architecture, for example "
            f"{channel}-{image.architecture.replace('_', '-')}"
        )
    tag: dict[str, str] = {}
    if held and drill is not None:
        require_drill_of(drill, held, image)
        tag = {f"{DRILL}{held.version}": about(drill)}
    if before and not tag and not without_drill:
        require_drilled(image, held, before, channel, place.region)
    if not dry_run:
        if tag:
            place.ec2.create_tags(Resources=[image.id], Tags=as_tags(tag))
        channels.write(place.ssm, channel, image.id)
    ran_on = str((drill or {}).get("newer", {}).get("architecture", "x86_64"))  # older reports lack it
    elsewhere = bool(tag) and ran_on != image.architecture
    note = f"the drill ran on {ran_on}, and the image is for {image.architecture}" if elsewhere else ""
    return done | {"changed": True, "note": note}


def require_usable(image: Image) -> None:
    """Raise ImageRefused if the image is unfinished, not available or deprecated."""
    if not image.finished:
        raise ImageRefused(f"{image.id} is unfinished: wait for the end of its bake or copy, or delete it with sweep")
    if image.state != "available":
        raise ImageRefused(
            f"{image.id} is {image.state}, so no stack can launch it: "
            + ("enable it with retire --undo" if image.state == "disabled" else "wait until it is available")
        )
    if image.deprecated:
        raise ImageRefused(
            f"{image.id} is deprecated since {image.deprecated[:10]}: cancel the deprecation with deprecate --undo, or "
            f"promote another image"
        )


def drilled(one: Image, other: Image) -> bool:
    """Return whether a drill between the two images has passed. Either image may have been the drill's FROM, because
    each drill contains an upgrade and a rollback."""
    return other.version in one.drills or one.version in other.drills


def require_drilled(image: Image, held: Image | None, before: str, channel: str, region: str) -> None:
    """Raise ImageRefused if the new image and `held`, the channel's current image, have not passed a drill."""
    if held is None:
        raise ImageRefused(
            f"the channel {channel} contains {before}, which does not exist in {region} any more, so no drill can test "
            f"an upgrade from {before}: add --without-drill if the stacks have already changed to another image"
        )
    if not drilled(image, held):
        raise ImageRefused(
            f"no drill between {held.id} (MLflow {held.fact('mlflow-version')}) and {image.id} (MLflow "
            f"{image.fact('mlflow-version')}) has passed, and the channel {channel} names {held.id}: run "
            f"scripts/drill.py {held.fact('mlflow-version')} {image.fact('mlflow-version')} --json > drill.json and "
            "add --drill drill.json, or add --without-drill"
        )


def read_drill(path: Path) -> dict[str, Any]:
    """The JSON that scripts/drill.py printed. Raises ImageRefused."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found["lost"], int) and {"older", "newer", "at"} <= found.keys():
            return dict(found)
    except OSError as error:
        raise ImageRefused(f"--drill {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise ImageRefused(f"--drill {path} is not the output of scripts/drill.py --json")


def require_drill_of(drill: Mapping[str, Any], held: Image, image: Image) -> None:
    """Raise ImageRefused if the drill failed, or if its report names other releases than `held` and `image`."""
    if drill["lost"]:
        raise ImageRefused(f"the drill was not passed: {drill['lost']} objects are lost, so {image.id} is not promoted")
    ends = sorted([tuple(str(drill[end][name]) for name in COMPARED) for end in ("older", "newer")])
    if ends != sorted([facts(held), facts(image)]):
        said = " and ".join(f"MLflow {drill[end]['mlflow_version']}" for end in ("older", "newer"))
        raise ImageRefused(
            f"the drill was between {said}, not between {held.id} (MLflow {held.fact('mlflow-version')}, schema "
            f"{held.fact('migration-head')}, PostgreSQL {held.fact('postgresql-major')}) and {image.id} (MLflow "
            f"{image.fact('mlflow-version')}, schema {image.fact('migration-head')}, PostgreSQL "
            f"{image.fact('postgresql-major')}): run a drill between these two releases"
        )


def facts(image: Image) -> tuple[str, ...]:
    return tuple(image.fact(name.replace("_", "-")) for name in COMPARED)


def about(drill: Mapping[str, Any]) -> str:
    """Return the value of the tag that records a drill."""
    return f"{drill['at']} on {drill['newer'].get('os', '?')} {drill['newer'].get('architecture', '')}, nothing lost"


def record_drill(place: Place, older: Image, newer: Image, at: datetime | None = None) -> None:
    """Record a passed drill between the two images in a tag of the newer image. Idempotent."""
    moment = (at or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")
    value = f"{moment} on {newer.fact('os')} {newer.architecture}, nothing lost"
    place.ec2.create_tags(Resources=[newer.id], Tags=as_tags({f"{DRILL}{older.version}": value}))
