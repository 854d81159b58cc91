"""Forward TCP connections between the host and machines: one process per cloud, one thread, one buffer per direction.

The daemon starts the forwarder as `python -m scripts.local_cloud.port_forwarder <fd>` and sends listening sockets over
the Unix socket <fd>. The forwarder ends when the daemon ends. The forwarder has its own process, so that the API does
not delay transfers.

Messages are JSON objects, one per datagram:

    {"op": "open", "id": …, "cidrs": [… or null], "target": [address, port], "keep_source": bool}
        the descriptors are the listening socket and, if the target is in a machine, the machine's network namespace
    {"op": "cut", "id": …}
        open connections stay open but transfer nothing, as on EC2 after a machine loses its public address
    {"op": "unlisten", "id": …}
        closes the listening socket; open connections continue
    {"op": "close", "id": …}

The forwarder sends {"refused": id} when a machine refuses a connection. On EC2, the client's connection would be
refused. The forwarder has already accepted the client's connection and could only reset it. MLflow's client repeats a
POST after a refused connection, but after a reset it does not repeat a POST that creates an object. The forwarder
therefore keeps the client's connection until the next `open` message for the same published address. For the client,
the response is only slow.
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
"""Maximum number of connections that are accepted in one loop before other sockets are served."""
WAIT_SECONDS = 120
"""Maximum seconds that a connection waits for a machine to listen. MLflow's client also has a default timeout of 120
s."""


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
    """An accepted connection that the machine refused."""

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
    waiting: bytearray = field(default_factory=bytearray)  # bytes that `other` has received and this side has not sent
    mask: int = 0
    read_closed: bool = False
    write_closing: bool = False
    connecting: WaitingClient | None = None  # until the socket is connected: the client that waits for it
    silent: bool = False  # whether this side transfers nothing any more


class Forwarder:
    """Forwards connections. This object owns the poller, the routes and the connections."""

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
        """Handle one message. Returns False if the daemon has ended."""
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
        """Connect an accepted client to the target of the route."""
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
        """If the target is in a machine, let the client wait. For other targets, reset the client's connection."""
        if not self.routes[identifier].keep_source:
            reset(client.sock)
            return
        self.waiting_clients.append(client)
        # If the queue is full, the message is dropped, because the daemon may be waiting for this process. The message
        # is sent again after the next refused connection.
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
        """Return a socket to the target, and whether the socket is still connecting. If the route has `keep_source`,
        the socket's source address is the client's address."""
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
        """Register the side's socket with the poller, only for events that the side can handle now."""
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
        """Reset a connection on both sides, so that no side treats a partial transfer as complete."""
        for end in (side, side.other):
            if end is not None and end.sock.fileno() >= 0:
                end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.drop(side)

    def drop(self, side: Side) -> None:
        """Close a connection on both sides."""
        for end in (side, side.other):
            if end is not None and self.forget(end):
                end.sock.close()

    def forget(self, side: Side) -> bool:
        """Remove the side's socket from the poller and from `sides`. Returns False for a removed socket."""
        number = side.sock.fileno()
        if number < 0 or self.sides.pop(number, None) is None:
            return False
        if side.mask:
            self.poller.unregister(number)
            side.mask = 0
        return True


IP_BIND_ADDRESS_NO_PORT = 24
"""Socket option of linux/in.h. The kernel chooses the source port in connect(2), so that targets can share a port."""


RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""Value of struct linger: on, with a timeout of zero seconds."""


def reset(client: socket.socket) -> None:
    """Close a client's connection with a TCP reset, because the connection is not forwarded."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    client.close()


def raise_file_limit() -> None:
    """Raise the limit on open files to the hard limit, because each forwarded connection needs two descriptors."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    raise_file_limit()
    control = socket.socket(fileno=int(sys.argv[1]))
    Forwarder(control).run()


if __name__ == "__main__":
    main()
