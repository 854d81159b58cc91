"""Service `mlflow-host-watchdog`: kill PostgreSQL or nginx when it hangs. systemd then starts it again.

systemd does this itself for the server processes of MLflow, which send it notifications (WatchdogSec=). PostgreSQL and
nginx send none, so this service asks both for a short answer every two seconds. PostgreSQL recovers from a kill as from
a power failure: no committed transaction is lost.

    python -m mlflow_host.upkeep.watchdog        as root, without capabilities
"""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POSTGRESQL = Path("/run/postgresql/.s.PGSQL.5432")
NGINX = Path("/run/nginx/monitor.sock")
"""nginx creates it with the site, after the starting page."""
SSL_REQUEST = struct.pack("!ii", 8, 80877103)
"""PostgreSQL's frontend/backend protocol, SSLRequest: the postmaster starts a process, which answers with one byte. It
answers during recovery and when all connections are in use, too, and writes no log line."""
HTTP_REQUEST = b"GET /requests HTTP/1.0\r\n\r\n"
PAUSE_SECONDS = 2.0
ANSWER_SECONDS = 4.0
HANG_SECONDS = 15.0
"""As long as WatchdogSec= of the server processes."""
FEWEST_CHECKS = 3
"""A check may fail because this service itself did not run, for example while the hypervisor paused the machine."""


def main() -> int:
    watches = [
        Watch("mlflow-host-postgresql.service", lambda: hangs(POSTGRESQL, SSL_REQUEST)),
        Watch("nginx.service", lambda: hangs(NGINX, HTTP_REQUEST)),
    ]
    while True:
        for watch in watches:
            watch.check()
        time.sleep(PAUSE_SECONDS)


def hangs(path: Path, request: bytes, seconds: float = ANSWER_SECONDS) -> bool:
    """Whether a program listens at the Unix socket `path` and sends nothing within `seconds`.

    False if none listens: systemd starts a program that has ended."""
    with socket.socket(socket.AF_UNIX) as opened:
        opened.settimeout(seconds)
        try:
            opened.connect(str(path))
            opened.sendall(request)
            opened.recv(1)
        except (TimeoutError, BlockingIOError):  # EAGAIN: its queue of new connections is full
            return True
        except OSError:
            return False
    return False


@dataclass
class Watch:
    """The failed checks in turn of one unit, whose processes are killed when they have lasted for HANG_SECONDS."""

    unit: str
    hangs: Callable[[], bool]
    systemctl: str = "/usr/bin/systemctl"
    clock: Callable[[], float] = time.monotonic
    failed: int = 0
    since: float = 0.0

    def check(self) -> None:
        began = self.clock()
        if not self.hangs():
            self.failed = 0
            return
        self.failed += 1
        if self.failed == 1:
            self.since = began
        seconds = self.clock() - self.since
        if self.failed >= FEWEST_CHECKS and seconds >= HANG_SECONDS and self.is_active():
            self.kill(seconds)
            self.failed = 0

    def is_active(self) -> bool:
        """Whether the unit has started and is not stopping: a shutdown of PostgreSQL may take minutes."""
        return subprocess.run([self.systemctl, "is-active", "--quiet", self.unit]).returncode == 0

    def kill(self, seconds: float) -> None:
        message = f"{self.unit} has not answered for {seconds:.0f} s; its processes are killed, and systemd starts it"
        print(f"mlflow-host: {message}", file=sys.stderr, flush=True)
        subprocess.run([self.systemctl, "kill", "--signal=SIGKILL", self.unit])


if __name__ == "__main__":
    raise SystemExit(main())
