"""Test the port forwarder alone. The forwarder is a process that forwards connections between sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def control() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        argv = [sys.executable, "-m", "scripts.local_cloud.port_forwarder", str(theirs.fileno())]
        process = subprocess.Popen(argv, pass_fds=[theirs.fileno()], cwd=SCRIPTS.parent)
    with ours:
        yield ours
    assert process.wait(5) == 0, "the forwarder ends with the daemon"


def open_route(
    control: socket.socket,
    target: tuple[str, int],
    cidrs: list[str] | None = None,
    *,
    published: tuple[str, int] = ("127.0.0.1", 0),
    machine: str = "",
) -> tuple[str, int]:
    """Publish a port that forwards connections to `target`, and return the address of the published port. If `machine`
    is not empty, `target` is a port of the machine with the ID `machine`."""
    with socket.create_server(published) as listening:
        identifier = machine or "route"
        order = {"op": "open", "id": identifier, "cidrs": cidrs, "target": target, "keep_source": bool(machine)}
        socket.send_fds(control, [json.dumps(order).encode()], [listening.fileno()])
        host, port = listening.getsockname()
        return host, port


def receive_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def test_half_closed_connection_still_carries_the_answer(control: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        published = open_route(control, server.getsockname())
        with socket.create_connection(published, timeout=5) as client:
            client.sendall(b"question")
            client.shutdown(socket.SHUT_WR)
            accepted, _ = server.accept()
            with accepted:
                assert receive_all(accepted) == b"question"
                accepted.sendall(b"answer")
            assert receive_all(client) == b"answer"


def test_slow_reader_loses_nothing_and_fills_no_memory(control: socket.socket) -> None:
    sent = bytes(range(256)) * 4096 * 64  # 64 MiB
    with socket.create_server(("127.0.0.1", 0)) as server:
        published = open_route(control, server.getsockname())
        with socket.create_connection(published, timeout=30) as client:
            accepted, _ = server.accept()

            def send_all() -> None:
                accepted.sendall(sent)
                accepted.close()

            sender = threading.Thread(target=send_all)
            sender.start()
            sender.join(0.5)
            assert sender.is_alive(), "64 MiB were accepted without a reader"
            assert receive_all(client) == sent
            sender.join()


def test_refused_target_resets_the_client(control: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = closed.getsockname()
    published = open_route(control, nowhere)
    with socket.create_connection(published, timeout=5) as client, pytest.raises(ConnectionResetError):
        client.recv(1)


def test_client_that_a_machine_refuses_waits_for_the_next_machine(control: socket.socket) -> None:
    """A stopping machine closes its ports before the forwarder closes the published port. The next machine gets the
    same published port."""
    control.settimeout(5)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = closed.getsockname()
    published = open_route(control, nowhere, machine="old")
    with socket.create_connection(published, timeout=5) as client:
        client.sendall(b"question")
        assert json.loads(control.recv(100)) == {"refused": "old"}
        control.send(json.dumps({"op": "unlisten", "id": "old"}).encode())
        assert wait_until_refused(published)
        control.send(json.dumps({"op": "close", "id": "old"}).encode())
        with socket.create_server(("127.0.0.1", 0)) as server:
            assert open_route(control, server.getsockname(), published=published, machine="new") == published
            server.settimeout(5)
            with server.accept()[0] as accepted:
                assert accepted.recv(100) == b"question"
                accepted.sendall(b"answer")
            assert receive_all(client) == b"answer"


def test_open_connections_go_on_when_the_machine_no_longer_listens(control: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        published = open_route(control, server.getsockname(), machine="old")
        client, accepted = socket.create_connection(published, timeout=5), server.accept()[0]
    with client, accepted:
        control.send(json.dumps({"op": "unlisten", "id": "old"}).encode())
        assert wait_until_refused(published)
        client.sendall(b"question")
        assert accepted.recv(100) == b"question"


def test_refusals_that_the_daemon_does_not_read_block_nothing(control: socket.socket) -> None:
    """While the daemon waits until the forwarder reads an order, the daemon does not read the forwarder's messages
    about refused connections."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = closed.getsockname()
    refusing = open_route(control, nowhere, machine="old")
    with contextlib.ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(700):
            stack.enter_context(socket.create_connection(refusing, timeout=5))
        published = open_route(control, server.getsockname(), machine="new")
        server.settimeout(5)
        with socket.create_connection(published, timeout=5), server.accept()[0]:
            pass


def wait_until_refused(published: tuple[str, int]) -> bool:
    ends = time.monotonic() + 5
    while time.monotonic() < ends:
        try:
            socket.create_connection(published, timeout=5).close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:  # the forwarder closed the port during the handshake
            continue
        time.sleep(0.02)
    return False


def test_reset_of_the_server_reaches_the_client(control: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        published = open_route(control, server.getsockname())
        with socket.create_connection(published, timeout=5) as client:
            accepted, _ = server.accept()
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            accepted.close()
            with pytest.raises(ConnectionResetError):
                client.recv(1)


def test_client_outside_the_networks_is_refused(control: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        published = open_route(control, server.getsockname(), ["127.1.0.0/16"])
        with socket.create_connection(published, timeout=5) as client, pytest.raises(ConnectionResetError):
            client.recv(1)
        with socket.create_connection(published, timeout=5, source_address=("127.1.2.3", 0)):
            server.settimeout(5)
            server.accept()[0].close()


def test_cut_connection_is_silent_and_the_next_one_is_carried(control: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        published = open_route(control, server.getsockname())
        with socket.create_connection(published, timeout=5) as client, server.accept()[0] as accepted:
            client.sendall(b"1")
            assert accepted.recv(10) == b"1"
            control.send(json.dumps({"op": "cut", "id": "route"}).encode())
            with socket.create_connection(published, timeout=5) as other, server.accept()[0] as another:
                other.sendall(b"2")
                assert another.recv(10) == b"2"
            client.sendall(b"3")
            accepted.sendall(b"4")
            for silent in (client, accepted):
                silent.settimeout(0.5)
                with pytest.raises(TimeoutError):
                    silent.recv(10)


def test_closed_route_ends_its_connections(control: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        published = open_route(control, server.getsockname())
        with socket.create_connection(published, timeout=5) as client:
            _kept_open = server.accept()
            control.send(json.dumps({"op": "close", "id": "route"}).encode())
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(published, timeout=5)


def test_many_short_connections(control: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=512) as server:
        published = open_route(control, server.getsockname())

        def serve() -> None:
            for _ in range(2000):
                accepted, _ = server.accept()
                with accepted:
                    accepted.sendall(accepted.recv(100))

        thread = threading.Thread(target=serve)
        thread.start()
        for number in range(2000):
            with socket.create_connection(published, timeout=5) as client:
                client.sendall(b"%d" % number)
                assert receive_all(client) == b"%d" % number
        thread.join()
