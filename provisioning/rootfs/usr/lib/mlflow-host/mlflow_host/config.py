"""What the boot knows once it is configured, and where on the machine things are.

`configure` writes `/run/mlflow-host/config.json`, readable by every later step; it holds no secret.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from mlflow_host import launch
from mlflow_host.launch import LaunchDocument, LaunchError
from mlflow_host.sizing import Sizing
from mlflow_host.status import StepFailed

LAUNCH_DOCUMENT = Path("/etc/mlflow-host/launch.toml")
IMAGE_FACTS = Path("/usr/share/mlflow-host/image.json")
DATA = Path("/srv/mlflow")
CLUSTERS = DATA / "postgresql"
"""PostgreSQL's clusters, one for each major, in a folder of that name."""
RUN = Path("/run/mlflow-host")
CONFIG = RUN / "config.json"
SERVER_SOCKETS = Path("/run/mlflow")
POSTGRESQL_SOCKETS = Path("/run/postgresql")


@dataclass(frozen=True)
class HostConfig:
    launch: LaunchDocument
    sizing: Sizing
    url: str
    """What people open and clients set as MLFLOW_TRACKING_URI; no slash at the end."""

    @property
    def server_units(self) -> list[str]:
        """One for each of MLflow's processes; the first has what there is only one of."""
        return [f"mlflow-server@{n}.service" for n in range(1, self.sizing.server_processes + 1)]


def host_config(document: LaunchDocument, sizing: Sizing) -> HostConfig:
    name = document.web.hostnames[0]
    scheme = "http" if document.web.tls == "off" else "https"
    return HostConfig(document, sizing, f"{scheme}://[{name}]" if ":" in name else f"{scheme}://{name}")


def launch_document(path: Path = LAUNCH_DOCUMENT) -> LaunchDocument:
    """What user-data said. Raises StepFailed when it is missing or cannot be used."""
    try:
        return launch.parse(path.read_text())
    except FileNotFoundError:
        raise StepFailed(f"{path} is missing: launch this image with the user-data that the stack makes") from None
    except UnicodeDecodeError:
        raise StepFailed(f"{path} is not text in UTF-8: launch with the user-data that the stack makes") from None
    except LaunchError as error:
        raise StepFailed(f"the launch document cannot be used: {error}") from None


def load(path: Path = CONFIG) -> HostConfig:
    """Raises FileNotFoundError before `configure` has run."""
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
    """The PostgreSQL major of this image, as recorded when it was baked."""
    return int(json.loads(image_facts.read_text())["postgresql_major"])


def cluster() -> Path:
    """The cluster that this image's PostgreSQL serves."""
    return CLUSTERS / str(postgresql_major())
