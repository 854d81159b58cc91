"""Where a local cloud keeps what it is made of, and what was allotted to it for life.

One folder holds everything that survives `down`: the records of the AWS APIs (`api.pickle`), root file systems
(`layers/`, `images/`), machines (`machines/`), volumes, buckets. Another, under /run, holds what must not survive a
restart of the host.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ACCOUNT = "123456789012"
"""The account every caller belongs to; moto's own default."""

REGION = "eu-central-1"

HIGHEST_CLOUD = 254
"""Clouds are numbered by the third octet of their loopback addresses, 127.10.<number>.N."""


class LocalCloudError(Exception):
    """Something the person at the keyboard can put right; the message is one sentence that says how."""


def default_state_dir() -> Path:
    """$MLFLOW_AMI_LOCAL_CLOUD, else a folder under $XDG_STATE_HOME (~/.local/state)."""
    if chosen := os.environ.get("MLFLOW_AMI_LOCAL_CLOUD"):
        return Path(chosen).absolute()
    return state_home() / "local-cloud"


def state_home() -> Path:
    home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
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
    def layers(self) -> Path:
        return self.root / "layers"

    @property
    def making(self) -> Path:
        """Layers being made; what is found here at start was given up."""
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
        """Creates the folders; readable by root only, since volumes and records hold secrets."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
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
    """What a cloud was given at its first `up` and keeps until it is purged."""

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
    def s3_endpoint(self) -> str:
        return f"http://127.0.0.1:{self.s3_port}"

    @property
    def s3_tls_port(self) -> int:
        """The object store again, by HTTPS; a number that follows from the cloud's, as its inner ports do."""
        return object_store_ports(self.number)[-1] + 1

    @property
    def s3_tls_endpoint(self) -> str:
        return f"https://127.0.0.1:{self.s3_tls_port}"

    @property
    def inner_address(self) -> str:
        """Where the object store's own parts talk to each other: not reachable from machines."""
        return f"127.10.{self.number}.1"

    @property
    def public_addresses(self) -> list[str]:
        """The addresses machines and Elastic IPs are given, all on this host's loopback."""
        return [f"127.10.{self.number}.{host}" for host in range(2, 255)]

    @property
    def run_dir(self) -> Path:
        """Sockets and container run state: on tmpfs, so that podman sees a restart of the host."""
        return Path(f"/run/mlflow-ami/local-cloud-{self.number}")


def read_allotment(places: Places) -> Allotment | None:
    """The allotment of a cloud that was up before, else None."""
    if not places.allotment.exists():
        return None
    return Allotment(**json.loads(places.allotment.read_text()))


def allot(places: Places) -> Allotment:
    """Reads the allotment or makes one: a number no other cloud of this host holds, two free ports, an access key.

    Raises LocalCloudError when all numbers are taken.
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
    """Claims the lowest free number by a symlink to the state folder: creating one is atomic."""
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
    """`wanted` when nothing listens there, else the next free port below the ephemeral range."""
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

    Its parts also talk through sockets in /tmp named by port alone (and by the port + 10000 for gRPC): two clouds with
    the same ports would write into each other's buckets.
    """
    first = 13000 + 10 * number
    return first, first + 1, first + 2


def write_atomically(path: Path, content: bytes) -> None:
    """Writes so that a crash leaves either the old file or the new one; only the owner can read it."""
    temporary = path.with_name(path.name + ".new")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2).encode())
