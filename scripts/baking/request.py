"""The inputs of a bake: the checkout, the AWS credentials, the region and its network."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config

from scripts import aws_session, lock

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client
    from mypy_boto3_ssm import SSMClient

REPOSITORY = Path(__file__).resolve().parent.parent.parent
BUILDS = REPOSITORY / "build" / "bake"


class BakeRefused(Exception):
    """The bake cannot start or continue, for a reason that the user can fix. The text contains the remedy."""


class BakeFailed(Exception):
    """Packer or a bake step failed. The exception's text names the failed command and the log file."""


@dataclass(frozen=True)
class Checkout:
    """The git commit from which the image is built, and whether the checkout has uncommitted changes."""

    commit: str
    dirty: bool


@dataclass(frozen=True)
class Bake:
    """The ID, the image version and the files of one bake."""

    id: str
    image_version: str
    directory: Path
    mlflow_version: str = ""

    @property
    def log(self) -> Path:
        """The log file with the output of Packer and of the bake steps."""
        return self.directory / "bake.log"

    @property
    def template(self) -> Path:
        """The folder of the copied template. The copied folders packer/ and provisioning/ have one parent folder."""
        return self.directory / "packer"


def read_checkout() -> Checkout:
    """The commit of this checkout, and whether packer/ or provisioning/ differ from this commit. If git finds no
    commit, the commit is "unknown", and the checkout counts as changed."""
    # With safe.directory, root can use git in another user's checkout. --no-optional-locks prevents writes by git.
    git = ["git", "-C", str(REPOSITORY), "-c", f"safe.directory={REPOSITORY}", "--no-optional-locks"]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=False, capture_output=True, text=True)
    if commit.returncode:
        return Checkout("unknown", True)
    paths = ["packer", "provisioning"]
    changes = subprocess.run([*git, "status", "--porcelain", "--", *paths], check=False, capture_output=True, text=True)
    return Checkout(commit.stdout.strip(), bool(changes.stdout.strip() or changes.returncode))


def require_bakeable(mlflow_version: str | None) -> None:
    """Raises BakeRefused if the MLflow release is too old. The value None means the release in the lock file."""
    try:
        if mlflow_version:
            lock.require_bakeable(mlflow_version)
    except lock.LockError as error:
        raise BakeRefused(str(error)) from None


def connect(session: boto3.Session, region: str, environment: dict[str, str]) -> tuple[EC2Client, SSMClient]:
    """Check the credentials, and return clients for EC2 and Systems Manager.

    Raises BakeRefused with the remedy if the credentials do not work.
    """
    settings = Config(retries={"mode": "standard", "max_attempts": 5})
    options: dict[str, Any] = {
        "region_name": region,
        "aws_access_key_id": environment.get("AWS_ACCESS_KEY_ID") or None,
        "aws_secret_access_key": environment.get("AWS_SECRET_ACCESS_KEY") or None,
        "aws_session_token": environment.get("AWS_SESSION_TOKEN") or None,
        "config": settings,
    }
    client: Any = session.client
    try:
        client("sts", endpoint_url=environment.get("AWS_ENDPOINT_URL"), **options).get_caller_identity()
        ec2: EC2Client = client("ec2", endpoint_url=ec2_endpoint(environment) or None, **options)
        ssm: SSMClient = client("ssm", endpoint_url=environment.get("AWS_ENDPOINT_URL"), **options)
        return ec2, ssm
    except aws_session.ERRORS as error:
        reason = aws_session.explain(error, region)
        raise BakeRefused(f"{reason}. To bake without an AWS account: scripts/bake.py --local") from None


def for_packer(session: boto3.Session, environment: dict[str, str]) -> dict[str, str]:
    """The environment for Packer, with the session's access keys instead of a profile. Packer supports fewer kinds of
    profiles than boto3.

    boto3 renews temporary keys 15 minutes before the keys expire, and a bake takes less than 15 minutes.
    """
    credentials: Any = session.get_credentials()
    keys = credentials.get_frozen_credentials()
    named = {
        "AWS_ACCESS_KEY_ID": keys.access_key,
        "AWS_SECRET_ACCESS_KEY": keys.secret_key,
        "AWS_SESSION_TOKEN": keys.token,
    }
    kept = {name: value for name, value in environment.items() if name not in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE")}
    return {name: value for name, value in (kept | named).items() if value}


def require_network(ec2: EC2Client, subnet: str | None) -> None:
    """Raises BakeRefused if no subnet is given and the region has no default VPC."""
    if subnet is None and not ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]:
        region = ec2.meta.region_name
        raise BakeRefused(
            f"region {region} has no default VPC, which the builder needs: create one with aws ec2 create-default-vpc "
            f"--region {region}, or name a subnet that reaches the internet with --subnet"
        )


def ec2_endpoint(environment: dict[str, str]) -> str:
    """The URL of the EC2 API from the environment variables of AWS's SDKs, or "" for the region's default endpoint."""
    return environment.get("AWS_ENDPOINT_URL_EC2") or environment.get("AWS_ENDPOINT_URL") or ""


def find_ca_bundle(given: str | None, environment: dict[str, str]) -> Path | None:
    """The file of CA certificates for the builder's package downloads. The file's name is `given`, else the value of
    SSL_CERT_FILE or REQUESTS_CA_BUNDLE."""
    named = given or environment.get("SSL_CERT_FILE") or environment.get("REQUESTS_CA_BUNDLE")
    if not named:
        return None
    if not Path(named).is_file():
        where = "--ca-bundle" if given else "SSL_CERT_FILE or REQUESTS_CA_BUNDLE"
        raise BakeRefused(f"{where} names {named}, which is not a file: name a file of PEM certificates")
    return Path(named).resolve()


def choose_session(arguments: argparse.Namespace) -> boto3.Session:
    """The session with the selected profile and region. Stores the region in `arguments`. Raises BakeRefused."""
    try:
        session = aws_session.choose(arguments.region)
    except aws_session.ERRORS as error:
        raise BakeRefused(aws_session.explain(error, arguments.region)) from None
    if not arguments.region:
        print(f"bake: in region {session.region_name}", file=sys.stderr)
    arguments.region = session.region_name
    return session


def local_base(arguments: argparse.Namespace) -> str:
    """The name of the local cloud's source image for the arguments --base and --architecture."""
    return str(arguments.base) if arguments.architecture == "x86_64" else f"{arguments.base}-{arguments.architecture}"


def local_environment(arguments: argparse.Namespace, environment: dict[str, str]) -> tuple[dict[str, str], str]:
    """The environment variables for the local cloud, and the ID of the source image in that cloud."""
    from scripts.local_cloud import LocalCloud, LocalCloudError

    cloud = LocalCloud()
    try:
        cloud.up()
        wanted = arguments.source_ami or cloud.source_ami(local_base(arguments))
    except LocalCloudError as error:
        raise BakeRefused(str(error)) from None
    arguments.region = cloud.region
    outside = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_EC2")
    return {k: v for k, v in environment.items() if k not in outside} | cloud.environment(), wanted
