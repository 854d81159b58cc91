"""Commands `list` and `show` of scripts/images.py: print an image's content, its cost and the reasons to keep it."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from scripts.imaging import channels, claims, record
from scripts.imaging.claims import Claims
from scripts.imaging.ec2_images import STACK, Image, Place, created, find

SNAPSHOT_USD = 0.05
"""Price of one GB-month of EBS snapshots in us-east-1, as in infra/README.md. Prices vary by about 10 % by region."""


def overview(place: Place) -> list[dict[str, Any]]:
    """The images of a region as JSON, newest first."""
    known = claims.read(place)
    return [summary(image, known, place.region) for image in find(place.ec2)]


def summary(image: Image, known: Claims, region: str) -> dict[str, Any]:
    """One image as JSON."""
    mib = used_mib(image)
    return asdict(image) | {
        "region": region,
        "finished": image.finished,
        "version": image.version,
        "running": list(known.running.get(image.id, ())),
        "channels": known.channels_of(image),
        "rollback_of": known.rollbacks_of(image),
        "other_architecture_of": [
            stack for stack in known.rollbacks_of(image) if known.architecture_of(stack) not in ("", image.architecture)
        ],
        "drills": image.drills,
        "age_days": round((datetime.now(UTC) - created(image.created)).total_seconds() / 86400, 1),
        "used_mib": mib,
        "usd_per_month": round(mib / 1024 * SNAPSHOT_USD, 2) if mib else None,
    }


def used_mib(image: Image) -> int | None:
    """Return the MiB in use on the image's volume, which is about the size of a full snapshot. Returns None if the
    image's tag mlflow-ami:disk-used-mib is missing."""
    text = image.tags.get("mlflow-ami:disk-used-mib", "")
    return int(text) if text.isdigit() else None


def line(each: dict[str, Any]) -> str:
    """Describe an image on one line: ID, age, content, size, and every reason to keep the image."""
    tags = each["tags"]
    marks = [
        *(f"runs on {instance}" for instance in each["running"]),
        *(f"channel {name}" for name in each["channels"]),
        *(
            f"{stack} can roll back to it"
            + (f" with an {each['architecture']} instance type" if stack in each["other_architecture_of"] else "")
            for stack in each["rollback_of"]
        ),
        f"{len(each['drills'])} drills passed" if each["drills"] else "",
        "kept" if "mlflow-ami:keep" in tags else "",
        "" if each["finished"] else "unfinished",
        "deprecated" if each["deprecated"] else "",
        each["state"] if each["state"] not in ("available", "") else "",
        "uncommitted changes" if tags.get("mlflow-ami:git-dirty") == "true" else "",
        f"{len(fallbacks)} fallbacks" if (fallbacks := of_json(each).fallbacks) else "",
    ]
    size = f"{each['used_mib'] / 1024:.1f} GiB ${each['usd_per_month']:.2f}/month" if each["used_mib"] else "size ?"
    return "  ".join(
        [
            f"{each['id']:<21}",
            f"{each['age_days']:5.0f} d",
            f"MLflow {tags.get('mlflow-ami:mlflow-version', '?'):<8}",
            f"PostgreSQL {tags.get('mlflow-ami:postgresql-major', '?'):<2}",
            f"{each['architecture']:<6}",
            f"{tags.get('mlflow-ami:git-commit', '?')[:12]:<12}",
            f"{size:<22}",
            ", ".join(mark for mark in marks if mark),
        ]
    ).rstrip()


def of_json(each: dict[str, Any]) -> Image:
    return Image(
        each["id"], each["name"], each["created"], each["state"], each["tags"], tuple(each["snapshots"]),
        each["architecture"],
    )  # fmt: skip


def details(place: Place, image: Image) -> dict[str, Any]:
    """Return everything about one image as JSON: summary, facts, packages, path of the bake log, channel history."""
    known = claims.read(place)
    facts, build = record.read(place.ssm, image.version), record.build(image.version)
    return summary(image, known, place.region) | {
        "facts": facts,
        "bake_log": str(build / "bake.log") if build else None,
        "history": {
            name: [asdict(each) for each in channels.history(place.ssm, name)] for name in known.channels_of(image)
        },
    }


def describe(each: dict[str, Any]) -> str:
    """Format the JSON of `details` as text."""
    image = of_json(each)
    tags = {
        tag.removeprefix("mlflow-ami:"): value for tag, value in image.tags.items() if tag.startswith("mlflow-ami:")
    }
    shown = {name: value for name, value in tags.items() if ":" not in name and name != "fallbacks"}
    facts = each["facts"] or {}
    lines = [line(each), f"  name              {image.name} ({each['region']})"]
    lines += [f"  {name:<16}  {value}" for name, value in sorted(shown.items())]
    lines += [f"  without           {what}" for what in image.fallbacks]
    lines += [f"  drill passed      with {other}: {when}" for other, when in sorted(image.drills.items())]
    lines += [f"  launched by       stack {key.removeprefix(STACK)}" for key in image.tags if key.startswith(STACK)]
    for name, values in each["history"].items():
        lines += [f"  {name:<16}  {was['image']} since {was['at'][:16]} by {was['by'] or '?'}" for was in values]
    lines.append(f"  bake log          {each['bake_log'] or 'on the machine that baked it'}")
    if not facts:
        lines.append("  packages          unknown: the image was baked before records were kept")
    for kind, packages in facts.get("packages", {}).items():
        lines.append(f"  {kind} packages ({len(packages)})")
        lines += [f"    {name} {version}" for name, version in sorted(packages.items())]
    return "\n".join(lines)
