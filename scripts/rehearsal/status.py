"""The status document: the stack's outputs, user and password, and whether the server responds. Quick to import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts import invoker

if TYPE_CHECKING:
    from scripts.rehearsal.state import State


def first_user(credentials: str) -> tuple[str, str]:
    """Name and password of the first administrator in a credentials parameter, format 1. The password may be a hash.

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
    return name, str(entries[name]["password"])


def administrator(ssm: Any, parameters: dict[str, Any]) -> tuple[str, str | None]:
    """Name and password of the first administrator. `parameters` has "credentials_parameter" and "password_parameter".

    The password is None if the second parameter holds another one than the first, for example because the user was
    removed. A stack of an earlier release has no second parameter, and the password in clear text in the first.
    Raises ClientError and ValueError.
    """

    from mlflow_host.contract.credentials import HASHED, fits

    def value(name: str) -> str:
        return str(ssm.get_parameter(Name=name, WithDecryption=True)["Parameter"]["Value"])

    name, stored = first_user(value(parameters["credentials_parameter"]))
    if not HASHED.fullmatch(stored):
        return name, stored
    password = value(parameters["password_parameter"]) if parameters.get("password_parameter") else ""
    return name, password if fits(password, stored) else None


def parameters(outputs: dict[str, Any]) -> dict[str, Any]:
    """The names of the stack's parameters, from its outputs; None for one that it does not have."""
    kinds = ("credentials", "password", "authority")
    return {f"{kind}_parameter": outputs.get(f"{kind}Parameter") or None for kind in kinds}


def outline(current: State) -> dict[str, Any]:
    """The part of `status` that the state alone contains."""
    from scripts.rehearsal.wire import Secret, reveal

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
        **parameters(outputs),
        "server_certificate": None,
        "data_volume_id": outputs.get("dataVolumeId"),
        "settings": {
            name: "(secret)" if isinstance(value, Secret) else value for name, value in current.settings.items()
        },
    }


def authority(client: Any, parameter: str | None) -> str | None:
    """The certificate (PEM) that verifies the server: "" without an authority of the stack, None if it is not published
    yet."""
    if not parameter:
        return ""
    text = str(client.get_parameter(Name=parameter)["Parameter"]["Value"])
    return text if "BEGIN CERTIFICATE" in text else None


def keep_certificate(path: Path, certificate: str) -> Path:
    """Write the certificate to the file that the stack's clients use."""
    if not path.exists() or path.read_text() != certificate:
        invoker.make_folder(path.parent)
        fresh = path.with_suffix(".new")
        fresh.write_text(certificate)
        fresh.chmod(0o644)
        invoker.hand_over(fresh)
        fresh.replace(path)
    return path


PIECES = {"MLFLOW_MULTIPART_DOWNLOAD_CHUNK_SIZE": str(16 * 2**20)}
"""Bytes in one S3 range request. MLflow's client holds each part in memory before it writes it, two parts per core; its
default is 100 MiB."""


def client_environment(found: dict[str, Any]) -> dict[str, str]:
    """The variables for an MLflow client, from a status document (or the like-named outputs of a Pulumi stack)."""
    environment = {
        "MLFLOW_TRACKING_URI": found["url"],
        "MLFLOW_TRACKING_USERNAME": found["username"],
        "MLFLOW_TRACKING_PASSWORD": found["password"],
    }
    if found.get("server_certificate"):
        environment["MLFLOW_TRACKING_SERVER_CERT_PATH"] = str(found["server_certificate"])
    if found.get("s3_trust"):
        environment["REQUESTS_CA_BUNDLE"] = str(found["s3_trust"])
    return environment | PIECES
