"""Network namespaces, identified by file descriptors. Names under /run/netns are not used, because they would remain
after a crash.

The kernel deletes a namespace when no descriptor and no process uses it. No namespace thus remains after the daemon and
the machine have ended.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def create() -> int:
    """Create a network namespace, start its loopback interface, and return a descriptor that the caller owns."""
    made: list[int] = []

    def unshare() -> None:
        _check(_libc.unshare(CLONE_NEWNET), "unshare")
        made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)

    thread = threading.Thread(target=unshare)
    thread.start()
    thread.join()
    if not made:
        raise OSError("could not create a network namespace")
    return made[0]


def of_process(pid: int) -> int:
    """Open the network namespace of a process. The caller owns the returned descriptor."""
    return os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def inside(namespace: int) -> Iterator[None]:
    """Run the `with` block in `namespace`. Sockets that the block creates stay in `namespace`."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(namespace, CLONE_NEWNET), "setns")
        try:
            yield
        finally:
            _check(_libc.setns(home, CLONE_NEWNET), "setns")
    finally:
        os.close(home)


def listener(address: str, port: int, namespace: int | None = None) -> socket.socket:
    """Return a listening TCP socket, on the host or inside `namespace`."""
    if namespace is not None:
        with inside(namespace):
            return listener(address, port)
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address, port))
        listening.listen(1024)
    except OSError:
        listening.close()
        raise
    return listening


def run_inside(namespace: int, commands: list[str]) -> None:
    """Run `commands` of ip(8) in `namespace`. Raises OSError with ip's message if a command fails."""
    with inside(namespace):
        done = subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"ip could not set up a machine's network: {done.stderr.strip()}")
