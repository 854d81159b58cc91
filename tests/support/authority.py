"""Run Pebble (Let's Encrypt's test authority), and a DNS server for the host names of the tested machine.

As a program, this module runs the DNS server on the given port, in the network namespace of the caller.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow_host.boot.private_ca import Certificates

SECONDS = 30
"""Time limit for Pebble's start."""


@contextmanager
def pebble(
    folder: Path,
    own: Certificates,
    name_server: tuple[str, int],
    *,
    directory: int = 14000,
    management: int = 15000,
    network: Sequence[str] = (),
    **settings: Any,
) -> Iterator[Callable[[], str]]:
    """Run Pebble with the certificate `own` on the ports `directory` and `management` of 127.0.0.1. Yields a function
    that returns Pebble's root certificate.

    Pebble uses `name_server`, and by default requests challenge responses on port 80. `network` is a command prefix
    that runs Pebble in a network namespace. `settings` override Pebble's settings.
    """
    settings = {
        "listenAddress": f"127.0.0.1:{directory}",
        "managementListenAddress": f"127.0.0.1:{management}",
        "certificate": str(own.certificate),
        "privateKey": str(own.key),
        "httpPort": 80,
        "tlsPort": 443,
        **settings,
    }
    (folder / "pebble.json").write_text(json.dumps({"pebble": settings}))
    command = ["pebble", "-config", str(folder / "pebble.json"), "-dnsserver", "{}:{}".format(*name_server)]
    environment = {"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "0", "PATH": "/usr/bin:/bin:/usr/sbin"}
    with (folder / "pebble.log").open("w") as log:
        process = subprocess.Popen([*network, *command], env=environment, stdout=log, stderr=log)

    def root() -> str:
        ask = ["curl", "-sSf", "--cacert", str(own.ca), f"https://127.0.0.1:{management}/roots/0"]
        return subprocess.run([*network, *ask], capture_output=True, text=True, check=True).stdout

    try:
        _await(root)
        yield root
    finally:
        process.terminate()
        process.wait(10)


def _await(root: Callable[[], str]) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            root()
            return
        except subprocess.CalledProcessError as error:
            assert time.monotonic() < deadline, f"pebble does not answer: {error.stderr}"
            time.sleep(0.1)


@contextmanager
def name_server(address: tuple[str, int], address_of: Callable[[str], str | None]) -> Iterator[None]:
    """Run a DNS server during the block. `answer_names` describes its answers."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listening:
        listening.bind(address)
        serving = threading.Thread(target=answer_names, args=(listening, address_of), daemon=True)
        serving.start()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # wakes the thread
                listening.shutdown(socket.SHUT_RDWR)
            serving.join(5)


def answer_names(server: socket.socket, address_of: Callable[[str], str | None]) -> None:
    """Answer a query of type A with the address that `address_of` returns for the name. If `address_of` returns None,
    or the query has another type, the response is empty."""
    while True:
        try:
            query, client = server.recvfrom(512)
        except OSError:
            return
        if not query:
            return
        end = query.index(b"\0", 12) + 5
        is_a = query[end - 4 : end - 2] == b"\0\1"
        address = address_of(_name(query[12 : end - 4])) if is_a else None
        head = query[:2] + b"\x81\x80\0\1" + (b"\0\1" if address else b"\0\0") + b"\0\0\0\0"
        record = b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4" + socket.inet_aton(address) if address else b""
        server.sendto(head + query[12:end] + record, client)


def _name(encoded: bytes) -> str:
    """Return the name in a DNS query as labels joined by dots. A query contains each label after its length."""
    labels, start = [], 0
    while length := encoded[start]:
        labels.append(encoded[start + 1 : start + 1 + length].decode())
        start += 1 + length
    return ".".join(labels).lower()


if __name__ == "__main__":
    with name_server(("127.0.0.1", int(sys.argv[1])), lambda name: "127.0.0.1"):
        threading.Event().wait()
