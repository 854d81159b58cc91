"""The stack's outputs: URL, versions, IDs, and the shell lines that configure an MLflow client."""

from __future__ import annotations

import pulumi

from credentials import Parameters
from network import Network
from preflight import Existing
from server import Server
from settings import ADMIN, Settings
from storage import Storage


def export(
    config: Settings,
    found: Existing,
    net: Network,
    kept: Storage,
    parameters: Parameters,
    machine: Server,
) -> None:
    url = machine.hostnames.apply(lambda names: f"{config.scheme}://{names[0]}")
    pulumi.export("url", url)
    pulumi.export("username", ADMIN)
    pulumi.export("instanceId", machine.instance.id)
    pulumi.export("publicIp", net.address.public_ip)
    pulumi.export("amiId", found.image.image_id)
    pulumi.export("channel", config.channel)
    pulumi.export("imageVersion", found.image.image_version)
    pulumi.export("mlflowVersion", found.image.mlflow_version)
    pulumi.export("migrationHead", found.image.migration_head)
    pulumi.export("dataVolumeId", kept.volume.id)
    pulumi.export("buckets", {name: bucket.bucket for name, bucket in kept.buckets.items()})
    pulumi.export("credentialsParameter", parameters.credentials.name)
    pulumi.export("passwordParameter", parameters.password.name)
    authority = parameters.authority.name if parameters.authority else ""
    pulumi.export("authorityParameter", authority)
    pulumi.export("postgresParameter", parameters.reader.name if parameters.reader else "")
    pulumi.export(
        "clientEnvironment",
        pulumi.Output.all(url, parameters.password.name, authority).apply(
            lambda known: client_environment(config, *known)
        ),
    )
    pulumi.export("connect", f'eval "$(scripts/connect.py --stack {config.stack})"')
    pulumi.export(
        "shell",
        machine.instance.id.apply(lambda id: f"aws ssm start-session --region {config.region} --target {id}"),
    )


def client_environment(config: Settings, url: str, password: str, authority: str) -> str:
    """Shell lines that configure an MLflow client. The lines do not contain the password, but fetch it from SSM."""
    fetch = f"aws ssm get-parameter --region {config.region} --query Parameter.Value --output text --name"
    lines = [
        f"export MLFLOW_TRACKING_URI={url}",
        f"export MLFLOW_TRACKING_USERNAME={ADMIN}",
        f'export MLFLOW_TRACKING_PASSWORD="$({fetch} {password} --with-decryption)"',
        f"export MLFLOW_MULTIPART_DOWNLOAD_CHUNK_SIZE={16 * 2**20}",
    ]
    if authority:
        certificate = f"${{XDG_CACHE_HOME:-$HOME/.cache}}/mlflow-ami-{config.stack}.pem"
        lines += [
            f'export MLFLOW_TRACKING_SERVER_CERT_PATH="{certificate}"',
            'mkdir -p "${MLFLOW_TRACKING_SERVER_CERT_PATH%/*}"',
            f'{fetch} {authority} > "$MLFLOW_TRACKING_SERVER_CERT_PATH"',
        ]
    return "\n".join(lines)
