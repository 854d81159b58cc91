"""The gRPC server of a plug-in for Pulumi's engine."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent import futures
from typing import Any

import grpc

MESSAGE_BYTES = 400 * 2**20
"""Pulumi's limit for one gRPC message."""
THREADS = 32


def serve(servicer: Any, add: Callable[[Any, Any], None]) -> None:
    """Serve until the engine ends this process. The engine reads the port from the first line of standard output."""
    options = [("grpc.max_receive_message_length", MESSAGE_BYTES), ("grpc.max_send_message_length", MESSAGE_BYTES)]
    server = grpc.server(futures.ThreadPoolExecutor(THREADS), options=options)
    add(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    # The engine ends its plug-ins with SIGINT. If the user presses Ctrl-C, only the engine receives this SIGINT.
    signal.signal(signal.SIGINT, lambda number, frame: server.stop(None))
    print(port, flush=True)
    server.wait_for_termination()
