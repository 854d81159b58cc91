"""The environment variables of the server processes: MLflow's settings, and private variables of `mlflow server`."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote, urlencode

from mlflow_host.contract.credentials import webhook_key
from mlflow_host.contract.launch import LaunchDocument
from mlflow_host.machine.config import DATA, POSTGRESQL_SOCKETS, HostConfig, bracketed
from mlflow_host.postgres.login import SERVER_KEEPALIVES, tls_parameters
from mlflow_host.server import job_runner

STATEMENT_TIMEOUT = "options=-c%20statement_timeout%3D60s"
"""Maximum duration of an SQL statement of the server. The boot steps and the restore have no such limit, because they
connect as the superuser or copy a whole database (`postgres.cluster`)."""


@contextlib.contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables of this process for the duration of the `with` block."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def remote_store_uri(host: str, port: int, authority: Path, *, token_region: str = "", passfile: str = "") -> str:
    """Return the database URI of the server processes for PostgreSQL on another host. The processes log in as `mlflow`,
    with a token of IAM authentication in the region `token_region`, or with the password in libpq's file `passfile`."""
    login = {"token_region": token_region} if token_region else {"passfile": passfile}
    query = {
        "host": host,
        "port": port,
        **tls_parameters(authority),
        "options": f"-c statement_timeout=60s {SERVER_KEEPALIVES}",
        **login,
        "plugin": "mlflow-host",
    }
    return f"postgresql+psycopg2://mlflow@/mlflow?{urlencode(query, quote_via=quote, safe='')}"


def environment(config: HostConfig, kek_passphrase: str) -> dict[str, str]:
    """Return the content of mlflow.env: the environment variables of the server processes, secrets included.

    `kek_passphrase` encrypts the AI gateway's secrets. A key derived from this passphrase encrypts webhook secrets. All
    these secrets are lost if the passphrase is lost, so a copy of the passphrase must exist outside the machine.
    """
    launch, sizing = config.launch, config.sizing
    return {
        "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg2:///mlflow?host={POSTGRESQL_SOCKETS}&{STATEMENT_TIMEOUT}",
        **artifact_environment(launch),
        # The AWS credentials are in a file that root renews. Server processes cannot connect to the metadata service.
        "AWS_CONFIG_FILE": "/usr/share/mlflow-host/aws-config",
        "AWS_EC2_METADATA_DISABLED": "true",
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(
            allowed_hosts(launch.web.hostnames, launch.web.tls)
            + ([job_runner.LOCAL_HOSTS] if launch.mlflow.job_execution else [])
        ),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(allowed_origins(launch.web.hostnames, launch.web.tls)),
        "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": str(sizing.pool_size),
        "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": str(sizing.pool_overflow),
        "MLFLOW_HOST_REQUEST_THREADS": str(sizing.request_threads),
        "MLFLOW_HOST_PROCESS_MEMORY_MB": str(sizing.server_limit_mb),
        "MLFLOW_CRYPTO_KEK_PASSPHRASE": kek_passphrase,
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": webhook_key(kek_passphrase),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "true" if launch.mlflow.job_execution else "false",
        # The engine "executor" starts two job processes instead of eight. MLflow before 3.17 has only one engine.
        "MLFLOW_SERVER_JOB_EXECUTION_ENGINE": "executor",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        # MLflow must not access the internet during a request. MLflow reads prices and models from its own catalogue,
        # and from litellm's copy if litellm is installed.
        "MLFLOW_MODEL_CATALOG_URI": "",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        # Each root field of a GraphQL request is a search. MLflow's pages send one root field; MLflow permits up to 10.
        "MLFLOW_SERVER_GRAPHQL_MAX_ROOT_FIELDS": "3",
        "MLFLOW_SERVER_GRAPHQL_MAX_ALIASES": "3",
        # A URL must be valid for a whole download, because a client requests all ranges of a large file with one URL.
        "MLFLOW_PRESIGNED_DOWNLOAD_URL_TTL_SECONDS": "3600",
        "TMPDIR": str(DATA / "tmp"),
        # Without this limit, each short-lived thread leaves an unused malloc arena in memory.
        "MALLOC_ARENA_MAX": "2",
    }


def artifact_environment(launch: LaunchDocument) -> dict[str, str]:
    """Return the environment variables for artifacts. None of these variables is secret."""
    variables = {
        "MLFLOW_ARTIFACTS_DESTINATION": artifacts_destination(
            launch.buckets.artifacts, launch.buckets.models, launch.mlflow.artifact_transfer
        ),
        **direct_transfers(launch.mlflow.artifact_transfer),
        "AWS_REGION": launch.stack.region,
        "AWS_DEFAULT_REGION": launch.stack.region,
    }
    if launch.endpoints.s3:
        variables |= {
            "AWS_ENDPOINT_URL_S3": launch.endpoints.s3,
            "MLFLOW_S3_ENDPOINT_URL": launch.endpoints.s3,
            "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE": "path",
        }
    return variables


def direct_transfers(transfer: str) -> dict[str, str]:
    """Return the variables that make MLflow 3.18 and newer offer presigned URLs to clients. Older releases detect
    support for presigned URLs by the repository's class."""
    names = ("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD")
    return dict.fromkeys(names, "true") if transfer == "direct" else {}


def artifacts_destination(artifacts: str, models: str, transfer: str) -> str:
    """Return the URI of the artifacts destination. `transfer` is "direct" (clients get presigned URLs) or "proxied".
    The URI's scheme selects the repository class in `plugins`."""
    scheme = {"direct": "mlflow-host", "proxied": "mlflow-host-proxied"}[transfer]
    return f"{scheme}://{artifacts}/{models}"


def allowed_hosts(hostnames: tuple[str, ...], tls: str) -> list[str]:
    """Return the allowed values of the Host header: the stack's host names, with and without port, and localhost.
    Checks on the machine use localhost. No web page can make a browser send "Host: localhost" to this machine."""
    port = 80 if tls == "off" else 443
    hosts = [bracketed(name) for name in hostnames]
    return [*hosts, *(f"{host}:{port}" for host in hosts), "localhost"]


def allowed_origins(hostnames: tuple[str, ...], tls: str) -> list[str]:
    """Return the origins of MLflow's own pages. With TLS, all origins begin with https://."""
    scheme = "http" if tls == "off" else "https"
    return [f"{scheme}://{bracketed(name)}" for name in hostnames]


BOOT_ID = "_MLFLOW_SERVER_BOOT_ID"
"""A variable of newer MLflow releases. The value is different for each start of a server."""


def private_environment(public: Mapping[str, str]) -> dict[str, str]:
    """Return the private variables that `mlflow server`, started with the settings in `public`, would set for its
    workers. Variables that `mlflow server` sets to their default values are omitted."""
    return {
        "_MLFLOW_SERVER_FILE_STORE": public["MLFLOW_BACKEND_STORE_URI"],
        "_MLFLOW_SERVER_REGISTRY_STORE": public["MLFLOW_BACKEND_STORE_URI"],
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": public["MLFLOW_ARTIFACTS_DESTINATION"],
        "_MLFLOW_SGI_NAME": "uvicorn",
        BOOT_ID: uuid.uuid4().hex,
    }
