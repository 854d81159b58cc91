"""The local cloud's daemon serves the AWS APIs, and makes machines, volumes and published ports match moto's records.

LocalCloud.up() runs `python -m scripts.local_cloud.daemon <state folder>`. Requests are handled one at a time. Threads
do the slow work (starting and stopping machines, copying) and then update the records. After each change, the daemon
compares moto's records with the machines. If the daemon starts after a crash, it thus completes the unfinished work.

api                the HTTP server of the AWS APIs
running_machines   machines, their volumes and metadata
databases          servers of databases
published_ports    ports of machines on this host
control_socket     commands from LocalCloud
inventory          look-ups in moto's EC2 records
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.update(
    MOTO_EC2_LOAD_DEFAULT_AMIS="false",
    MOTO_ENABLE_AMI_VALIDATION="true",
    MOTO_ENABLE_KEYPAIR_VALIDATION="true",
    MOTO_EC2_ENABLE_INSTANCE_TYPE_VALIDATION="true",
)

from werkzeug.serving import make_server

from scripts.local_cloud import (
    alarms,
    control_socket,
    ec2,
    file_systems,
    inventory,
    moto_corrections,
    moto_state,
    rds,
    route53,
    volumes,
)
from scripts.local_cloud.aws_api_server import Api, RequestHandler
from scripts.local_cloud.databases import Databases
from scripts.local_cloud.layout import Allotment, LocalCloudError, Places, read_allotment
from scripts.local_cloud.port_forwarder import raise_file_limit
from scripts.local_cloud.roles import Roles
from scripts.local_cloud.running_machines import RunningMachines

KEEP_TERMINATED_SECONDS = 3600


class Daemon(RunningMachines):
    """One local cloud: its machines, its API server, and the volumes and images of EC2 (see ec2.Bodies)."""

    def __init__(self, places: Places, allotment: Allotment) -> None:
        self.allotment = allotment
        self.checked_records = 0
        super().__init__(places, allotment, threading.RLock(), Roles(places, allotment), threading.Event())
        self.databases = Databases(places, self.api, self.roles, self.machines, self.names, self.stopping, self.spawn)
        moto_corrections.install()
        ec2.install(self, lambda: inventory.free_address(allotment.public_addresses))
        rds.install(self.databases)
        route53.install()

    def serve(self) -> None:
        app = Api(self.places, self.allotment, self.roles, self.api, self.settle_network)
        server = make_server("127.0.0.1", self.allotment.api_port, app, threaded=True, request_handler=RequestHandler)

        def shut_down() -> None:
            self.stopping.set()
            server.shutdown()

        control = (self.allotment.run_dir / "control", self._obey, shut_down)
        threading.Thread(target=control_socket.serve, args=control, daemon=True).start()
        threading.Thread(target=self._tick, daemon=True).start()
        server.serve_forever(poll_interval=0.1)

    def _obey(self, order: dict[str, Any]) -> Any:
        match order["op"]:
            case "ping":
                return os.getpid()
            case "register":
                return self.register(order["name"], order["description"], Path(order["made"]), order["architecture"])
            case "down":
                return self.power_off()
            case "status":
                return self.status()
        raise LocalCloudError(f"unknown command {order['op']!r}")

    def register(self, name: str, description: str, made: Path, architecture: str) -> str:
        """Register a source image from the folder `made` and return its AMI ID. If an image with this name exists,
        register nothing, and return the AMI ID of the existing image."""
        home = inventory.of_region(self.allotment.region)
        with self.api:
            for image in home.amis.values():
                if image.name == name and image.owner_id == ec2.CANONICAL:
                    return str(image.id)
            image = home.register_source_image(name, description, architecture)
            file_systems.record_image(self.places, image.ebs_snapshot.id, [file_systems.adopt(self.places, made)])
            moto_state.save(self.places)
            return str(image.id)

    def status(self) -> dict[str, Any]:
        home = inventory.of_region(self.allotment.region)
        with self.api:
            return {
                "instances": [
                    {"id": i.id, "state": i.state, "type": i.instance_type, "address": i.public_ip, "image": i.image_id}
                    for i in inventory.all_instances()
                ],
                "images": [{"id": a.id, "name": a.name, "state": a.state} for a in home.amis.values()],
                "volumes": [
                    {"id": v.id, "gib": v.size, "attached_to": v.attachment.instance.id if v.attachment else None}
                    for v in home.volumes.values()
                    if volumes.file_of(self.places, v.id).exists()
                ],
                "databases": [
                    {
                        "id": d.db_instance_identifier,
                        "state": d.status,
                        "name": d.address,
                        "port": d.port,
                        "address": rds.private_address(d),
                        "pid": self.databases.pid(d.dbi_resource_id),
                    }
                    for d in rds.all_instances()
                ],
            }

    def settle_network(self) -> None:
        super().settle_network()
        with self.api:
            self.databases.settle_links()

    # Images and volumes: ec2.py calls these methods while it holds the API lock

    def has_image(self, snapshot: str) -> bool:
        return file_systems.image_layers(self.places, snapshot) is not None

    def make_root(self, instance: str, snapshot: str) -> None:
        file_systems.create(self.places, instance, file_systems.image_layers(self.places, snapshot) or [])

    def forget_snapshot(self, snapshot: str) -> None:
        (self.places.images / f"{snapshot}.json").unlink(missing_ok=True)
        (self.places.snapshots / f"{snapshot}.img").unlink(missing_ok=True)
        self.spawn(self.sweep_layers)

    def make_volume(self, volume: str, gib: int, snapshot: str | None) -> None:
        volumes.create(self.places, volume, gib, snapshot)

    def forget_volume(self, volume: str) -> None:
        path = volumes.file_of(self.places, volume)
        if path.exists():
            volumes.detach(path)
            path.unlink()

    def snapshot_volume(self, volume: str, snapshot: str) -> None:
        volumes.snapshot(self.places, volume, snapshot)

    # Start, end and periodic work

    def restore(self) -> None:
        """Read moto's records, and start or stop machines until the machines match the records."""
        moto_state.load(self.places)
        with self.api:
            known = {record.id: record for record in inventory.all_instances()}
            for backend in inventory.all_backends():
                for image in backend.amis.values():
                    if image.state == "pending":
                        image.state = "failed" if not self.has_image(image.ebs_snapshot.id) else "available"
        for name in self.podman.names():
            if name not in known:
                self.podman.remove(name)
        for folder in self.places.machines.iterdir():
            if folder.name not in known:
                file_systems.delete(file_systems.RootFileSystem(folder))
        file_systems.empty(self.places.making)
        self.sweep_layers()
        for instance_id, record in known.items():
            if record.state in ("pending", "running", "stopping", "shutting-down"):
                self.settle(instance_id)
        self.databases.restore()

    def power_off(self) -> None:
        """Stop every machine and every database, and detach every volume."""
        self.stopping.set()
        self.stop_all()
        self.databases.stop_all()
        with self.api:
            for path in set(volumes.loop_devices_under(self.places.volumes).values()):
                volumes.detach(path)
            moto_state.save(self.places)

    def _tick(self) -> None:
        """Update ports, detachments, terminated instances and alarms every second. A published port on which no machine
        listens yet is checked ten times a second."""
        due = 0.0
        while not self.stopping.wait(0.1):
            try:
                if time.monotonic() < due:
                    if self.ports.awaited:
                        with self.api:
                            self.ports.settle()
                    continue
                due = time.monotonic() + 1
                self.settle_network()
                self._forget_terminated()
                self._settle_alarms()
                with self.api:
                    self.databases.settle_backups()
                self._check_records()
            except Exception:
                traceback.print_exc()

    def _settle_alarms(self) -> None:
        with self.api:
            if alarms.settle():
                moto_state.save(self.places)

    def _check_records(self) -> None:
        """If the records were saved after the last check, check that the saved file can be read."""
        saved = self.places.records.stat().st_mtime_ns if self.places.records.exists() else 0
        if saved == self.checked_records:
            return
        self.checked_records = saved
        if not moto_state.check(self.places):
            with self.api:
                moto_state.save(self.places)

    def _forget_terminated(self) -> None:
        with self.api:
            for backend in inventory.all_backends():
                for identifier, reservation in list(backend.reservations.items()):
                    if all(
                        i.state == "terminated"
                        and time.time() - getattr(i, "terminated_at", 0) > KEEP_TERMINATED_SECONDS
                        for i in reservation.instances
                    ):
                        del backend.reservations[identifier]


def main() -> None:
    places = Places(Path(sys.argv[1]))
    allotment = read_allotment(places)
    if allotment is None:
        raise SystemExit(f"no local cloud in {places.root}")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise_file_limit()
    daemon = Daemon(places, allotment)
    try:
        daemon.restore()
    except LocalCloudError as error:
        print(error, file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    daemon.serve()


if __name__ == "__main__":
    main()
