"""nginx with the configuration that the image ships, moved below a folder and onto ports of loopback."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests import services

ROOTFS = Path(__file__).parents[1] / "provisioning/rootfs"
HOST = "127.0.0.1"
FOLDERS = (
    "run/mlflow",
    "run/mlflow-host/logins",
    "run/mlflow-host/nginx",
    "run/mlflow-host/status",
    "run/mlflow-host/suspects",
    "run/mlflow-host/web",
    "run/nginx",
    "var/lib/nginx",
    "var/log/nginx",
)


def move(folder: Path, listens: Mapping[int, str]) -> Path:
    """Copy the configuration below `folder`; `listens` is as for `moved`. Returns nginx.conf.

    The folder is to be open to www-data, as whom nginx's workers run.
    """
    for source in [*(ROOTFS / "etc/nginx").iterdir(), *(ROOTFS / "usr/share/mlflow-host").glob("*")]:
        if source.is_file():
            target = folder / source.relative_to(ROOTFS)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(moved(source.read_text(), folder, listens))
    shutil.copy("/etc/nginx/mime.types", folder / "etc/nginx/mime.types")
    for name in FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ("logins", "suspects"):
        shutil.chown(folder / "run/mlflow-host" / name, "www-data", "www-data")
    return folder / "etc/nginx/nginx.conf"


def moved(text: str, folder: Path, listens: Mapping[int, str]) -> str:
    """A configuration or template with its paths below `folder`; where it listens on a port, on that of `listens`."""
    for path in ("/run/mlflow-host", "/run/nginx", "/run/mlflow/", "/var/log/nginx", "/usr/share/mlflow-host"):
        text = text.replace(f" {path}", f" {folder}{path}").replace(f"unix:{path}", f"unix:{folder}{path}")
    text = text.replace("/etc/nginx/", f"{folder}/etc/nginx/")
    for port, address in listens.items():
        text = text.replace(f"listen {port}", f"listen {address}")
    return text


@contextlib.contextmanager
def nginx(configuration: Path, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """nginx with this configuration, once it listens on the port of loopback. Raises RuntimeError with its log."""
    with services.process(["nginx", "-c", str(configuration), "-g", "daemon off;"], log) as running:
        services.wait_until(lambda: listening(port), running, log)
        yield running


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0
