"""The Packer template of one bake: copy the template and the provisioning, adapt the copy to the Packer version, and
compute its hash."""

import argparse
import hashlib
import json
import re
import shutil

from scripts import lock
from scripts.baking.packer_run import Packer
from scripts.baking.request import REPOSITORY, Bake, BakeRefused, Checkout, ec2_endpoint, find_ca_bundle
from scripts.baking.source_images import SourceImage


def stage(bake: Bake, packer: Packer, mlflow_version: str | None) -> Bake:
    """Copy the template and the provisioning, so that edits during the bake have no effect. If `mlflow_version` is set,
    replace the copied lock file with a lock file for this release."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc", ".*.sw?", "*.md")
    for name in ("packer", "provisioning"):
        shutil.copytree(REPOSITORY / name, bake.directory / name, ignore=unwanted, symlinks=True)
    if not packer.has_plugins:
        (bake.template / "plugins.pkr.hcl").unlink()
        for path in bake.template.glob("*.pkr.hcl"):
            path.write_text(for_packer_1_6(path.read_text(encoding="utf-8")), encoding="utf-8")
    locked = bake.directory / "provisioning" / "requirements.lock"
    try:
        if mlflow_version:
            lock.resolve(locked.with_suffix(".in"), locked, (f"mlflow=={mlflow_version}",))
        return Bake(bake.id, bake.image_version, bake.directory, lock.locked_version(locked, "mlflow"))
    except lock.LockError as error:
        raise BakeRefused(str(error)) from None


def for_packer_1_6(template: str) -> str:
    """The template for Packer releases before 1.7, without the marked blocks that these releases refuse."""
    return re.sub(r" *# BEGIN Packer 1\.7 and later\n.*? *# END Packer 1\.7 and later\n", "", template, flags=re.DOTALL)


def digest(bake: Bake, source: SourceImage | None) -> str:
    """SHA-256 of all inputs of the image: template, provisioning and source image."""
    total = hashlib.sha256(f"{source.id if source else ''}\n".encode())
    for path in sorted(path for name in ("packer", "provisioning") for path in (bake.directory / name).rglob("*")):
        if path.is_file() and path.name != "plugins.pkr.hcl":
            text = path.read_bytes()
            if path.suffix == ".hcl":
                # Every Packer version makes the same image, so the digest must not depend on the Packer version.
                text = for_packer_1_6(text.decode()).encode()
            content = hashlib.sha256(text).hexdigest()
            total.update(f"{path.relative_to(bake.directory)} {content}\n".encode())
    return total.hexdigest()


def variables(
    arguments: argparse.Namespace,
    bake: Bake,
    checkout: Checkout,
    source: SourceImage | None,
    environment: dict[str, str],
) -> list[str]:
    """The template's variables as arguments for Packer. The arguments contain no secrets, because Packer gets the
    credentials from environment variables."""
    bundle = find_ca_bundle(arguments.ca_bundle, environment)
    named: dict[str, str | None] = {
        "region": arguments.region,
        "architecture": arguments.architecture,
        "bake_id": bake.id,
        "image_version": bake.image_version,
        "git_commit": checkout.commit,
        "git_dirty": str(checkout.dirty).lower(),
        "source_ami_name": source.name if source else None,
        "source_ami_owners": json.dumps([source.owner]) if source else None,
        "instance_type": arguments.instance_type,
        "subnet_id": arguments.subnet,
        "kms_key_id": arguments.kms_key,
        "encrypted": "false" if arguments.unencrypted else None,
        "ca_bundle": str(bundle) if bundle else None,
        "ec2_endpoint": ec2_endpoint(environment),
        "output_directory": str(bake.directory),
    }
    return [f"-var={name}={value}" for name, value in named.items() if value]
