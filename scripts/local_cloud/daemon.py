"""The daemon: serves the AWS APIs and keeps machines, volumes and published ports as the records say they should be.

Run as `python -m local_cloud.daemon <state folder>` by LocalCloud.up(). Requests are answered one at a time; work that
takes long (starting and stopping machines, copying) is done by threads that then write its end into the records.
Everything is level-triggered: after each change the desired state is compared with what is there, so a daemon that was
killed finds its way back by comparing once more.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

os.environ.update(
    MOTO_EC2_LOAD_DEFAULT_AMIS="false",
    MOTO_ENABLE_AMI_VALIDATION="true",
    MOTO_ENABLE_KEYPAIR_VALIDATION="true",
    MOTO_EC2_ENABLE_INSTANCE_TYPE_VALIDATION="true",
)

from moto.ec2.exceptions import EC2ClientError
from moto.ec2.models import ec2_backends
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import BaseWSGIServer, make_server

from local_cloud import alarms, ec2, file_systems, hosted_zones, machines, namespaces, permissions, records, volumes
from local_cloud.ec2 import EmbodiedEC2
from local_cloud.forward import raise_file_limit
from local_cloud.instance_facts import describe
from local_cloud.machines import Disk, Machine, Podman, Size
from local_cloud.metadata import ADDRESS, Metadata, MetadataService
from local_cloud.roles import Roles
from local_cloud.state import ACCOUNT, Allotment, LocalCloudError, Places, read_allotment

WIDEST_RANGE = 32
"""A rule for more ports than this is published for the ports something listens on, found by looking each second."""

READ_ONLY = ("Describe", "Get", "List", "Head", "BatchGet", "Lookup", "Search", "Simulate", "Decrypt")
KEEP_TERMINATED_SECONDS = 3600


class Daemon:
    """Owns the running machines of one cloud, the forwarder, and the server of its APIs."""

    def __init__(self, places: Places, allotment: Allotment) -> None:
        self.places = places
        self.allotment = allotment
        self.podman = Podman(places, allotment)
        self.api = threading.RLock()
        self.machines: dict[str, Machine] = {}
        self.services: dict[str, MetadataService] = {}
        self.instance_locks: dict[str, threading.Lock] = {}
        self.published: dict[str, tuple[Any, ...]] = {}
        self.publishing = threading.Lock()
        self.checked_records = 0
        self.roles = Roles(places, allotment)
        self.stopping = threading.Event()
        self.forwarder: socket.socket
        threading.Thread(target=self._mind_forwarder, args=(self._start_forwarder(),), daemon=True).start()
        self.app = DomainDispatcherApplication(create_backend_app)
        ec2.install(self, self.free_address)
        hosted_zones.install()

    # Serving

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """The WSGI application: moto, one request at a time, its records saved before the answer leaves."""
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(length) if length else b""
        environ["wsgi.input"] = io.BytesIO(body)
        action, parameters = _parse(environ, body)
        with self.api:
            if refused := self.roles.refusal(environ, permissions.read(environ, body, action, parameters)):
                status, headers, text = permissions.answer(environ, refused)
                start_response(status, [*headers, ("Content-Length", str(len(text)))])
                return [text]
            ec2.call.parameters = parameters
            try:
                answer = list(self.app(environ, start_response))
            finally:
                ec2.call.parameters = {}
            if changes(action, environ["REQUEST_METHOD"]):
                records.save(self.places)
                self.settle_network()
        return answer

    def serve(self) -> None:
        server = make_server("127.0.0.1", self.allotment.api_port, self, threaded=True, request_handler=_RequestHandler)
        threading.Thread(target=self._serve_control, args=(server,), daemon=True).start()
        threading.Thread(target=self._tick, daemon=True).start()
        server.serve_forever(poll_interval=0.1)

    def _serve_control(self, server: BaseWSGIServer) -> None:
        """Orders from LocalCloud over a Unix socket: one JSON line in, one out."""
        path = self.allotment.run_dir / "control"
        path.unlink(missing_ok=True)
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        path.chmod(0o600)
        listening.listen(16)
        while True:
            connection, _ = listening.accept()
            threading.Thread(target=self._control, args=(connection, server), daemon=True).start()

    def _control(self, connection: socket.socket, server: BaseWSGIServer) -> None:
        with connection, connection.makefile("rwb") as stream:
            try:
                order = json.loads(stream.readline())
                answer = {"ok": True, "result": self._obey(order)}
            except LocalCloudError as error:
                answer = {"ok": False, "error": str(error)}
            except Exception as error:
                traceback.print_exc()
                answer = {"ok": False, "error": repr(error)}
            stream.write(json.dumps(answer).encode() + b"\n")
            stream.flush()
            if order.get("op") == "down" and answer["ok"]:
                self.stopping.set()
                threading.Thread(target=server.shutdown).start()

    def _obey(self, order: dict[str, Any]) -> Any:
        match order["op"]:
            case "ping":
                return os.getpid()
            case "register":
                return self.register(order["name"], order["description"], Path(order["made"]))
            case "down":
                return self.power_off()
            case "status":
                return self.status()
        raise LocalCloudError(f"unknown order {order['op']!r}")

    def register(self, name: str, description: str, made: Path) -> str:
        """Registers a source image whose body is the folder `made`; an image of that name is returned as it is."""
        with self.api:
            for image in self.home().amis.values():
                if image.name == name and image.owner_id == ec2.CANONICAL:
                    return str(image.id)
            image = self.home().register_source_image(name, description)
            file_systems.record_image(self.places, image.ebs_snapshot.id, [file_systems.adopt(self.places, made)])
            records.save(self.places)
            return str(image.id)

    def status(self) -> dict[str, Any]:
        with self.api:
            return {
                "instances": [
                    {"id": i.id, "state": i.state, "type": i.instance_type, "address": i.public_ip, "image": i.image_id}
                    for i in self.all_instances()
                ],
                "images": [{"id": a.id, "name": a.name, "state": a.state} for a in self.home().amis.values()],
                "volumes": [
                    {"id": v.id, "gib": v.size, "attached_to": v.attachment.instance.id if v.attachment else None}
                    for v in self.home().volumes.values()
                    if volumes.file_of(self.places, v.id).exists()
                ],
            }

    def home(self) -> EmbodiedEC2:
        """EC2 of the region this cloud is in."""
        backends: Any = ec2_backends[ACCOUNT]
        backend: EmbodiedEC2 = backends[self.allotment.region]
        return backend

    def all_backends(self) -> Iterator[EmbodiedEC2]:
        backends: Any = ec2_backends[ACCOUNT]
        yield from list(backends.values())

    def all_instances(self) -> Iterator[Any]:
        for backend in self.all_backends():
            yield from backend.all_instances()

    def find(self, instance_id: str) -> Any:
        """The record of an instance, None when there is none."""
        return next((instance for instance in self.all_instances() if instance.id == instance_id), None)

    def free_address(self) -> str:
        """An address of this cloud's that neither an interface nor an Elastic IP holds."""
        taken: set[str | None] = {a.public_ip for backend in self.all_backends() for a in backend.addresses}
        taken |= {n.public_ip for backend in self.all_backends() for n in backend.enis.values()}
        for address in self.allotment.public_addresses:
            if address not in taken:
                return address
        raise EC2ClientError("AddressLimitExceeded", "The maximum number of addresses has been reached.")

    # Bodies: called with the API lock held

    def has_image(self, snapshot: str) -> bool:
        return file_systems.image_layers(self.places, snapshot) is not None

    def make_root(self, instance: str, snapshot: str) -> None:
        file_systems.create(self.places, instance, file_systems.image_layers(self.places, snapshot) or [])

    def pull_the_plug(self, instance: str) -> None:
        if machine := self.machines.get(instance):
            machines.kill(machine)

    def settle(self, instance: str) -> None:
        self._spawn(self._settle, instance)

    def reboot(self, instance: str) -> None:
        self._spawn(self._reboot, instance)

    def make_image(self, image: str, instance: str, *, reboot: bool) -> None:
        self._spawn(self._make_image, image, instance, reboot)

    def forget_snapshot(self, snapshot: str) -> None:
        (self.places.images / f"{snapshot}.json").unlink(missing_ok=True)
        (self.places.snapshots / f"{snapshot}.img").unlink(missing_ok=True)
        self._spawn(self._sweep_layers)

    def make_volume(self, volume: str, gib: int, snapshot: str | None) -> None:
        volumes.create(self.places, volume, gib, snapshot)

    def forget_volume(self, volume: str) -> None:
        path = volumes.file_of(self.places, volume)
        if path.exists():
            volumes.detach(path)
            path.unlink()

    def snapshot_volume(self, volume: str, snapshot: str) -> None:
        volumes.snapshot(self.places, volume, snapshot)

    def is_mounted(self, instance: str, volume: str) -> bool:
        machine = self.machines.get(instance)
        return machine is not None and machines.is_mounted(machine, volume)

    def console(self, instance: str) -> str:
        return machines.console_text(self.console_path(instance))

    def console_path(self, instance: str) -> Path:
        return self.places.machines / instance / "console.log"

    def pid_file(self, instance: str) -> Path:
        return self.places.machines / instance / "pid"

    # Work on one instance at a time, without the API lock

    def _spawn(self, work: Callable[..., None], *arguments: Any) -> None:
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
        """Brings the machine to the state its record asks for."""
        with self._only_one(instance_id):
            with self.api:
                record = self.find(instance_id)
                state = record.state if record else "terminated"
            if self.stopping.is_set():
                return
            if state in ("pending", "running") and instance_id not in self.machines:
                self._start(instance_id)
            elif state == "stopping":
                self._stop(instance_id, force=False)
                with self.api:
                    if record.state == "stopping":  # and was not terminated meanwhile
                        record.ec2_backend.finish_stop(record)
                    self._sync_disks(instance_id)
                    records.save(self.places)
            elif state in ("shutting-down", "terminated") and record is not None:
                self._stop(instance_id, force=False)
                file_systems.delete(file_systems.RootFileSystem(self.places.machines / instance_id))
                with self.api:
                    if state == "shutting-down":
                        record.ec2_backend.finish_termination(record)
                        record.terminated_at = time.time()
                    self._sync_disks(instance_id)
                    records.save(self.places)
                self._sweep_layers()
        self.settle_network()

    def _sweep_layers(self) -> None:
        with self.api:
            file_systems.discard_unused_layers(self.places)
        file_systems.empty(self.places.trash)

    def _start(self, instance_id: str) -> None:
        try:
            machine = self._adopt(instance_id) or self._boot(instance_id)
        except Exception as error:
            traceback.print_exc()
            self._stop(instance_id, force=True)
            with self.api:
                record = self.find(instance_id)
                fresh = record.state == "pending" and not (self.places.machines / instance_id / "booted").exists()
                ec2.set_state(record, ec2.SHUTTING_DOWN if fresh else ec2.STOPPED)
                record.state_reason.code = "Server.InternalError"
                record.state_reason.message = f"Server.InternalError: {printable(error)}"
                records.save(self.places)
            if fresh:
                self.settle(instance_id)
            return
        (self.places.machines / instance_id / "booted").touch()
        self.machines[instance_id] = machine
        threading.Thread(target=self._watch, args=(machine,), daemon=True).start()
        with self.api:
            record = self.find(instance_id)
            if record.state == "pending":
                ec2.set_state(record, ec2.RUNNING)
                records.save(self.places)

    def _boot(self, instance_id: str) -> Machine:
        with self.api:
            record = self.find(instance_id)
            hostname = record.private_dns_name.partition(".")[0]
            size = Size(*ec2.size_of(record.instance_type))
            private_address = record.private_ip
            disks = [Disk(v, volumes.attach(volumes.file_of(self.places, v))) for v in self._wanted_disks(record)]
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
            private_address = self.find(instance_id).private_ip
        return machines.adopt(
            instance_id,
            private_address,
            self.pid_file(instance_id),
            lambda namespace, beyond: self._open_inside(instance_id, namespace, beyond),
        )

    def _open_inside(self, instance_id: str, namespace: int, beyond: int) -> None:
        """What a machine finds on its network: its metadata service, and S3 and the APIs where the host has them."""
        self.services[instance_id] = MetadataService(
            namespaces.listener(ADDRESS, 80, beyond), lambda: self.metadata(instance_id)
        )
        with self.publishing:
            self._open_inner_routes(instance_id, namespace)

    def _open_inner_routes(self, instance_id: str, namespace: int) -> None:
        for port in (self.allotment.s3_port, self.allotment.s3_tls_port, self.allotment.api_port):
            name = f"{instance_id}-inner-{port}"
            listening = namespaces.listener("127.0.0.1", port, namespace)
            self._open_route(name, listening, None, ("127.0.0.1", port), None)
            self.published[name] = ()

    def metadata(self, instance_id: str) -> Metadata | None:
        with self.api:
            record = self.find(instance_id)
            return None if record is None else describe(record, self.roles)

    def _stop(self, instance_id: str, *, force: bool) -> None:
        """Stops the machine, whether this daemon started it or not, and takes its root file system down."""
        machine = self.machines.get(instance_id)
        if machine is not None:
            machines.stop(self.podman, machine, force=force)
            del self.machines[instance_id]
        elif instance_id in self.podman.names():
            self.podman.run("stop", "--time", "0" if force else str(machines.STOP_SECONDS), "--ignore", instance_id)
        self._clean_up(instance_id, machine)

    def _clean_up(self, instance_id: str, machine: Machine | None) -> None:
        self.podman.remove(instance_id)
        if service := self.services.pop(instance_id, None):
            service.close()
        with self.publishing:
            for route in [route for route in self.published if route.startswith(f"{instance_id}-")]:
                self._close_route(route)
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
                image = next(b.amis[image_id] for b in self.all_backends() if image_id in b.amis)
                file_systems.record_image(self.places, image.ebs_snapshot.id, layers)
                image.state = "available"
                records.save(self.places)
            if running and reboot:
                self._start(instance_id)
        self.settle_network()

    def _watch(self, machine: Machine) -> None:
        """Acts when a machine ends by itself: powered off, rebooted or crashed from inside."""
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
                    record = self.find(machine.instance)
                    terminate = record.instance_initiated_shutdown_behavior == "terminate"
                    if status == machines.POWERED_OFF and terminate:
                        ec2.set_state(record, ec2.SHUTTING_DOWN)
                    elif record.state == "running":
                        record.ec2_backend.finish_stop(record)
                        record.state_reason.code = "Client.InstanceInitiatedShutdown"
                        record.state_reason.message = (
                            f"Client.InstanceInitiatedShutdown: the machine ended by itself (status {status})"
                        )
                    records.save(self.places)
        self.settle(machine.instance)

    # Volumes

    def _wanted_disks(self, record: Any) -> list[str]:
        """Ids of the volumes attached to an instance, root excepted, in the order of their device names."""
        return [
            block.volume_id
            for device, block in sorted(record.get_block_device_mapping)
            if device != record.root_device_name
        ]

    def _sync_disks(self, instance_id: str) -> None:
        """Attaches and detaches so that the machine has the volumes its record names; call with the API lock held."""
        record = self.find(instance_id)
        wanted = self._wanted_disks(record) if record is not None else []
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
            if path.stem not in in_use and path.stem not in self._all_wanted_disks():
                volumes.detach(path)

    def _finish_detachments(self) -> None:
        """Lets go of volumes that were mounted when asked to detach and no longer are; with the API lock held."""
        for backend in self.all_backends():
            attachments = [volume.attachment for volume in backend.volumes.values() if volume.attachment]
            for attachment in attachments:
                instance, volume = attachment.instance.id, attachment.volume.id
                if attachment.status == ec2.DETACHING and not self.is_mounted(instance, volume):
                    backend.detach_volume(volume, instance, attachment.device)
                    records.save(self.places)

    def _all_wanted_disks(self) -> set[str]:
        return {
            volume
            for record in self.all_instances()
            if record.state in ("pending", "running", "stopping", "shutting-down")
            for volume in self._wanted_disks(record)
        }

    # Network

    def settle_network(self) -> None:
        """Publishes what the security groups allow, and brings attached volumes in line, for every machine."""
        with self.api:
            wanted = self._wanted_routes()
            self._finish_detachments()
            for instance_id in list(self.machines):
                self._sync_disks(instance_id)
            with self.publishing:
                ours = {name for name in self.published if "-public-" in name}
                for name in ours:
                    if self.published[name] != wanted.get(name):
                        self._close_route(name)
                for name, route in wanted.items():
                    if name not in self.published:
                        self._publish(name, route)

    def _publish(self, name: str, route: tuple[Any, ...]) -> None:
        instance_id, address, port, cidrs, target = route
        machine = self.machines.get(instance_id)
        if machine is None:
            return
        try:
            listening = namespaces.listener(address, port)
        except OSError as error:
            print(f"cannot publish {address}:{port} of {instance_id}: {error}", file=sys.stderr, flush=True)
            return
        self._open_route(name, listening, list(cidrs), (target, port), machine.namespace)
        self.published[name] = route

    def _wanted_routes(self) -> dict[str, tuple[Any, ...]]:
        """Ports to publish: name → (instance, public address, port, source CIDRs, private address)."""
        routes: dict[str, tuple[Any, ...]] = {}
        for instance_id, machine in list(self.machines.items()):
            record = self.find(instance_id)
            if record is None or record.state not in ("running", "pending"):
                continue
            for nic in record.nics.values():
                if not nic.public_ip:
                    continue
                for port, cidrs in self._open_ports(nic, machine).items():
                    name = f"{instance_id}-public-{nic.public_ip}-{port}"
                    routes[name] = (instance_id, nic.public_ip, port, tuple(sorted(cidrs)), record.private_ip)
        return routes

    def _open_ports(self, nic: Any, machine: Machine) -> dict[int, set[str]]:
        ports: dict[int, set[str]] = {}
        listening: set[int] | None = None
        for group in nic.group_set:
            for rule in group.ingress_rules:
                cidr = rule.cidr_ipv4
                if rule.ip_protocol not in ("tcp", "-1") or not cidr:
                    continue
                first, last = (0, 65535) if rule.ip_protocol == "-1" else (rule.from_port, rule.to_port)
                if last - first >= WIDEST_RANGE:
                    if listening is None:
                        listening = listening_ports(machine.pid)
                    matching = {port for port in listening if first <= port <= last}
                else:
                    matching = set(range(first, last + 1))
                for port in matching:
                    ports.setdefault(port, set()).add(cidr)
        return ports

    def _open_route(
        self,
        name: str,
        listening: socket.socket,
        cidrs: list[str] | None,
        target: tuple[str, int],
        namespace: int | None,
    ) -> None:
        order = {"op": "open", "id": name, "cidrs": cidrs, "target": target, "keep_source": namespace is not None}
        descriptors = [listening.fileno()] + ([] if namespace is None else [namespace])
        with listening, contextlib.suppress(BrokenPipeError, ConnectionResetError):  # _mind_forwarder opens it again
            socket.send_fds(self.forwarder, [json.dumps(order).encode()], descriptors)

    def _close_route(self, name: str) -> None:
        self.published.pop(name, None)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.forwarder.send(json.dumps({"op": "close", "id": name}).encode())

    def _start_forwarder(self) -> subprocess.Popen[bytes]:
        self.forwarder, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            return subprocess.Popen(
                [sys.executable, "-m", "local_cloud.forward", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd=Path(__file__).parent.parent,
                start_new_session=True,
            )

    def _mind_forwarder(self, process: subprocess.Popen[bytes]) -> None:
        """Starts the forwarder again should it die, with every route it had; connections it carried are lost."""
        while True:
            status = process.wait()
            if self.stopping.is_set():
                return
            print(f"the forwarder ended with status {status}; starting it again", file=sys.stderr, flush=True)
            with self.api, self.publishing:
                self.forwarder.close()
                process = self._start_forwarder()
                self.published.clear()
                for instance_id, machine in self.machines.items():
                    self._open_inner_routes(instance_id, machine.namespace)
            self.settle_network()

    # Start, end and passing of time

    def restore(self) -> None:
        """Reads the records and brings every machine back to the state they ask for."""
        records.load(self.places)
        with self.api:
            known = {record.id: record for record in self.all_instances()}
            for backend in self.all_backends():
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
        self._sweep_layers()
        for instance_id, record in known.items():
            if record.state in ("pending", "running", "stopping", "shutting-down"):
                self.settle(instance_id)

    def power_off(self) -> None:
        """Stops every machine; their records keep saying `running`, so that the next `up` starts them again."""
        self.stopping.set()
        threads = []
        for instance_id in self.podman.names():

            def stop_one(instance_id: str = instance_id) -> None:
                with self._only_one(instance_id):
                    self._stop(instance_id, force=False)

            thread = threading.Thread(target=stop_one)
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join()
        with self.api:
            for path in set(volumes.loop_devices_under(self.places.volumes).values()):
                volumes.detach(path)
            records.save(self.places)

    def _tick(self) -> None:
        """Each second: ports that wide rules allow, volumes to be unmounted, old terminated instances, alarms."""
        while not self.stopping.wait(1):
            try:
                self.settle_network()
                self._forget_terminated()
                self._settle_alarms()
                self._check_records()
            except Exception:
                traceback.print_exc()

    def _settle_alarms(self) -> None:
        with self.api:
            if alarms.settle():
                records.save(self.places)

    def _check_records(self) -> None:
        """Makes sure that what was saved since the last look can be read again."""
        saved = self.places.records.stat().st_mtime_ns if self.places.records.exists() else 0
        if saved == self.checked_records:
            return
        self.checked_records = saved
        if not records.check(self.places):
            with self.api:
                records.save(self.places)

    def _forget_terminated(self) -> None:
        with self.api:
            for backend in self.all_backends():
                for identifier, reservation in list(backend.reservations.items()):
                    if all(
                        i.state == "terminated"
                        and time.time() - getattr(i, "terminated_at", 0) > KEEP_TERMINATED_SECONDS
                        for i in reservation.instances
                    ):
                        del backend.reservations[identifier]


class _RequestHandler(MotoRequestHandler):
    """moto's, without a line in the log for each request."""

    protocol_version = "HTTP/1.1"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


def printable(error: Exception) -> str:
    """An error's text as XML can carry it."""
    return "".join(character if character.isprintable() else " " for character in str(error))


def _parse(environ: dict[str, Any], body: bytes) -> tuple[str, dict[str, str]]:
    """The action a request names ("" for REST services) and its parameters."""
    if target := environ.get("HTTP_X_AMZ_TARGET"):
        return str(target).rpartition(".")[2], {}
    parameters = dict(parse_qsl(environ.get("QUERY_STRING", "")))
    if str(environ.get("CONTENT_TYPE", "")).startswith("application/x-www-form-urlencoded"):
        parameters |= dict(parse_qsl(body.decode(errors="replace"), keep_blank_values=True))
    return parameters.get("Action", ""), parameters


def changes(action: str, method: str) -> bool:
    """Whether a request may change a record."""
    if action:
        return not action.startswith(READ_ONLY)
    return method not in ("GET", "HEAD", "OPTIONS")


def listening_ports(pid: int) -> set[int]:
    """TCP ports something listens on in a process's network namespace, on other than loopback addresses."""
    ports = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            local, state = line.split()[1], line.split()[3]
            address, _, port = local.partition(":")
            if state == "0A" and not address.endswith("7F") and address != "0" * 24 + "01000000":
                ports.add(int(port, 16))
    return ports


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
