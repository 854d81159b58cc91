"""The host's configuration, and the paths of files on the machine.

The boot step `configure` writes the configuration to `/run/mlflow-host/config.json`. Every later boot step can read
config.json, which contains no secret.
"""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlflow_host.contract import launch
from mlflow_host.contract.launch import LaunchDocument, LaunchError
from mlflow_host.contract.sizing import Sizing
from mlflow_host.machine.status import StepFailed

LAUNCH_DOCUMENT = Path("/etc/mlflow-host/launch.toml")
IMAGE_FACTS = Path("/usr/share/mlflow-host/image.json")
DATA = Path("/srv/mlflow")
CLUSTERS = DATA / "postgresql"
"""Folder with one PostgreSQL cluster per major version. The name of a cluster's folder is the major version."""
USER_DATA = Path("/var/lib/cloud/instance/user-data.txt")
"""File in which cloud-init stores the user-data that it has read."""
RUN = Path("/run/mlflow-host")
DATA_DEVICE = RUN / "data-volume"
"""Symbolic link to the device of the data volume. srv-mlflow.mount mounts this link."""
CONFIG = RUN / "config.json"
SERVER_SOCKETS = Path("/run/mlflow")
POSTGRESQL_SOCKETS = Path("/run/postgresql")


@dataclass(frozen=True)
class HostConfig:
    launch: LaunchDocument
    sizing: Sizing
    url: str
    """The server's URL for browsers and MLFLOW_TRACKING_URI, without a slash at the end."""

    @property
    def server_units(self) -> list[str]:
        """The units of the server processes. Only the first server process starts the job runner."""
        return [f"mlflow-server@{n}.service" for n in range(1, self.sizing.server_processes + 1)]


def host_config(document: LaunchDocument, sizing: Sizing) -> HostConfig:
    name = document.web.hostnames[0]
    scheme = "http" if document.web.tls == "off" else "https"
    return HostConfig(document, sizing, f"{scheme}://[{name}]" if ":" in name else f"{scheme}://{name}")


def launch_document(path: Path = LAUNCH_DOCUMENT) -> LaunchDocument:
    """The launch document from user-data. Raises StepFailed if the document is missing or invalid."""
    try:
        return launch.parse(path.read_text())
    except FileNotFoundError:
        raise StepFailed(f"{path} is missing: {why_missing()}") from None
    except UnicodeDecodeError:
        raise StepFailed(f"{path} is not text in UTF-8: launch this image with the stack's user-data") from None
    except LaunchError as error:
        raise StepFailed(f"the launch document cannot be used: {error}") from None


def why_missing(user_data: Path = USER_DATA, cloud_init: Path = Path("/run/cloud-init/status.json")) -> str:
    """The reason why cloud-init has not written the launch document, and the remedy."""
    try:
        if user_data.stat().st_size:
            return (
                "cloud-init read user-data, but wrote no launch document from it (`cloud-init status --long` says what "
                "failed): launch this image with the stack's user-data"
            )
        return "the machine has no user-data: launch this image with the stack's user-data"
    except OSError:
        found = None
    with suppress(OSError, ValueError, KeyError):
        found = json.loads(cloud_init.read_text())["v1"]["datasource"]
    return (
        f"cloud-init read no user-data (its datasource: {found or 'none'}), because the instance metadata service did "
        "not respond in time or is switched off: reboot the machine"
    )


def load(path: Path = CONFIG) -> HostConfig:
    """Read the host's configuration. Raises FileNotFoundError before the boot step `configure` has run."""
    raw = json.loads(path.read_text())
    return HostConfig(launch.from_mapping(raw["launch"]), Sizing(**raw["sizing"]), raw["url"])


def dump(config: HostConfig) -> str:
    content = {
        "launch": launch.to_mapping(config.launch),
        "sizing": dataclasses.asdict(config.sizing),
        "url": config.url,
    }
    return json.dumps(content, indent=2) + "\n"


def postgresql_major(image_facts: Path = IMAGE_FACTS) -> int:
    """The major version of PostgreSQL in this image, read from image.json."""
    return int(json.loads(image_facts.read_text())["postgresql_major"])


def cluster() -> Path:
    """Folder of the cluster for the PostgreSQL major version of this image."""
    return CLUSTERS / str(postgresql_major())


def bracketed(hostname: str) -> str:
    """Format a host for use in a URL. An IPv6 address is put in brackets. Other hosts are unchanged."""
    return f"[{hostname}]" if ":" in hostname else hostname
