"""Run nginx with the image's configuration, but with its paths below a folder and its ports on loopback."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.support import services

ROOTFS = Path(__file__).parents[2] / "provisioning/rootfs"
HOST = "127.0.0.1"
FOLDERS = (
    "run/mlflow",
    "run/mlflow-host/logins",
    "run/mlflow-host/nginx",
    "run/mlflow-host/status",
    "run/mlflow-host/suspects",
    "run/mlflow-host/web",
    "run/nginx",
    "srv/mlflow/reports",
    "var/lib/nginx",
    "var/log/nginx",
)


def move(folder: Path, listens: Mapping[int, str]) -> Path:
    """Copy the configuration below `folder`, and return the path of nginx.conf.

    `listens` maps a port in the configuration to its replacement, for example 80 to "127.0.0.1:20080". www-data, the
    user of nginx's workers, must have access to `folder`.
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
    """Return a configuration or template in which paths are below `folder` and ports are replaced as `listens`
    states."""
    for path in (
        "/run/mlflow-host",
        "/run/nginx",
        "/run/mlflow/",
        "/srv/mlflow/",
        "/var/log/nginx",
        "/usr/share/mlflow-host",
    ):
        text = text.replace(f" {path}", f" {folder}{path}").replace(f"unix:{path}", f"unix:{folder}{path}")
    text = text.replace("/etc/nginx/", f"{folder}/etc/nginx/")
    for port, address in listens.items():
        text = text.replace(f"listen {port}", f"listen {address}")
    return text


def starting_site(folder: Path, listens: Mapping[int, str]) -> Path:
    """Copy the configuration of a booting machine below `folder`, and return the path of nginx.conf."""
    configuration = move(folder, listens)
    for target, source in (("site.conf", "starting.conf"), ("starting-tls.conf", "starting-tls.conf")):
        shutil.copy(folder / "usr/share/mlflow-host" / source, folder / "run/mlflow-host/nginx" / target)
    unit = (ROOTFS / "etc/systemd/system/nginx.service").read_text().replace("\\\n", "")
    for command in re.findall("^ExecStartPre=(.*)", unit, re.MULTILINE):
        subprocess.run(shlex.split(moved(command, folder, {})), check=True, capture_output=True)
    return configuration


@contextlib.contextmanager
def running_nginx(configuration: Path, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run nginx, and yield when it listens on the port of loopback. Raises RuntimeError with nginx's log."""
    with services.process(["nginx", "-c", str(configuration), "-g", "daemon off;"], log) as running:
        services.wait_until(lambda: listening(port), running, log)
        yield running


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0
