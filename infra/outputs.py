"""What the stack tells: where the server is, what it runs, and the lines a client exports."""

from __future__ import annotations

import pulumi
import pulumi_aws as aws
from network import Network
from server import Server
from settings import ADMIN, Settings
from storage import Storage
from survey import Survey


def export(
    config: Settings,
    found: Survey,
    net: Network,
    kept: Storage,
    secret: aws.ssm.Parameter,
    machine: Server,
) -> None:
    url = machine.hostnames.apply(lambda names: f"{config.scheme}://{names[0]}")
    pulumi.export("url", url)
    pulumi.export("username", ADMIN)
    pulumi.export("instanceId", machine.instance.id)
    pulumi.export("publicIp", net.address.public_ip)
    pulumi.export("amiId", found.image.image_id)
    pulumi.export("imageVersion", found.image.image_version)
    pulumi.export("mlflowVersion", found.image.mlflow_version)
    pulumi.export("migrationHead", found.image.migration_head)
    pulumi.export("dataVolumeId", kept.volume.id)
    pulumi.export("buckets", {name: bucket.bucket for name, bucket in kept.buckets.items()})
    pulumi.export("credentialsParameter", secret.name)
    pulumi.export(
        "clientEnvironment",
        pulumi.Output.all(url, secret.name).apply(lambda known: client_environment(config.region, *known)),
    )
    pulumi.export("connect", f'eval "$(scripts/connect.py --stack {config.stack})"')
    pulumi.export(
        "shell",
        machine.instance.id.apply(lambda id: f"aws ssm start-session --region {config.region} --target {id}"),
    )


def client_environment(region: str, url: str, parameter: str) -> str:
    """The shell lines that point an MLflow client at the server; they fetch the password instead of holding it."""
    fetch = f"aws ssm get-parameter --region {region} --name {parameter} --with-decryption"
    pick = f"import json, sys; print(json.load(sys.stdin)['users']['{ADMIN}']['password'])"
    return "\n".join(
        [
            f"export MLFLOW_TRACKING_URI={url}",
            f"export MLFLOW_TRACKING_USERNAME={ADMIN}",
            f'export MLFLOW_TRACKING_PASSWORD="$({fetch} --query Parameter.Value --output text | python3 -c "{pick}")"',
        ]
    )
