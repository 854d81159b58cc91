#!/usr/bin/env python3
"""Bake the machine image: make an AMI from a source image.

Packer starts a temporary instance (the builder), provisions the builder over SSH and makes an image of it. After a
successful bake and after a failed bake, the builder and the other temporary resources are removed.
"""

from __future__ import annotations

if __name__ == "__main__":
    import enter_venv  # noqa: F401 - this import restarts the script with the packages of .venv

# isort: split
import argparse
import contextlib
import json
import os
import re
import shutil
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from scripts import aws_session
from scripts.baking.cleanup import prune_builds, sweep
from scripts.baking.packer_run import find_packer, require_tokens, run_packer, step_of
from scripts.baking.report import StepClock, finish_image, result, reusable
from scripts.baking.request import (
    BUILDS,
    Bake,
    BakeFailed,
    BakeRefused,
    choose_session,
    connect,
    for_packer,
    local_environment,
    read_checkout,
    require_bakeable,
    require_network,
)
from scripts.baking.source_images import SOURCE_NAMES, SOURCE_OWNERS, find_source_image
from scripts.baking.template import digest, stage, variables
from scripts.imaging import ec2_images, record
from scripts.interrupts import end_like_ctrl_c, uninterrupted

if TYPE_CHECKING:
    from mypy_boto3_ssm import SSMClient


def bake_image(arguments: argparse.Namespace, clock: StepClock) -> dict[str, Any]:
    """Bake the image that `arguments` describe, or find an existing image. Returns the document that --json prints.

    Raises BakeRefused or BakeFailed. The temporary resources in the account are removed even if the bake fails.
    """
    require_bakeable(arguments.mlflow_version)
    packer = find_packer()
    checkout = read_checkout()
    now = datetime.now(UTC)
    version = now.strftime("%Y%m%dT%H%M%SZ")
    bake_id = f"{version.lower()}-{os.getpid()}"
    bake = Bake(bake_id, version, BUILDS / bake_id)

    environment, wanted = dict(os.environ), arguments.source_ami
    if arguments.local:
        clock.begin("start the local cloud")
        environment, wanted = local_environment(arguments, environment)
    if checkout.dirty:
        print("bake: packer/ or provisioning/ has uncommitted changes; the image is tagged git-dirty", file=sys.stderr)

    clock.begin("look up the source image")
    session = aws_session.isolated() if arguments.local else choose_session(arguments)
    ec2, ssm = connect(session, arguments.region, environment)
    if not arguments.local:
        environment = for_packer(session, environment)
    require_network(ec2, arguments.subnet)
    owners = tuple(arguments.source_owner or SOURCE_OWNERS)
    source = find_source_image(ec2, wanted, owners, arguments.architecture)

    clock.begin(f"lock MLflow {arguments.mlflow_version}" if arguments.mlflow_version else "stage the template")
    bake.directory.mkdir(parents=True)
    prune_builds()
    bake = stage(bake, packer, arguments.mlflow_version)
    inputs_digest = digest(bake, source)
    if arguments.if_changed and (same := reusable(ec2, inputs_digest)):
        clock.end()
        shutil.rmtree(bake.directory)
        return result(same, arguments, clock, reused=True)

    if packer.has_plugins:
        clock.begin("install Packer's amazon plugin")
        run_packer(packer, ["init", str(bake.template)], bake, environment, lambda line: None)
    command = ["build", "-color=false", *variables(arguments, bake, checkout, source, environment), str(bake.template)]

    def narrate(line: str) -> None:
        if step := step_of(line):
            clock.begin(step)

    reserve(ssm, bake)
    finished: str | None = None
    try:
        with contextlib.nullcontext() if packer.has_plugins else require_tokens(ec2, bake):
            run_packer(packer, command, bake, environment, narrate)
        clock.begin("tag the image with its facts")
        finished, facts = finish_image(ec2, ssm, bake, inputs_digest)
        (bake.directory / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    finally:
        clock.end()
        with uninterrupted():
            sweep(ec2, ssm, bake, finished)
    image = ec2_images.read(ec2.describe_images(ImageIds=[finished])["Images"][0])
    return result(image, arguments, clock, log=bake.log)


def reserve(ssm: SSMClient, bake: Bake) -> None:
    """Reserve the image version in Systems Manager. The version is the start time of the bake, to the second. Raises
    BakeRefused if another bake has reserved this version, and ClientError if AWS refuses for another reason."""
    try:
        record.reserve(ssm, bake.image_version, bake.id)
    except ClientError as error:
        if error.response["Error"]["Code"] != "ParameterAlreadyExists":
            raise
        # If a response was lost, botocore repeats the request, and the parameter of the first request already exists.
        if record.reserved(ssm).get(bake.image_version) == bake.id:
            return
        raise BakeRefused(f"another bake has the image version {bake.image_version}: run the command again") from None


def validate(arguments: argparse.Namespace) -> None:
    """Run `packer validate` on the template, without calls to AWS. Raises BakeRefused or BakeFailed."""
    require_bakeable(arguments.mlflow_version)
    packer = find_packer()
    now = datetime.now(UTC)
    bake_id = f"{now:%Y%m%dt%H%M%Sz}-{os.getpid()}"
    bake = Bake(bake_id, f"{now:%Y%m%dT%H%M%SZ}", BUILDS / bake_id)
    bake.directory.mkdir(parents=True)
    prune_builds()
    try:
        bake = stage(bake, packer, arguments.mlflow_version)
        if packer.has_plugins:
            run_packer(packer, ["init", str(bake.template)], bake, dict(os.environ), lambda line: None)
        choose_session(arguments)
        given = variables(arguments, bake, read_checkout(), None, dict(os.environ))
        run_packer(packer, ["validate", *given, str(bake.template)], bake, dict(os.environ), lambda line: None)
    finally:
        shutil.rmtree(bake.directory / "provisioning", ignore_errors=True)
    shutil.rmtree(bake.directory)
    version = ".".join(map(str, packer.version))
    print(
        f"bake: Packer {version} accepts the template, for MLflow {bake.mlflow_version} on {arguments.architecture}",
        file=sys.stderr,
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="On AWS the usual credentials are used (environment, AWS_PROFILE, instance role). "
        "The log of each bake is kept below build/bake/.",
    )
    where = parser.add_argument_group("where")
    where.add_argument("--local", action="store_true", help="bake on the local cloud: no AWS account, needs root")
    where.add_argument(
        "--base",
        choices=("debian12", "debian13", "ubuntu24.04"),
        help="source image on the local cloud (default debian12; ubuntu24.04 where Ubuntu's archive answers)",
    )
    where.add_argument("--region", help=f"AWS region (default: {aws_session.WHERE})")
    where.add_argument(
        "--instance-type", metavar="TYPE", help="instance type of the builder (default t3.medium, or t4g.medium)"
    )
    where.add_argument("--subnet", metavar="ID", help="subnet of the builder (default: one of the default VPC)")
    what = parser.add_argument_group("what")
    what.add_argument(
        "--architecture",
        choices=tuple(SOURCE_NAMES),
        default="x86_64",
        help="x86_64 (t3, m7i), or arm64 for Graviton (t4g, m7g); --local uses qemu-user (default %(default)s)",
    )
    what.add_argument("--mlflow-version", metavar="X", help="another MLflow release than the lock file's, as 3.12.0")
    what.add_argument(
        "--source-ami", metavar="IMAGE", help="id, name or pattern (default: Canonical's newest Ubuntu 24.04)"
    )
    what.add_argument("--source-owner", metavar="ID", action="append", help="account that may own the source image")
    what.add_argument("--unencrypted", action="store_true", help="do not encrypt the image's snapshot")
    what.add_argument("--kms-key", metavar="ID", help="encrypt with this key (default: the account's key for EBS)")
    what.add_argument(
        "--ca-bundle", metavar="FILE", help="PEM file for networks that re-sign TLS (default: SSL_CERT_FILE)"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--if-changed", action="store_true", help="use an existing image that was made from the same inputs"
    )
    how.add_argument("--validate", action="store_true", help="only check the template with Packer, offline")
    how.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    arguments = parser.parse_args(argv)
    if arguments.base and not arguments.local:
        parser.error("--base names a source image of the local cloud: give --local as well, or --source-ami")
    if arguments.local and arguments.region:
        parser.error("--region is for AWS: the local cloud has only one region")
    if arguments.local and arguments.architecture == "arm64" and arguments.base not in (None, "debian12"):
        parser.error(f"--base {arguments.base} is for x86_64: the local cloud's only base for arm64 is debian12")
    if arguments.mlflow_version and not re.fullmatch(r"\d+(\.\d+){2}\w*", arguments.mlflow_version):
        parser.error(f"--mlflow-version {arguments.mlflow_version}: use the release's name on PyPI, such as 3.12.0")
    if arguments.kms_key and arguments.unencrypted:
        parser.error("--kms-key and --unencrypted exclude each other")
    arguments.base = arguments.base or "debian12"
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    end_like_ctrl_c()
    clock = StepClock()
    try:
        if arguments.validate:
            validate(arguments)
            return 0
        baked = bake_image(arguments, clock)
    except BakeRefused as refused:
        print(f"bake: {refused}", file=sys.stderr)
        return 2
    except BakeFailed as failed:
        print(f"bake: {failed}", file=sys.stderr)
        return 1
    except aws_session.ERRORS as error:
        print(f"bake: {aws_session.explain(error, arguments.region)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bake: interrupted; no image was made, temporary resources are removed", file=sys.stderr)
        return 130
    text = baked.pop("report")
    if baked["reused"]:
        print(f"bake: nothing changed since {baked['ami_id']} was made", file=sys.stderr)
    print(text, file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(baked))
    return 0


if __name__ == "__main__":
    sys.exit(main())
