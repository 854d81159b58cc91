"""What there is: the stack's outputs, the way in, and whether the server answers. Light to import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rehearsal.state import State
from rehearsal.values import Secret, reveal

HASHED = ("{SSHA}", "{SHA}", "$apr1$", "$2a$", "$2b$", "$2y$", "$5$", "$6$")


def first_user(credentials: str) -> tuple[str, str | None]:
    """Name and password of the first administrator in a credentials parameter, format 1; None for a hashed password.

    Raises ValueError when the text is not such a document or names nobody.
    """
    users = json.loads(credentials).get("users", {})
    if not users:
        raise ValueError("the credentials parameter names no users")
    entries = {
        name: entry if isinstance(entry, dict) else {"password": entry, "role": "admin" if place == 0 else "writer"}
        for place, (name, entry) in enumerate(users.items())
    }
    administrators = [name for name, entry in entries.items() if entry.get("role") == "admin"]
    name = (administrators or list(entries))[0]
    password = str(entries[name]["password"])
    return name, None if password.startswith(HASHED) else password


def outline(current: State) -> dict[str, Any]:
    """The part of `status` that the state alone tells."""
    outputs = reveal(current.outputs)
    return {
        "state": "none",
        "message": "",
        "url": outputs.get("url"),
        "username": outputs.get("username"),
        "password": None,
        "instance_id": outputs.get("instanceId"),
        "public_ip": outputs.get("publicIp"),
        "ami_id": outputs.get("amiId"),
        "image_version": outputs.get("imageVersion"),
        "mlflow_version": outputs.get("mlflowVersion"),
        "migration_head": outputs.get("migrationHead"),
        "buckets": outputs.get("buckets"),
        "credentials_parameter": outputs.get("credentialsParameter"),
        "authority_parameter": outputs.get("authorityParameter") or None,
        "server_certificate": None,
        "data_volume_id": outputs.get("dataVolumeId"),
        "settings": {
            name: "(secret)" if isinstance(value, Secret) else value for name, value in current.settings.items()
        },
    }


def authority(client: Any, parameter: str | None) -> str | None:
    """The certificate (PEM) clients verify the server by: empty where they need none of ours, None while the machine
    has published none yet."""
    if not parameter:
        return ""
    text = str(client.get_parameter(Name=parameter)["Parameter"]["Value"])
    return text if "BEGIN CERTIFICATE" in text else None


def keep_certificate(path: Path, certificate: str) -> Path:
    """Writes the certificate where clients of its stack find it."""
    if not path.exists() or path.read_text() != certificate:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_text(certificate)
        fresh.replace(path)
    return path


PIECES = {"MLFLOW_MULTIPART_DOWNLOAD_CHUNK_SIZE": str(16 * 2**20)}
"""Bytes a client asks S3 for at a time. MLflow's client gathers each piece in memory before it writes it, two for each
core at once; its default is 100 MiB."""


def client_environment(found: dict[str, Any]) -> dict[str, str]:
    """What an MLflow client is to export, from a status document (or the like-named facts of a Pulumi stack)."""
    environment = {
        "MLFLOW_TRACKING_URI": found["url"],
        "MLFLOW_TRACKING_USERNAME": found["username"],
        "MLFLOW_TRACKING_PASSWORD": found["password"],
    }
    if found.get("server_certificate"):
        environment["MLFLOW_TRACKING_SERVER_CERT_PATH"] = str(found["server_certificate"])
    return environment | PIECES
