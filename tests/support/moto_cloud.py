"""A cloud without machines for tests of both engines. moto serves EC2, S3, IAM and SSM at one address."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.request import Request, urlopen

import boto3
from botocore.config import Config

from scripts.local_cloud import moto_corrections
from tests.support.moto_server import moto_server

REGION = "eu-central-1"
KEY = "test"
FACTS = {
    "format": "1",
    "git-commit": "0" * 40,
    "source-ami": "ami-0123456789abcdef0",
    "mlflow-version": "3.17.2",
    "migration-head": "dc11669786a5",
    "migration-count": "67",
    "postgresql-major": "15",
}


@dataclass(frozen=True)
class MotoCloud:
    """A moto server with the part of LocalCloud's interface that an engine uses."""

    endpoint: str
    region: str = REGION

    @property
    def s3_endpoint(self) -> str:
        """Return an invented S3 endpoint, because this cloud has no machines. The engines use `environment` and
        `client`."""
        return "https://s3.example.com"

    @property
    def s3_authority(self) -> str:
        return ""

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": KEY,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
        }

    def client(self, service: str) -> Any:
        connect: Any = boto3.client
        return connect(
            service,
            endpoint_url=self.endpoint,
            region_name=self.region,
            aws_access_key_id=KEY,
            aws_secret_access_key=KEY,
            config=Config(s3={"addressing_style": "path"}),
        )


@contextmanager
def moto_cloud() -> Iterator[MotoCloud]:
    """Yield a new cloud that contains only a default network."""
    moto_corrections.install_images()
    with moto_server() as address:
        urlopen(Request(f"{address}/moto-api/reset", method="POST")).close()
        yield MotoCloud(address)


def register_image(cloud: MotoCloud, version: str, **facts: str) -> str:
    """Register an image of this project with these facts, and return its ID. Underscores in names become hyphens."""
    ec2 = cloud.client("ec2")
    disk = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 8}}
    ami = ec2.register_image(
        Name=f"mlflow-ami-{version}", Architecture="x86_64", RootDeviceName="/dev/sda1", BlockDeviceMappings=[disk]
    )["ImageId"]
    tags = {**FACTS, "image-version": version, **{name.replace("_", "-"): value for name, value in facts.items()}}
    ec2.create_tags(Resources=[ami], Tags=[{"Key": f"mlflow-ami:{key}", "Value": each} for key, each in tags.items()])
    return str(ami)
