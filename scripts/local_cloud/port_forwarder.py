"""Forward TCP connections between the host and machines: one process per cloud, one thread, one buffer per direction.

The daemon starts it as `python -m scripts.local_cloud.port_forwarder <fd>` and sends listening sockets over the Unix
socket <fd>. It ends with the daemon. It is a process of its own so that transfers do not wait for the API.

Messages are JSON objects, one a datagram:

    {"op": "open", "id": …, "cidrs": [… or null], "target": [address, port], "keep_source": bool}
        with the listening socket and, when the target is inside a machine, its network namespace as descriptors
    {"op": "cut", "id": …}
        open connections stay open but transfer nothing, as when a machine gets another public address
    {"op": "unlisten", "id": …}
        closes the listening socket; open connections go on
    {"op": "close", "id": …}

The forwarder sends {"refused": id} when a machine refuses a connection. It has accepted the client's connection by
then, so it cannot refuse that one as EC2 does. It could only reset it, and MLflow's client does not repeat a POST that
creates something after a reset; it does after a refusal. So the client waits for the next `open` of the same published
address. To the client that is a slow connect.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import os
import resource
import select
import socket
import struct
import sys
import time
from dataclasses import dataclass, field

from scripts.local_cloud import namespaces

CHUNK = 256 * 1024
BACKLOG_LIMIT = 64
"""Connections accepted per wake-up before other sockets are served."""
WAIT_SECONDS = 120
"""How long a client waits for a machine that listens. MLflow's client waits as long for a response by default."""


@dataclass
class ForwardedPort:
    """One listening socket and the target of its connections."""

    listening: socket.socket
    published: tuple[str, int]
    networks: list[ipaddress.IPv4Network] | None
    target: tuple[str, int]
    namespace: int | None
    keep_source: bool


@dataclass
class WaitingClient:
    """An accepted connection whose machine refused it."""

    sock: socket.socket
    source: str
    published: tuple[str, int]
    until: float  # by time.monotonic()


@dataclass
class Side:
    """One end of a forwarded connection."""

    sock: socket.socket
    route: str
    other: Side | None = None
    waiting: bytearray = field(default_factory=bytearray)  # read from the other side, not yet accepted by this one
    mask: int = 0
    read_closed: bool = False
    write_closing: bool = False
    connecting: WaitingClient | None = None  # until connected: the client that waits for it
    silent: bool = False  # transfers nothing any more


class Forwarder:
    """Owns the poller, the routes and the connections."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.poller = select.epoll()
        self.routes: dict[str, ForwardedPort] = {}
        self.by_listener: dict[int, str] = {}
        self.sides: dict[int, Side] = {}
        self.waiting_clients: list[WaitingClient] = []
        self.buffer = bytearray(CHUNK)
        self.view = memoryview(self.buffer)
        self.poller.register(control.fileno(), select.EPOLLIN)

    def run(self) -> None:
        while True:
            self.give_up_waiting()
            for number, event in self.poller.poll(1 if self.waiting_clients else None):
                if number == self.control.fileno():
                    if not self.obey():
                        return
                elif number in self.by_listener:
                    self.accept(self.by_listener[number])
                elif (side := self.sides.get(number)) and not side.silent:
                    try:
                        self.serve(side, event)
                    except OSError:
                        self.abort(side)

    def obey(self) -> bool:
        """Handle one message; False if the daemon has ended."""
        try:
            message, descriptors, _, _ = socket.recv_fds(self.control, 65536, 2)
        except ConnectionError:
            return False
        if not message:
            return False
        order = json.loads(message)
        if order["op"] == "open":
            listening = socket.socket(fileno=descriptors[0])
            listening.setblocking(False)
            cidrs = order["cidrs"]
            if before := self.routes.get(order["id"]):
                self.unlisten(before)
                if before.namespace is not None:
                    os.close(before.namespace)
            published = listening.getsockname()
            self.routes[order["id"]] = ForwardedPort(
                listening,
                published,
                None if cidrs is None else [ipaddress.IPv4Network(cidr, strict=False) for cidr in cidrs],
                (order["target"][0], order["target"][1]),
                descriptors[1] if len(descriptors) > 1 else None,
                order["keep_source"],
            )
            self.by_listener[listening.fileno()] = order["id"]
            self.poller.register(listening.fileno(), select.EPOLLIN)
            due = [each for each in self.waiting_clients if each.published == published]
            self.waiting_clients = [each for each in self.waiting_clients if each.published != published]
            for each in due:
                self.forward(order["id"], each)
        elif order["op"] == "unlisten" and (route := self.routes.get(order["id"])):
            self.accept(order["id"])
            self.unlisten(route)
        elif order["op"] == "cut":
            for side in self.sides.values():
                if side.route == order["id"] and not side.silent:
                    if side.mask:
                        self.poller.unregister(side.sock.fileno())
                    side.mask, side.silent = 0, True
        elif order["op"] == "close" and (route := self.routes.pop(order["id"], None)):
            self.unlisten(route)
            if route.namespace is not None:
                os.close(route.namespace)
            for side in [side for side in self.sides.values() if side.route == order["id"]]:
                self.abort(side)
        return True

    def accept(self, identifier: str) -> None:
        route = self.routes[identifier]
        for _ in range(BACKLOG_LIMIT):
            try:
                client, (address, _port) = route.listening.accept()
            except OSError:
                return
            self.forward(identifier, WaitingClient(client, address, route.published, time.monotonic() + WAIT_SECONDS))

    def forward(self, identifier: str, client: WaitingClient) -> None:
        """Connect an accepted client to the target."""
        route = self.routes[identifier]
        allowed = route.networks is None or any(ipaddress.IPv4Address(client.source) in each for each in route.networks)
        if not allowed:
            reset(client.sock)
            return
        try:
            server, connecting = self.connect(route, client.source)
        except ConnectionRefusedError:
            self.let_wait(identifier, client)
            return
        except OSError:
            reset(client.sock)
            return
        for sock in (client.sock, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        near, far = Side(client.sock, identifier), Side(server, identifier, connecting=client if connecting else None)
        near.other, far.other = far, near
        for side in (near, far):
            self.sides[side.sock.fileno()] = side
            self.watch(side)

    def let_wait(self, identifier: str, client: WaitingClient) -> None:
        """Let a client wait if the target is a port of a machine that does not listen; reset it for another target."""
        if not self.routes[identifier].keep_source:
            reset(client.sock)
            return
        self.waiting_clients.append(client)
        # The message is left out while the queue is full, because the daemon may be waiting for this process. The next
        # refusal sends it again.
        with contextlib.suppress(OSError):
            self.control.send(json.dumps({"refused": identifier}).encode(), socket.MSG_DONTWAIT)

    def give_up_waiting(self) -> None:
        now = time.monotonic()
        for each in [each for each in self.waiting_clients if each.until < now]:
            self.waiting_clients.remove(each)
            reset(each.sock)

    def unlisten(self, route: ForwardedPort) -> None:
        number = route.listening.fileno()
        if number >= 0:
            self.poller.unregister(number)
            del self.by_listener[number]
            route.listening.close()

    def connect(self, route: ForwardedPort, source: str) -> tuple[socket.socket, bool]:
        """A socket that is connecting to the target, from the client's own address if required; True while
        connecting."""
        if route.namespace is None:
            server = socket.socket()
        else:
            with namespaces.inside(route.namespace):
                server = socket.socket()
        try:
            server.setblocking(False)
            if route.keep_source:
                server.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
                server.bind((source, 0))
            try:
                server.connect(route.target)
            except BlockingIOError:
                return server, True
            return server, False
        except OSError:
            server.close()
            raise

    def watch(self, side: Side) -> None:
        """Register with the poller for exactly the events that allow progress."""
        other = side.other
        mask = 0
        if side.connecting or side.waiting:
            mask |= select.EPOLLOUT
        if not side.read_closed and other is not None and not other.waiting and not other.connecting:
            mask |= select.EPOLLIN
        if mask != side.mask:
            number = side.sock.fileno()
            if side.mask == 0:
                self.poller.register(number, mask)
            elif mask == 0:
                self.poller.unregister(number)
            else:
                self.poller.modify(number, mask)
            side.mask = mask

    def serve(self, side: Side, event: int) -> None:
        other = side.other
        assert other is not None
        if side.connecting:
            if error := side.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                if error == errno.ECONNREFUSED:
                    self.forget(side)
                    self.forget(other)
                    side.sock.close()
                    self.let_wait(side.route, side.connecting)
                else:
                    self.abort(side)
                return
            if not event & select.EPOLLOUT:
                return
            side.connecting = None
        if side.waiting and event & (select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR):
            sent = side.sock.send(side.waiting)
            del side.waiting[:sent]
            if not side.waiting and side.write_closing:
                side.sock.shutdown(socket.SHUT_WR)
        if not side.read_closed and not other.waiting and event & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            try:
                count = side.sock.recv_into(self.buffer)
            except BlockingIOError:
                count = -1
            if count == 0:
                side.read_closed = True
                other.write_closing = True
                if not other.waiting:
                    other.sock.shutdown(socket.SHUT_WR)
            elif count > 0:
                try:
                    sent = other.sock.send(self.view[:count])
                except BlockingIOError:
                    sent = 0
                if sent < count:
                    other.waiting += self.view[sent:count]
        if side.read_closed and other.read_closed and not side.waiting and not other.waiting:
            self.drop(side)
            return
        self.watch(side)
        self.watch(other)

    def abort(self, side: Side) -> None:
        """End a connection with a reset on both sides, so that neither side treats a partial transfer as complete."""
        for end in (side, side.other):
            if end is not None and end.sock.fileno() >= 0:
                end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.drop(side)

    def drop(self, side: Side) -> None:
        """End a connection on both sides."""
        for end in (side, side.other):
            if end is not None and self.forget(end):
                end.sock.close()

    def forget(self, side: Side) -> bool:
        """Remove the socket from the poller and the connections; False if it was closed before."""
        number = side.sock.fileno()
        if number < 0 or self.sides.pop(number, None) is None:
            return False
        if side.mask:
            self.poller.unregister(number)
            side.mask = 0
        return True


IP_BIND_ADDRESS_NO_PORT = 24
"""linux/in.h: pick the source port at connect, so that ports are shared between targets."""


RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""struct linger: on, zero seconds."""


def reset(client: socket.socket) -> None:
    """Close with a reset, because nothing was ever connected."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    client.close()


def raise_file_limit() -> None:
    """Allow as many open files as the host permits: each connection needs two."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    raise_file_limit()
    control = socket.socket(fileno=int(sys.argv[1]))
    Forwarder(control).run()


if __name__ == "__main__":
    main()
