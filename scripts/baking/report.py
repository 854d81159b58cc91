"""Print the progress of a bake. Store the result of the bake in the image's tags, and return it as text and JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.baking.request import Bake, BakeFailed
from scripts.imaging import ec2_images, record

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client
    from mypy_boto3_ssm import SSMClient


@dataclass
class StepClock:
    """Print one line per step to stderr, and record the duration of each step."""

    started: float = field(default_factory=time.monotonic)
    steps: list[dict[str, Any]] = field(default_factory=list)
    _since: float = field(default_factory=time.monotonic)

    def begin(self, step: str) -> None:
        """End the previous step and begin this step. If this step is already running, nothing happens."""
        if self.steps and self.steps[-1]["step"] == step and "seconds" not in self.steps[-1]:
            return
        self.end()
        self.steps.append({"step": step})
        self._since = time.monotonic()
        print(f"  {self._since - self.started:6.1f} s  {step}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """End the running step, if a step is running."""
        if self.steps and "seconds" not in self.steps[-1]:
            self.steps[-1]["seconds"] = round(time.monotonic() - self._since, 1)

    def total(self) -> float:
        """Seconds since the bake began."""
        return round(time.monotonic() - self.started, 1)


def finish_image(ec2: EC2Client, ssm: SSMClient, bake: Bake, inputs_digest: str) -> tuple[str, dict[str, Any]]:
    """Tag the image with its facts, store its record, and require IMDSv2 for its instances. Returns the image's ID and
    its facts.

    Idempotent. The tag mlflow-ami:format is written last, so every image with this tag is complete.
    """
    built = json.loads((bake.directory / "manifest.json").read_text(encoding="utf-8"))["builds"][-1]
    image_id = built["artifact_id"].partition(":")[2]
    facts: dict[str, Any] = json.loads((bake.directory / "image.json").read_text(encoding="utf-8"))
    if facts["mlflow_version"] != bake.mlflow_version:
        raise BakeFailed(f"the lock file names MLflow {bake.mlflow_version}, the image holds {facts['mlflow_version']}")
    image = ec2.describe_images(ImageIds=[image_id])["Images"][0]
    snapshots = [d["Ebs"]["SnapshotId"] for d in image["BlockDeviceMappings"] if d.get("Ebs", {}).get("SnapshotId")]
    tags = {**ec2_images.fact_tags(facts), "mlflow-ami:inputs-digest": inputs_digest}
    ec2.create_tags(Resources=[image_id, *snapshots], Tags=[{"Key": k, "Value": v} for k, v in tags.items()])
    record.write(ssm, facts)
    if image.get("ImdsSupport") != "v2.0":
        ec2.modify_image_attribute(ImageId=image_id, ImdsSupport={"Value": "v2.0"})
    ec2.create_tags(
        Resources=[image_id, *snapshots], Tags=[{"Key": "mlflow-ami:format", "Value": str(facts["format"])}]
    )
    return image_id, facts


def report(image: ec2_images.Image, region: str, local: bool, log: Path | None, clock: StepClock) -> str:
    """The text output of bake.py: the image, its versions, and the commands that launch the image."""
    tags = {key.removeprefix("mlflow-ami:"): value for key, value in image.tags.items()}
    arm = image.architecture == "arm64"
    if local:
        launch = [
            f"scripts/rehearse.py up --ami {image.id}" + arm * " --set instanceType=t4g.medium",
            'eval "$(scripts/connect.py --rehearsal)"',
        ]
    else:
        launch = [
            f"pulumi -C infra config set amiId {image.id} && pulumi -C infra config set aws:region {region}",
            *(["pulumi -C infra config set instanceType t4g.small"] if arm else []),
            "pulumi -C infra up",
        ]
    lines = [
        "",
        f"{image.id}  {image.name}  ({region}, {clock.total():.0f} s)",
        f"  MLflow {tags['mlflow-version']}, migration {tags['migration-count']} "
        f"({tags['migration-head']}), PostgreSQL {tags['postgresql-major']} on {tags['os']}",
        f"  from {tags['source-ami']}, commit {tags['git-commit'][:12]}"
        + (" and uncommitted changes" if tags["git-dirty"] == "true" else ""),
        *([f"  log {log}"] if log else []),
        *(f"  without {what}" for what in image.fallbacks),
        *([f"  why: fallbacks in {log.with_name('facts.json')}"] if log and image.fallbacks else []),
        "",
        "Launch it:",
        *(f"  {line}" for line in launch),
    ]
    return "\n".join(lines)


def reusable(ec2: EC2Client, inputs_digest: str) -> ec2_images.Image | None:
    """The newest finished image whose inputs have this digest, or None if there is no such image."""
    found = ec2_images.find(ec2, {"mlflow-ami:inputs-digest": inputs_digest})
    return next((image for image in found if image.finished and image.state == "available"), None)


def result(
    image: ec2_images.Image,
    arguments: argparse.Namespace,
    clock: StepClock,
    log: Path | None = None,
    reused: bool = False,
) -> dict[str, Any]:
    """The JSON document about an image. The key `report` of the document contains the text output of bake.py."""
    facts = {
        key.removeprefix("mlflow-ami:").replace("-", "_"): value for key, value in image.tags.items() if ":" in key
    }
    return {
        "ami_id": image.id,
        "ami_name": image.name,
        "region": arguments.region,
        "reused": reused,
        "facts": facts,
        "snapshots": list(image.snapshots),
        "seconds": clock.total(),
        "steps": clock.steps,
        "log": str(log) if log else None,
        "report": report(image, arguments.region, arguments.local, log, clock),
    }
