"""Block all network access of a Python program except to this machine. A look-up or connection to another host takes
seconds, fails, and is logged in the file $CUT_OFF_LOG. Python imports this module at start if PYTHONPATH contains its
folder."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

LOG = Path(os.environ["CUT_OFF_LOG"])
SECONDS = 3
HERE = {"", "localhost", "127.0.0.1", "::1", "0.0.0.0", None}
LOOK_UPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}


def cut(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # otherwise a Unix socket
    elif event in LOOK_UPS:
        host = arguments[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in HERE:
        with LOG.open("a") as log:
            log.write(f"{event} {host}\n")
        time.sleep(SECONDS)
        raise OSError(f"{host} cannot be reached: this test has cut the internet off")


sys.addaudithook(cut)
