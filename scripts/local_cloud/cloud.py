"""The class LocalCloud, which starts, stops and uses one local cloud."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from botocore.config import Config

from scripts import aws_session, invoker
from scripts.local_cloud import (
    base_images,
    database_server,
    file_systems,
    machines,
    object_store,
    object_store_ca,
    volumes,
)
from scripts.local_cloud.layout import (
    Allotment,
    LocalCloudError,
    Places,
    allot,
    default_state_dir,
    give_number_back,
    read_allotment,
)

START_SECONDS = 90
TOOLS = {
    "podman": "podman",
    "slirp4netns": "slirp4netns",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "losetup": "mount",
    "nginx": "nginx-light",
}
"""Programs that the cloud runs, each with its Debian package."""


class LocalCloud:
    """One local cloud, identified by its state folder. This object contains only paths and owns no process."""

    def __init__(self, state_dir: Path | str | None = None, tell: Callable[[str], None] | None = None) -> None:
        """`tell` is called with each line of progress. By default, the progress is printed to stderr."""
        self.places = Places(Path(state_dir).absolute() if state_dir else default_state_dir())
        self.tell = tell or base_images.tell_on_stderr

    # Endpoints and clients

    @property
    def allotment(self) -> Allotment:
        """The cloud's number, ports and keys. Raises LocalCloudError if the cloud was never started."""
        allotment = read_allotment(self.places)
        if allotment is None:
            raise LocalCloudError(f"there is no local cloud in {self.places.root}: start one with `local_cloud up`")
        return allotment

    @property
    def endpoint(self) -> str:
        return self.allotment.endpoint

    @property
    def s3_endpoint(self) -> str:
        """S3's HTTPS endpoint, whose certificate is signed by `s3_authority`."""
        return self.allotment.s3_endpoint

    @property
    def s3_plain_endpoint(self) -> str:
        """S3's HTTP endpoint."""
        return self.allotment.s3_plain_endpoint

    @property
    def s3_authority(self) -> str:
        """PEM certificate of the authority that signed the object store's certificate."""
        return object_store_ca.authority_file(self.places).read_text()

    @property
    def region(self) -> str:
        return self.allotment.region

    def environment(self) -> dict[str, str]:
        """Return environment variables that make any AWS client use this cloud."""
        allotment = self.allotment
        return {
            "AWS_ENDPOINT_URL": allotment.endpoint,
            "AWS_ENDPOINT_URL_S3": allotment.s3_endpoint,
            "AWS_CA_BUNDLE": str(object_store_ca.authority_file(self.places)),
            "AWS_ACCESS_KEY_ID": allotment.access_key,
            "AWS_SECRET_ACCESS_KEY": allotment.secret_key,
            "AWS_REGION": allotment.region,
            "AWS_DEFAULT_REGION": allotment.region,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self, service: str, **options: Any) -> Any:
        """Return a boto3 client for `service` in this cloud."""
        allotment = self.allotment
        settings: dict[str, Any] = {
            "endpoint_url": allotment.s3_endpoint if service == "s3" else allotment.endpoint,
            "verify": str(object_store_ca.authority_file(self.places)),
            "region_name": allotment.region,
            "aws_access_key_id": allotment.access_key,
            "aws_secret_access_key": allotment.secret_key,
            "config": Config(s3={"addressing_style": "path"}, retries={"max_attempts": 3, "mode": "standard"}),
        }
        connect: Any = aws_session.isolated().client
        return connect(service, **(settings | options))

    # Starting and stopping

    def up(self) -> None:
        """Start the object store and the daemon if they are not running. The daemon restarts the machines at its start.

        Idempotent. Raises LocalCloudError with the remedy.
        """
        _require_tools()
        machines.allow_many()
        self.places.make()
        with self._locked():
            allotment = allot(self.places)
            self._hand_over()
            allotment.run_dir.mkdir(parents=True, exist_ok=True)
            knows_sessions = object_store.sessions_file(self.places).exists()
            speaks_tls = object_store_ca.certificate_file(self.places).exists()
            if not knows_sessions or not speaks_tls or not object_store.answers(allotment):
                object_store.stop(self.places)
                object_store.write_identities(self.places, allotment)
                self.tell("starting the object store")
                object_store.start(self.places, allotment)
            if not self._answers():
                self._end_daemon()
                self.tell("starting the AWS APIs")
                self._start_daemon(allotment)
        self.tell(
            f"the local cloud is up: {allotment.endpoint} (S3 {allotment.s3_endpoint}), state in {self.places.root}"
        )

    def _hand_over(self) -> None:
        """Make the sudo user the owner of the files that clients read: the access keys and the authority's
        certificate."""
        for path in (self.places.allotment, object_store_ca.ensure(self.places)):
            invoker.hand_over(path)

    def is_up(self) -> bool:
        return read_allotment(self.places) is not None and self._answers()

    def source_ami(self, base: str = "debian12") -> str:
        """Return the AMI ID of a source image of Canonical's account, 099720109477. If the source image does not exist,
        the function builds it first."""
        chosen = base_images.choose(base)
        for image in self.client("ec2").describe_images(Owners=["099720109477"])["Images"]:
            if image["Name"] == chosen.ami_name:
                return str(image["ImageId"])
        with self._locked():
            made = base_images.build(self.places, chosen, self.tell)
            return self.register_source_image(chosen.ami_name, chosen.description, made, chosen.architecture)

    def register_source_image(self, name: str, description: str, made: Path, architecture: str = "x86_64") -> str:
        """Turn a folder in `places.making` into a public image of Canonical's account, and return the AMI ID."""
        return str(
            self._order("register", name=name, description=description, made=str(made), architecture=architecture)
        )

    def down(self) -> None:
        """Stop the machines, the daemon and the object store. All data stays for the next `up`. Idempotent."""
        allotment = read_allotment(self.places)
        if allotment is None:
            return
        with self._locked():
            self._down(allotment)

    def _down(self, allotment: Allotment) -> None:
        if self._answers():
            self.tell("stopping the machines")
            self._order("down", timeout=300)
            self._wait_for_daemon_to_end()
        self._end_daemon()
        self._sweep(allotment)
        object_store.stop(self.places)

    def purge(self) -> None:
        """End all processes of the cloud, then delete its state folder. Idempotent."""
        allotment = read_allotment(self.places)
        if allotment is not None:
            with self._locked():
                self._end_daemon()
                self._sweep(allotment)
                object_store.stop(self.places)
            file_systems.delete_tree(allotment.run_dir)
            give_number_back(self.places, allotment.number)
        if self.places.root.exists() and (allotment is not None or not any(self.places.root.iterdir())):
            file_systems.delete_tree(self.places.root)

    def status(self) -> dict[str, Any]:
        """Return the cloud's state and endpoints. If the cloud is up, also return the instances, images, volumes and
        databases."""
        allotment = read_allotment(self.places)
        if allotment is None:
            return {"state": "absent", "state_dir": str(self.places.root)}
        up = self._answers()
        status: dict[str, Any] = {
            "state": "up" if up else "down",
            "state_dir": str(self.places.root),
            "endpoint": allotment.endpoint,
            "s3_endpoint": allotment.s3_endpoint,
            "region": allotment.region,
            "object_store": object_store.running_pid(self.places) is not None,
        }
        if up:
            status |= self._order("status")
        return status

    # Access to machines

    def console_output(self, instance_id: str) -> str:
        """Return the machine's console output since its last start."""
        return machines.console_text(self.places.machines / instance_id / "console.log")

    def exec(
        self, instance_id: str, argv: Sequence[str], *, input: str | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a program as root in a machine. Raises LocalCloudError if the machine is not running."""
        return subprocess.run(
            machines.enter_command(self._pid(instance_id), argv),
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def exec_or_none(self, instance_id: str, argv: Sequence[str]) -> int | None:
        """Run a program in a machine, and return the program's exit status. Returns None if the machine is off or does
        not respond."""
        with contextlib.suppress(LocalCloudError, subprocess.TimeoutExpired):
            return self.exec(instance_id, argv, timeout=10).returncode
        return None

    def shell_command(self, instance_id: str, argv: Sequence[str] = ("/bin/bash", "-l")) -> list[str]:
        """Return the command that opens a root shell in a machine. Raises LocalCloudError if the machine is off."""
        return machines.enter_command(self._pid(instance_id), argv)

    def _pid(self, instance_id: str) -> int:
        if os.geteuid() != 0:
            raise LocalCloudError("only root can enter a machine: use sudo")
        pid = machines.running_pid(self.places.machines / instance_id / "pid")
        if pid is None:
            raise LocalCloudError(f"{instance_id} is not running")
        return pid

    # The daemon

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock file, so that only one `up`, `down` or `purge` runs at a time."""
        invoker.make_private_folder(self.places.root)
        with (self.places.root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _start_daemon(self, allotment: Allotment) -> None:
        self.places.log.touch(mode=0o600)
        with self.places.log.open("ab") as log:
            daemon = subprocess.Popen(
                [sys.executable, "-m", "scripts.local_cloud.daemon", str(self.places.root)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=Path(__file__).parents[2],
                start_new_session=True,
                env={name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
            )
        (self.places.root / "daemon.pid").write_text(str(daemon.pid))
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if daemon.poll() is not None or time.monotonic() > deadline:
                tail = self.places.log.read_text(errors="replace")[-500:].strip()
                raise LocalCloudError(f"the local cloud's daemon did not start; {self.places.log} ends with: {tail}")
            time.sleep(0.05)

    def _daemon_pid(self) -> int | None:
        try:
            pid = int((self.places.root / "daemon.pid").read_text())
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        # In earlier checkouts, the daemon's module was named `local_cloud.daemon`.
        words = arguments.split(b"\0")
        ours = os.fsencode(self.places.root) in words and any(word.endswith(b"local_cloud.daemon") for word in words)
        return pid if ours else None

    def _end_daemon(self) -> None:
        if pid := self._daemon_pid():
            os.kill(pid, signal.SIGKILL)
            self._wait_for_daemon_to_end()

    def _wait_for_daemon_to_end(self) -> None:
        deadline = time.monotonic() + 20
        while self._daemon_pid() is not None and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            self._order("ping", timeout=5)
        except PermissionError:
            # Only root can open the control socket, but the current user may be allowed to read the access keys.
            return self._listens()
        except (OSError, ValueError, LocalCloudError):
            return False
        return True

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.allotment.api_port), timeout=5):
            return True
        return False

    def _order(self, op: str, timeout: float = 60, **arguments: Any) -> Any:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(str(self.allotment.run_dir / "control"))
            with connection.makefile("rwb") as stream:
                stream.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
                stream.flush()
                answer = json.loads(stream.readline())
        if not answer["ok"]:
            raise LocalCloudError(answer["error"])
        return answer["result"]

    def _sweep(self, allotment: Allotment) -> None:
        """Remove the containers, databases, mounts and loop devices that a killed daemon left."""
        podman = machines.Podman(self.places, allotment)
        for name in podman.names():
            podman.remove(name)
        for folder in self.places.databases.glob("*"):
            database_server.kill_leftover(folder)
        for folder in self.places.machines.glob("*"):
            file_systems.unmount(file_systems.RootFileSystem(folder))
        for path in set(volumes.loop_devices_under(self.places.volumes).values()):
            volumes.detach(path)


def _require_tools() -> None:
    if os.geteuid() != 0:
        raise LocalCloudError("the local cloud needs root: it runs systemd machines and loop devices; use sudo")
    wanted = TOOLS if machines.has_unified_cgroups() else {**TOOLS, "runc": "runc"}
    missing = [package for program, package in wanted.items() if shutil.which(program) is None]
    if missing:
        raise LocalCloudError(f"the local cloud needs programs that are missing: apt-get install {' '.join(missing)}")
