"""Publish ports of machines on this host through the forwarder process. Security groups determine the open ports."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.local_cloud import inventory, namespaces
from scripts.local_cloud.layout import Allotment
from scripts.local_cloud.machines import Machine

WIDEST_RANGE = 32
"""For a security group rule with at most 32 ports, all ports can be published. For a rule with more ports, the
machine's listening ports are looked up every second, and only these ports are published."""
REFUSED: tuple[Any, ...] = ("refused",)
"""Value in `routes` if the machine refuses new connections. Older connections of the route may still be open."""


class PublishedPorts:
    """Owner of the forwarder process. `lock` guards the routes. Code that needs both locks takes the API lock first."""

    def __init__(
        self,
        allotment: Allotment,
        machines: dict[str, Machine],
        api: threading.RLock,
        stopping: threading.Event,
        settle_network: Callable[[], None],
    ) -> None:
        """`settle_network` is called without locks after a restart of the forwarder process."""
        self.allotment = allotment
        self.machines = machines
        self.api = api
        self.stopping = stopping
        self.settle_network = settle_network
        self.lock = threading.Lock()
        self.routes: dict[str, tuple[Any, ...]] = {}
        self.addresses: dict[str, set[str]] = {}
        self.awaited = False  # whether an allowed port has no listening program
        self.forwarder: socket.socket
        threading.Thread(target=self._mind_forwarder, args=(self._start_forwarder(),), daemon=True).start()

    def settle(self) -> None:
        """Publish the ports that security groups allow, and close all other ports. The caller holds the API lock.

        A port is published only while its machine listens on the port. This host refuses connections to an unpublished
        port, as EC2 does. If the port were published, the forwarder could only reset its connections, and MLflow's
        client does not repeat every POST after a reset.
        """
        wanted = self._wanted_routes()
        with self.lock:
            self._cut_lost_addresses()
            for name in [name for name in self.routes if "-public-" in name]:
                if name not in wanted or self.routes[name] not in (wanted[name], REFUSED):
                    self._close(name)
            due = {name: route for name, route in wanted.items() if self.routes.get(name, REFUSED) == REFUSED}
            for name in self._listening(due):
                self._publish(name, due.pop(name))
            self.awaited = bool(due)

    def _listening(self, routes: dict[str, tuple[Any, ...]]) -> list[str]:
        """Return the name of each route whose machine listens on the route's port."""
        asked = {route[0] for route in routes.values()}
        ports = {each: listening_ports(machine.pid) for each, machine in list(self.machines.items()) if each in asked}
        return [name for name, route in routes.items() if route[2] in ports.get(route[0], ())]

    def open_inside(self, instance_id: str, namespace: int) -> None:
        """Forward the ports of S3 and the APIs from a machine's loopback address to this host's loopback address."""
        with self.lock:
            self._open_inside(instance_id, namespace)

    def close_all(self, instance_id: str) -> None:
        with self.lock:
            for name in [name for name in self.routes if name.startswith(f"{instance_id}-")]:
                self._close(name)

    def _open_inside(self, instance_id: str, namespace: int) -> None:
        for port in (self.allotment.s3_port, self.allotment.s3_tls_port, self.allotment.api_port):
            name = f"{instance_id}-inner-{port}"
            listening = namespaces.listener("127.0.0.1", port, namespace)
            self._open(name, listening, None, ("127.0.0.1", port), None)
            self.routes[name] = ()

    def _cut_lost_addresses(self) -> None:
        """If a machine lost its public address, stop transfers on its open connections to the AWS APIs, like EC2."""
        before, self.addresses = self.addresses, {}
        for instance_id in list(self.machines):
            record = inventory.find(instance_id)
            now = {nic.public_ip for nic in record.nics.values() if nic.public_ip} if record else set()
            self.addresses[instance_id] = now
            if before.get(instance_id, now) - now:
                for name in [name for name in self.routes if name.startswith(f"{instance_id}-inner-")]:
                    self._send({"op": "cut", "id": name})

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
        self._open(name, listening, list(cidrs), (target, port), machine.namespace)
        self.routes[name] = route

    def _wanted_routes(self) -> dict[str, tuple[Any, ...]]:
        """Return the ports to publish: name → (instance, public address, port, source CIDRs, private address)."""
        routes: dict[str, tuple[Any, ...]] = {}
        for instance_id, machine in list(self.machines.items()):
            record = inventory.find(instance_id)
            if record is None:
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

    def _open(
        self,
        name: str,
        listening: socket.socket,
        cidrs: list[str] | None,
        target: tuple[str, int],
        namespace: int | None,
    ) -> None:
        order = {"op": "open", "id": name, "cidrs": cidrs, "target": target, "keep_source": namespace is not None}
        descriptors = [listening.fileno()] + ([] if namespace is None else [namespace])
        with listening, contextlib.suppress(BrokenPipeError, ConnectionResetError):  # _mind_forwarder repeats it
            socket.send_fds(self.forwarder, [json.dumps(order).encode()], descriptors)

    def _close(self, name: str) -> None:
        self.routes.pop(name, None)
        self._send({"op": "close", "id": name})

    def _send(self, order: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.forwarder.send(json.dumps(order).encode())

    def _start_forwarder(self) -> subprocess.Popen[bytes]:
        self.forwarder, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        threading.Thread(target=self._unlisten_refused, args=(self.forwarder,), daemon=True).start()
        with theirs:
            return subprocess.Popen(
                [sys.executable, "-m", "scripts.local_cloud.port_forwarder", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd=Path(__file__).parents[2],
                start_new_session=True,
            )

    def _unlisten_refused(self, forwarder: socket.socket) -> None:
        """Until the forwarder ends, close the listening socket of each port whose machine refuses connections."""
        with contextlib.suppress(OSError):
            while message := forwarder.recv(65536):
                name = json.loads(message)["refused"]
                with self.lock:
                    if name in self.routes:
                        self.routes[name] = REFUSED
                        self._send({"op": "unlisten", "id": name})
                        self.awaited = True

    def _mind_forwarder(self, process: subprocess.Popen[bytes]) -> None:
        """If the forwarder ends, start a new one with the same routes. Open connections are lost."""
        while True:
            status = process.wait()
            if self.stopping.is_set():
                return
            print(f"the forwarder ended with status {status}; starting it again", file=sys.stderr, flush=True)
            with self.api, self.lock:
                self.forwarder.close()
                process = self._start_forwarder()
                self.routes.clear()
                for instance_id, machine in self.machines.items():
                    self._open_inside(instance_id, machine.namespace)
            self.settle_network()


def listening_ports(pid: int) -> set[int]:
    """Return the listening TCP ports in a process's network namespace. Ports on loopback addresses are excluded."""
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
