"""The folders and files of a local cloud, and the addresses, ports and keys that it keeps until it is purged.

One folder contains everything that survives `down`: the records of the AWS APIs (`api.pickle`), root file systems
(`layers/`, `images/`), machines (`machines/`), volumes, buckets. Another, under /run, contains files that must not
survive a restart of the host.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts import invoker

ACCOUNT = "123456789012"
"""The account of every caller; moto's default."""

REGION = "eu-central-1"

HIGHEST_CLOUD = 254
"""Clouds are numbered by the third octet of their loopback addresses, 127.10.<number>.N."""


class LocalCloudError(Exception):
    """An error that the user can correct; the message is one sentence with the remedy."""


def default_state_dir() -> Path:
    """$MLFLOW_AMI_LOCAL_CLOUD, else a folder under $XDG_STATE_HOME (~/.local/state)."""
    if chosen := os.environ.get("MLFLOW_AMI_LOCAL_CLOUD"):
        return Path(chosen).absolute()
    return state_home() / "local-cloud"


def state_home() -> Path:
    """Through sudo it is in the home of the sudo user, so that this user can connect to their own server."""
    home = os.environ.get("XDG_STATE_HOME") or str(invoker.home() / ".local/state")
    return Path(home) / "mlflow-ami"


@dataclass(frozen=True)
class Places:
    """Paths of one local cloud."""

    root: Path

    @property
    def allotment(self) -> Path:
        return self.root / "cloud.json"

    @property
    def records(self) -> Path:
        return self.root / "api.pickle"

    @property
    def calls(self) -> Path:
        """Log of program and action, one line each: "Packer ec2:CreateImage"."""
        return self.root / "calls.txt"

    @property
    def layers(self) -> Path:
        return self.root / "layers"

    @property
    def making(self) -> Path:
        """Layers being made. Anything found here at start is an aborted attempt."""
        return self.root / "making"

    @property
    def trash(self) -> Path:
        return self.root / "trash"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def machines(self) -> Path:
        return self.root / "machines"

    @property
    def volumes(self) -> Path:
        return self.root / "volumes"

    @property
    def snapshots(self) -> Path:
        return self.root / "snapshots"

    @property
    def object_store(self) -> Path:
        return self.root / "object-store"

    @property
    def containers(self) -> Path:
        return self.root / "containers"

    @property
    def log(self) -> Path:
        return self.root / "daemon.log"

    def make(self) -> None:
        """Create the folders; readable by root only, because volumes and records hold secrets."""
        invoker.make_private_folder(self.root)
        for folder in (
            self.layers,
            self.making,
            self.trash,
            self.images,
            self.machines,
            self.volumes,
            self.snapshots,
            self.object_store,
            self.containers,
        ):
            folder.mkdir(exist_ok=True, mode=0o700)


@dataclass(frozen=True)
class Allotment:
    """Number, ports and keys that a cloud gets at its first `up` and keeps until it is purged."""

    number: int
    api_port: int
    s3_port: int
    region: str
    access_key: str
    secret_key: str

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    @property
    def s3_plain_endpoint(self) -> str:
        return f"http://127.0.0.1:{self.s3_port}"

    @property
    def s3_tls_port(self) -> int:
        """The object store's HTTPS port, derived from the cloud's number."""
        return object_store_ports(self.number)[-1] + 1

    @property
    def s3_endpoint(self) -> str:
        return f"https://127.0.0.1:{self.s3_tls_port}"

    @property
    def inner_s3_ports(self) -> tuple[int, int]:
        """SeaweedFS's own ports for S3, HTTP and HTTPS, on the inner address; clients use nginx's ports."""
        return self.s3_tls_port + 1, self.s3_tls_port + 2

    @property
    def inner_address(self) -> str:
        """The address of the object store's own processes; machines cannot reach it."""
        return f"127.10.{self.number}.1"

    @property
    def public_addresses(self) -> list[str]:
        """The addresses of machines and Elastic IPs, all on this host's loopback."""
        return [f"127.10.{self.number}.{host}" for host in range(2, 255)]

    @property
    def run_dir(self) -> Path:
        """Sockets and container run state: on tmpfs, so that podman detects a restart of the host."""
        return Path(f"/run/mlflow-ami/local-cloud-{self.number}")


def read_allotment(places: Places) -> Allotment | None:
    """The allotment of a cloud that was started before, else None."""
    try:
        return Allotment(**json.loads(places.allotment.read_text()))
    except FileNotFoundError:
        return None
    except PermissionError:
        raise LocalCloudError(invoker.not_readable(places.allotment)) from None


def allot(places: Places) -> Allotment:
    """Read the allotment or create one: an unused cloud number, two free ports, an access key.

    Raises LocalCloudError if all numbers are in use.
    """
    if known := read_allotment(places):
        return known
    number = _take_number(places)
    allotment = Allotment(
        number=number,
        api_port=_free_port(21000 + 2 * number),
        s3_port=_free_port(21001 + 2 * number),
        region=REGION,
        access_key="AKIA" + "".join(secrets.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567") for _ in range(16)),
        secret_key=secrets.token_urlsafe(30),
    )
    write_atomically(places.allotment, json.dumps(asdict(allotment), indent=2).encode())
    return allotment


def _numbers_dir() -> Path:
    return Path("/var/lib/mlflow-ami-local-clouds")


def _take_number(places: Places) -> int:
    """Claim the lowest free number by a symlink to the state folder: creating one is atomic."""
    claims = _numbers_dir()
    claims.mkdir(parents=True, exist_ok=True)
    for number in range(HIGHEST_CLOUD + 1):
        claim = claims / str(number)
        if claim.is_symlink():
            owner = claim.readlink()
            if owner != places.root and (owner / "cloud.json").exists():
                continue
            if owner != places.root and owner.exists() and any(owner.iterdir()):
                continue
            claim.unlink(missing_ok=True)
        # A state folder that was deleted by hand may have left its object store running.
        if not all(_is_free(f"127.10.{number}.1", port) for port in object_store_ports(number)):
            continue
        try:
            claim.symlink_to(places.root)
        except FileExistsError:
            continue
        return number
    raise LocalCloudError(f"all {HIGHEST_CLOUD + 1} local clouds of this host are in use: purge one of {claims}/*")


def give_number_back(places: Places, number: int) -> None:
    claim = _numbers_dir() / str(number)
    if claim.is_symlink() and claim.readlink() == places.root:
        claim.unlink()


def _free_port(wanted: int) -> int:
    """`wanted` if it is free, else the next free port below the ephemeral range."""
    for port in [wanted, *range(22000, 30000)]:
        if _is_free("127.0.0.1", port):
            return int(port)
    raise LocalCloudError("no free TCP port between 21000 and 30000 on 127.0.0.1")


def _is_free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def object_store_ports(number: int) -> tuple[int, int, int]:
    """Ports of the object store's master, volume and filer on a cloud's inner address.

    Its processes also use sockets in /tmp named by port alone (and by the port + 10000 for gRPC): two clouds with the
    same ports would write into each other's buckets.
    """
    first = 13000 + 10 * number
    return first, first + 1, first + 2


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves either the old or the new one; only the owner can read it."""
    temporary = path.with_name(path.name + ".new")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2).encode())
