"""The commands of the current Packer accept the unchanged template. `packer build`, bake.py with the current Packer,
and bake.py with Packer 1.6 make the same image."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from scripts.baking import request
from scripts.rehearsal import tools
from tests.support.servers import REPOSITORY

if TYPE_CHECKING:
    from scripts.local_cloud import LocalCloud

PACKER = tools.BIN / "packer"
pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(not PACKER.exists(), reason="there is no current Packer: run `make prepare-tools`"),
]

BY_THE_RUN = ("bake", "image_version", "git_commit", "git_dirty", "disk_used_mib")
"""The names of facts that differ between two bakes of the same inputs. On the local cloud, disk_used_mib is the usage
of the host's disk."""


def packer(*arguments: str, **environment: str) -> str:
    """Run the current Packer in the unchanged folder packer/, and return its output."""
    known = {**os.environ, "PACKER_PLUGIN_PATH": str(tools.PACKER_PLUGINS), "CHECKPOINT_DISABLE": "1", **environment}
    command = [str(PACKER), *arguments, "."]
    done = subprocess.run(command, cwd=REPOSITORY / "packer", env=known, capture_output=True, text=True)
    assert done.returncode == 0, f"packer {' '.join(arguments)}:\n{done.stdout}{done.stderr}"
    return done.stdout


def test_current_packer_takes_the_template_as_it_is() -> None:
    packer("init")
    for architecture in ("x86_64", "arm64"):
        given = ["-var=region=eu-central-1", f"-var=architecture={architecture}"]
        assert "valid" in packer("validate", *given, AWS_REGION="eu-central-1")
    command = [str(PACKER), "validate", "-var=region=eu-central-1", "-var=architecture=riscv64", "."]
    known = {**os.environ, "PACKER_PLUGIN_PATH": str(tools.PACKER_PLUGINS), "CHECKPOINT_DISABLE": "1"}
    refused = subprocess.run(command, cwd=REPOSITORY / "packer", env=known, capture_output=True, text=True)
    assert refused.returncode and "The architecture must be x86_64 or arm64." in refused.stdout + refused.stderr
    packer("fmt", "-check", "-diff")


@pytest.mark.slow
@pytest.mark.machine
def test_every_way_to_bake_makes_the_same_image(
    cloud: LocalCloud, images_by_packer: Mapping[str, Mapping[str, Any]], tmp_path: Path
) -> None:
    ec2 = cloud.client("ec2")
    source = ec2.describe_images(ImageIds=[cloud.source_ami("debian12")])["Images"][0]
    bundle = request.find_ca_bundle(None, dict(os.environ))
    given = {
        "region": cloud.region,
        "ec2_endpoint": cloud.endpoint,
        "source_ami_name": source["Name"],
        "source_ami_owners": json.dumps([source["OwnerId"]]),
        "output_directory": str(tmp_path),
        **({"ca_bundle": str(bundle)} if bundle else {}),
    }
    packer("init")
    packer("build", "-color=false", *(f"-var={name}={value}" for name, value in given.items()), **cloud.environment())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    plain = {
        "ami_id": manifest["builds"][-1]["artifact_id"].partition(":")[2],
        "facts": json.loads((tmp_path / "image.json").read_text()),
    }
    with_facts = {name: {**each, "facts": bake_facts(each)} for name, each in images_by_packer.items()}
    found = {"plain packer build": plain, **with_facts}
    compared = {name: comparable(ec2, each) for name, each in found.items()}
    first, *others = compared.values()
    for each in others:
        assert each == first


def bake_facts(image: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts that bake.py read from the image and stored beside its log."""
    return dict(json.loads((Path(image["log"]).parent / "image.json").read_text()))


def comparable(ec2: Any, image: dict[str, Any]) -> dict[str, Any]:
    """Return the properties that two images of the same checkout must share: facts, disks, settings of the metadata
    service."""
    described = ec2.describe_images(ImageIds=[image["ami_id"]])["Images"][0]
    disks = [each["Ebs"] for each in described["BlockDeviceMappings"] if "Ebs" in each]
    return {
        "facts": {name: value for name, value in image["facts"].items() if name not in BY_THE_RUN},
        "imds": described.get("ImdsSupport"),
        "architecture": described["Architecture"],
        "disks": [(each["VolumeSize"], each.get("Encrypted"), each.get("VolumeType")) for each in disks],
        "source": {tag["Value"] for tag in described["Tags"] if tag["Key"] == "mlflow-ami:mlflow-version"},
    }
