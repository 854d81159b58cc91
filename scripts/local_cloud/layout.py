"""The folders and files of a local cloud, and the addresses, ports and keys that the cloud keeps until it is purged.

The state folder contains everything that survives `down`: the records of the AWS APIs (`api.pickle`), root file systems
(`layers/`, `images/`), machines (`machines/`), volumes, buckets. A folder under /run contains files that must not
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
"""The AWS account of every caller, which is moto's default account."""

REGION = "eu-central-1"

HIGHEST_CLOUD = 254
"""Highest number of a cloud. The number is the third octet of the cloud's loopback addresses, 127.10.<number>.N."""


class LocalCloudError(Exception):
    """An error that the user can correct; the message is one sentence with the remedy."""


def default_state_dir() -> Path:
    """Return $MLFLOW_AMI_LOCAL_CLOUD if it is set, otherwise a folder under $XDG_STATE_HOME (~/.local/state)."""
    if chosen := os.environ.get("MLFLOW_AMI_LOCAL_CLOUD"):
        return Path(chosen).absolute()
    return state_home() / "local-cloud"


def state_home() -> Path:
    """Return this project's state folder. Under sudo, the folder is in the sudo user's home folder, so that this user
    can read the files that are needed to connect to the server."""
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
        """Log of AWS calls. Each line contains a program and an action: "Packer ec2:CreateImage"."""
        return self.root / "calls.txt"

    @property
    def layers(self) -> Path:
        return self.root / "layers"

    @property
    def making(self) -> Path:
        """The folder for unfinished layers. When the daemon starts, it deletes the layers that aborted operations left
        in this folder."""
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
    def databases(self) -> Path:
        return self.root / "databases"

    @property
    def database_snapshots(self) -> Path:
        return self.root / "database-snapshots"

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
        """Create the folders. Only root can read these folders, because volumes and records contain secrets."""
        invoker.make_private_folder(self.root)
        for folder in (
            self.layers,
            self.making,
            self.trash,
            self.images,
            self.machines,
            self.volumes,
            self.snapshots,
            self.databases,
            self.database_snapshots,
            self.object_store,
            self.containers,
        ):
            folder.mkdir(exist_ok=True, mode=0o700)


@dataclass(frozen=True)
class Allotment:
    """Number, ports and keys of a cloud. The first `up` of a cloud creates the allotment, and `purge` deletes it."""

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
        """SeaweedFS's HTTP and HTTPS ports for S3 on the inner address. Clients use nginx's ports instead."""
        return self.s3_tls_port + 1, self.s3_tls_port + 2

    @property
    def inner_address(self) -> str:
        """The address on which the object store's processes listen. Machines cannot reach this address."""
        return f"127.10.{self.number}.1"

    @property
    def public_addresses(self) -> list[str]:
        """The loopback addresses of this host that machines and Elastic IPs use."""
        return [f"127.10.{self.number}.{host}" for host in range(2, 255)]

    @property
    def run_dir(self) -> Path:
        """Folder for sockets and podman's run state, on tmpfs so that podman detects a restart of the host."""
        return Path(f"/run/mlflow-ami/local-cloud-{self.number}")


def read_allotment(places: Places) -> Allotment | None:
    """Return the allotment of a cloud, or None if the cloud was never started."""
    try:
        return Allotment(**json.loads(places.allotment.read_text()))
    except FileNotFoundError:
        return None
    except PermissionError:
        raise LocalCloudError(invoker.not_readable(places.allotment)) from None


def allot(places: Places) -> Allotment:
    """Read the allotment of a cloud. If the cloud has no allotment, create one: an unused number, two free ports, keys.

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
    """Claim the lowest free number with a symlink to the state folder, because creating a symlink is atomic."""
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
        # If a user deleted the state folder without `purge`, the object store may still use these ports.
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
    """Return `wanted` if this port is free, otherwise the first free port from 22000 to 29999."""
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
    """Return the ports of the object store's master, volume and filer on a cloud's inner address.

    Each cloud needs different ports. The object store also uses sockets in /tmp, whose names contain only the port (or
    the port + 10000 for gRPC). Two clouds with the same ports would thus write to each other's buckets.
    """
    first = 13000 + 10 * number
    return first, first + 1, first + 2


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that only the owner can read. A crash leaves either the old content or the new content."""
    temporary = path.with_name(path.name + ".new")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2).encode())
