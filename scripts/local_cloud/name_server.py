"""The name server of a machine, at the address of Amazon's name server in every VPC. The name server answers names of
the cloud's databases and refuses all others. For a refused name, a machine's resolver asks slirp4netns's name server.
"""

from __future__ import annotations

import socket
import socketserver
import struct
import threading
from collections.abc import Callable

from scripts.local_cloud import namespaces

ADDRESS = "169.254.169.253"
TTL_SECONDS = 5
"""RDS changes an endpoint's address at a failover, and its records live five seconds."""

ANSWERED, REFUSED = 0x8580, 0x8585  # response, authoritative, recursion desired and available, RCODE 0 or 5
ADDRESS_RECORD, INTERNET = 1, 1


class NameServer:
    """The name server of one machine, in a network namespace. This object owns the socket and a thread."""

    def __init__(self, namespace: int, look_up: Callable[[str], str | None]) -> None:
        """`look_up` returns the IPv4 address of a lower-case name, or None for a name that the cloud does not have."""

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                request, sock = self.request
                if reply := answer(request, look_up):
                    sock.sendto(reply, self.client_address)

        with namespaces.inside(namespace):
            self._server = socketserver.UDPServer((ADDRESS, 53), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.2,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def answer(request: bytes, look_up: Callable[[str], str | None]) -> bytes | None:
    """Return the response to a DNS query with one question, or None for a message that is not such a query."""
    try:
        identifier, flags, questions = struct.unpack_from("!HHH", request)
        labels, at = [], 12
        while length := request[at]:
            labels.append(request[at + 1 : at + 1 + length].decode())
            at += 1 + length
        kind, network = struct.unpack_from("!HH", request, at + 1)
    except (IndexError, struct.error, UnicodeDecodeError):
        return None
    if flags & 0x8000 or questions != 1:
        return None
    address = look_up(".".join(labels).lower())
    found = address if (kind, network) == (ADDRESS_RECORD, INTERNET) else None
    header = struct.pack("!HHHHHH", identifier, ANSWERED if address else REFUSED, 1, 1 if found else 0, 0, 0)
    reply = header + request[12 : at + 5]
    if found:  # 0xC00C refers to the name in the question
        reply += struct.pack("!HHHIH", 0xC00C, ADDRESS_RECORD, INTERNET, TTL_SECONDS, 4) + socket.inet_aton(found)
    return reply
