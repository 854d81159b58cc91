"""What Pebble, Let's Encrypt's own test authority, needs around it: a name server that finds the machine under test.

Run as a program it serves on the port it is given, inside whose network it was started.
"""

from __future__ import annotations

import socket
import sys


def answer_every_name_with_loopback(server: socket.socket) -> None:
    """A name server: 127.0.0.1 for type A, nothing for any other."""
    while True:
        try:
            query, client = server.recvfrom(512)
        except OSError:
            return
        end = query.index(b"\0", 12) + 5
        is_a = query[end - 4 : end - 2] == b"\0\1"
        head = query[:2] + b"\x81\x80\0\1" + (b"\0\1" if is_a else b"\0\0") + b"\0\0\0\0"
        record = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton("127.0.0.1") if is_a else b""
        server.sendto(head + query[12:end] + record, client)


if __name__ == "__main__":
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listening:
        listening.bind(("127.0.0.1", int(sys.argv[1])))
        answer_every_name_with_loopback(listening)
