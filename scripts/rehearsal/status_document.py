"""The status document: the stack's outputs, user and password, and whether the server responds. Imports quickly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts import invoker

if TYPE_CHECKING:
    from scripts.rehearsal.state import State


def first_user(credentials: str) -> tuple[str, str]:
    """Return the name and password of the first administrator in a credentials parameter of format 1.

    The returned password may be a hash. Raises ValueError if the text is not a credentials document or names no user.
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
    """Return the name and password of the first administrator.

    `parameters` contains the names "credentials_parameter" and "password_parameter". The password is None if the
    password parameter does not match the hash in the credentials parameter, for example because the user was removed. A
    stack of an earlier release has no password parameter, and its credentials parameter contains the password in clear
    text. Raises ClientError and ValueError.
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
    """Return the names of the stack's parameters from the stack's outputs. The name of a missing parameter is None."""
    kinds = ("credentials", "password", "authority")
    return {f"{kind}_parameter": outputs.get(f"{kind}Parameter") or None for kind in kinds}


def outline(current: State) -> dict[str, Any]:
    """Return the part of the status document that can be read from the state alone."""
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
    """Return the certificate (PEM) with which clients verify the server. The result is "" if the stack has no private
    authority, and None if the certificate is not published yet."""
    if not parameter:
        return ""
    text = str(client.get_parameter(Name=parameter)["Parameter"]["Value"])
    return text if "BEGIN CERTIFICATE" in text else None


def keep_certificate(path: Path, certificate: str) -> Path:
    """Write the certificate to `path`, the file that the stack's clients read. Returns `path`."""
    if not path.exists() or path.read_text() != certificate:
        invoker.make_folder(path.parent)
        fresh = path.with_suffix(".new")
        fresh.write_text(certificate)
        fresh.chmod(0o644)
        invoker.hand_over(fresh)
        fresh.replace(path)
    return path


PIECES = {"MLFLOW_MULTIPART_DOWNLOAD_CHUNK_SIZE": str(16 * 2**20)}
"""The size in bytes of one S3 range request. MLflow's default is 100 MiB. MLflow's client downloads two parts per core
at a time, and holds each part in memory before it writes the part to disk."""


def client_environment(found: dict[str, Any]) -> dict[str, str]:
    """Return the environment variables of an MLflow client. `found` is a status document, or a mapping with the same
    keys from the outputs of a Pulumi stack."""
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
