"""Start, stop and reboot machines to match the EC2 records, and create images of machines."""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts.local_cloud import ec2, file_systems, inventory, machines, moto_state, namespaces, volumes
from scripts.local_cloud.imds_document import describe
from scripts.local_cloud.imds_server import ADDRESS, Metadata, MetadataService
from scripts.local_cloud.layout import Allotment, Places
from scripts.local_cloud.machines import Disk, Machine, Podman, Size
from scripts.local_cloud.name_server import NameServer
from scripts.local_cloud.published_ports import PublishedPorts
from scripts.local_cloud.roles import Roles


class RunningMachines:
    """This object owns one cloud's machines and the machines' metadata services. Threads do the slow work without the
    API lock. Each instance has a lock, so that one thread at a time changes the instance."""

    def __init__(
        self, places: Places, allotment: Allotment, api: threading.RLock, roles: Roles, stopping: threading.Event
    ) -> None:
        self.places = places
        self.api = api
        self.roles = roles
        self.stopping = stopping
        self.podman = Podman(places, allotment)
        self.machines: dict[str, Machine] = {}
        self.services: dict[str, tuple[MetadataService, NameServer]] = {}
        self.names: dict[str, str] = {}  # name in DNS → private address
        self.facts: dict[str, Metadata] = {}
        self.instance_locks: dict[str, threading.Lock] = {}
        self.ports = PublishedPorts(allotment, self.machines, api, stopping, self.settle_network)

    def settle(self, instance: str) -> None:
        self.spawn(self._settle, instance)

    def reboot(self, instance: str) -> None:
        self.spawn(self._reboot, instance)

    def make_image(self, image: str, instance: str, *, reboot: bool) -> None:
        self.spawn(self._make_image, image, instance, reboot)

    def pull_the_plug(self, instance: str) -> None:
        if machine := self.machines.get(instance):
            machines.kill(machine)

    def is_mounted(self, instance: str, volume: str) -> bool:
        machine = self.machines.get(instance)
        return machine is not None and machines.is_mounted(machine, volume)

    def console(self, instance: str) -> str:
        return machines.console_text(self.console_path(instance))

    def console_path(self, instance: str) -> Path:
        return self.places.machines / instance / "console.log"

    def pid_file(self, instance: str) -> Path:
        return self.places.machines / instance / "pid"

    def stop_all(self) -> None:
        """Stop every machine. The EC2 records keep the state `running`, so that the next `up` starts the machines."""
        threads = [threading.Thread(target=self._stop_one, args=(each,)) for each in self.podman.names()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _stop_one(self, instance_id: str) -> None:
        with self._only_one(instance_id):
            self._stop(instance_id, force=False)

    def settle_network(self) -> None:
        """Publish the ports that security groups allow, and update the volumes and metadata of every machine."""
        with self.api:
            for instance_id in list(self.services):
                self._renew_facts(instance_id)
            self._finish_detachments()
            for instance_id in list(self.machines):
                self._sync_disks(instance_id)
            self.ports.settle()

    def sweep_layers(self) -> None:
        """Delete all layers that no image and no machine uses."""
        with self.api:
            file_systems.discard_unused_layers(self.places)
        file_systems.empty(self.places.trash)

    def spawn(self, work: Callable[..., None], *arguments: Any) -> None:
        def guarded() -> None:
            try:
                work(*arguments)
            except Exception:
                traceback.print_exc()

        threading.Thread(target=guarded, daemon=True).start()

    @contextlib.contextmanager
    def _only_one(self, instance: str) -> Iterator[None]:
        with self.instance_locks.setdefault(instance, threading.Lock()):
            yield

    def _settle(self, instance_id: str) -> None:
        """Start, stop or delete the machine as its instance's record requires."""
        with self._only_one(instance_id):
            with self.api:
                record = inventory.find(instance_id)
                state = record.state if record else "terminated"
            if self.stopping.is_set():
                return
            if state in ("pending", "running") and instance_id not in self.machines:
                self._start(instance_id)
            elif state == "stopping":
                self._stop(instance_id, force=False)
                with self.api:
                    if record.state == "stopping":  # another request may have terminated the instance
                        record.ec2_backend.finish_stop(record)
                    self._sync_disks(instance_id)
                    moto_state.save(self.places)
            elif state in ("shutting-down", "terminated") and record is not None:
                self._stop(instance_id, force=False)
                file_systems.delete(file_systems.RootFileSystem(self.places.machines / instance_id))
                with self.api:
                    if state == "shutting-down":
                        record.ec2_backend.finish_termination(record)
                        record.terminated_at = time.time()
                    self._sync_disks(instance_id)
                    moto_state.save(self.places)
                self.sweep_layers()
        self.settle_network()

    def _start(self, instance_id: str) -> None:
        try:
            machine = self._adopt(instance_id) or self._boot(instance_id)
        except Exception as error:
            traceback.print_exc()
            self._stop(instance_id, force=True)
            with self.api:
                record = inventory.find(instance_id)
                fresh = record.state == "pending" and not (self.places.machines / instance_id / "booted").exists()
                ec2.set_state(record, ec2.SHUTTING_DOWN if fresh else ec2.STOPPED)
                record.state_reason.code = "Server.InternalError"
                record.state_reason.message = f"Server.InternalError: {printable(error)}"
                moto_state.save(self.places)
            if fresh:
                self.settle(instance_id)
            return
        (self.places.machines / instance_id / "booted").touch()
        self.machines[instance_id] = machine
        threading.Thread(target=self._watch, args=(machine,), daemon=True).start()
        with self.api:
            record = inventory.find(instance_id)
            if record.state == "pending":
                ec2.set_state(record, ec2.RUNNING)
                moto_state.save(self.places)

    def _boot(self, instance_id: str) -> Machine:
        with self.api:
            record = inventory.find(instance_id)
            hostname = record.private_dns_name.partition(".")[0]
            size = Size(*ec2.size_of(record.instance_type))
            private_address = record.private_ip
            disks = [Disk(v, volumes.attach(volumes.file_of(self.places, v))) for v in inventory.disks_of(record)]
            self._renew_facts(instance_id)
        self.podman.remove(instance_id)
        root = file_systems.RootFileSystem(self.places.machines / instance_id)
        mounted = file_systems.mount(self.places, root)
        return machines.boot(
            self.podman,
            instance_id,
            mounted,
            hostname,
            size,
            private_address,
            disks,
            self.console_path(instance_id),
            self.pid_file(instance_id),
            lambda namespace, beyond: self._open_inside(instance_id, namespace, beyond),
        )

    def _adopt(self, instance_id: str) -> Machine | None:
        with self.api:
            private_address = inventory.find(instance_id).private_ip
            self._renew_facts(instance_id)
        return machines.adopt(
            instance_id,
            private_address,
            self.pid_file(instance_id),
            lambda namespace, beyond: self._open_inside(instance_id, namespace, beyond),
        )

    def _open_inside(self, instance_id: str, namespace: int, beyond: int) -> None:
        """Start the machine's metadata service and name server, and forward S3 and the APIs to the machine's loopback
        address."""
        self.services[instance_id] = (
            MetadataService(namespaces.listener(ADDRESS, 80, beyond), lambda: self.metadata(instance_id)),
            NameServer(beyond, self.names.get),
        )
        self.ports.open_inside(instance_id, namespace)

    def metadata(self, instance_id: str) -> Metadata | None:
        """Return the last recorded metadata. This method needs no API lock, so that a booting machine does not wait."""
        return self.facts.get(instance_id)

    def _renew_facts(self, instance_id: str) -> None:
        """Record an instance's current metadata for the instance's metadata service. The caller must hold the API
        lock."""
        record = inventory.find(instance_id)
        if record is None:
            self.facts.pop(instance_id, None)
        else:
            self.facts[instance_id] = describe(record, self.roles)

    def _stop(self, instance_id: str, *, force: bool) -> None:
        """Stop the machine and unmount its root file system. The machine may have been started by an earlier daemon."""
        machine = self.machines.get(instance_id)
        if machine is not None:
            machines.stop(self.podman, machine, force=force)
            del self.machines[instance_id]
        elif instance_id in self.podman.names():
            self.podman.stop(instance_id, seconds=0 if force else machines.STOP_SECONDS)
        self._clean_up(instance_id, machine)

    def _clean_up(self, instance_id: str, machine: Machine | None) -> None:
        self.podman.remove(instance_id)
        for service in self.services.pop(instance_id, ()):
            service.close()
        self.facts.pop(instance_id, None)
        self.ports.close_all(instance_id)
        if machine is not None:
            machines.disconnect(machine)
        file_systems.unmount(file_systems.RootFileSystem(self.places.machines / instance_id))

    def _reboot(self, instance_id: str) -> None:
        with self._only_one(instance_id):
            if instance_id in self.machines:
                self._stop(instance_id, force=False)
                self._start(instance_id)
        self.settle_network()

    def _make_image(self, image_id: str, instance_id: str, reboot: bool) -> None:
        with self._only_one(instance_id):
            root = file_systems.RootFileSystem(self.places.machines / instance_id)
            running = instance_id in self.machines
            copied: Path | None = None
            if running and not reboot:
                copied = file_systems.copy_live(self.places, root)
            else:
                self._stop(instance_id, force=False)
                file_systems.freeze(self.places, root)
            with self.api:
                layers = [file_systems.adopt(self.places, copied), *root.layers] if copied else root.layers
                image = next(b.amis[image_id] for b in inventory.all_backends() if image_id in b.amis)
                file_systems.record_image(self.places, image.ebs_snapshot.id, layers)
                image.state = "available"
                moto_state.save(self.places)
            if running and reboot:
                self._start(instance_id)
        self.settle_network()

    def _watch(self, machine: Machine) -> None:
        """Wait until the machine ends. If it ended without an API call, handle the power-off, reboot or crash."""
        machines.wait_for_exit(machine)
        with self._only_one(machine.instance):
            if self.machines.get(machine.instance) is not machine or self.stopping.is_set():
                return
            status = self.podman.exit_status(machine.instance)
            del self.machines[machine.instance]
            self._clean_up(machine.instance, machine)
            if status == machines.REBOOTED:
                self._start(machine.instance)
            else:
                with self.api:
                    record = inventory.find(machine.instance)
                    terminate = record.instance_initiated_shutdown_behavior == "terminate"
                    if status == machines.POWERED_OFF and terminate:
                        ec2.set_state(record, ec2.SHUTTING_DOWN)
                    elif record.state == "running":
                        record.ec2_backend.finish_stop(record)
                        record.state_reason.code = "Client.InstanceInitiatedShutdown"
                        record.state_reason.message = (
                            f"Client.InstanceInitiatedShutdown: the machine ended without an API call (status {status})"
                        )
                    moto_state.save(self.places)
        self.settle(machine.instance)

    def _sync_disks(self, instance_id: str) -> None:
        """Attach and detach volumes as the instance's EC2 record requires. The caller must hold the API lock."""
        record = inventory.find(instance_id)
        wanted = inventory.disks_of(record) if record is not None else []
        machine = self.machines.get(instance_id)
        if machine is not None:
            for volume in wanted:
                if volume not in machine.disks:
                    machines.attach(machine, Disk(volume, volumes.attach(volumes.file_of(self.places, volume))))
            for volume in [volume for volume in machine.disks if volume not in wanted]:
                if machines.detach(machine, volume):
                    volumes.detach(volumes.file_of(self.places, volume))
        in_use = {volume for other in self.machines.values() for volume in other.disks}
        for path in set(volumes.loop_devices_under(self.places.volumes).values()):
            if path.stem not in in_use and path.stem not in inventory.disks_in_use():
                volumes.detach(path)

    def _finish_detachments(self) -> None:
        """Finish the detachment of each volume that its machine has unmounted. The caller must hold the API lock."""
        for backend in inventory.all_backends():
            attachments = [volume.attachment for volume in backend.volumes.values() if volume.attachment]
            for attachment in attachments:
                instance, volume = attachment.instance.id, attachment.volume.id
                if attachment.status == ec2.DETACHING and not self.is_mounted(instance, volume):
                    backend.detach_volume(volume, instance, attachment.device)
                    moto_state.save(self.places)


def printable(error: Exception) -> str:
    """Return an error's text with spaces in place of unprintable characters, which XML cannot contain."""
    return "".join(character if character.isprintable() else " " for character in str(error))
