"""Service `mlflow-host-watchdog`: kill PostgreSQL or nginx if it hangs, so that systemd restarts it.

MLflow's server processes do not need this service, because they send watchdog notifications to systemd (WatchdogSec=).
PostgreSQL and nginx send no watchdog notifications, so this service sends a short request to each of the two every two
seconds. After a kill, PostgreSQL recovers like after a power failure, and no committed transaction is lost. The unit
runs this command as root without capabilities:

    python -m mlflow_host.upkeep.watchdog
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
"""nginx creates this socket when it loads the site's configuration, which replaces the starting page."""
SSL_REQUEST = struct.pack("!ii", 8, 80877103)
"""The message SSLRequest of PostgreSQL's frontend/backend protocol. The postmaster responds with one byte, even during
recovery or if all connections are in use. PostgreSQL writes no log line for SSLRequest."""
HTTP_REQUEST = b"GET /requests HTTP/1.0\r\n\r\n"
PAUSE_SECONDS = 2.0
ANSWER_SECONDS = 4.0
HANG_SECONDS = 15.0
"""A program that does not respond for this time is killed. WatchdogSec= in mlflow-server@.service is the same value."""
FEWEST_CHECKS = 3
"""Minimum number of failed checks before a kill. A single check may fail because this service itself did not run, for
example if the hypervisor paused the machine."""


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
    """Return true if a program listens on the Unix socket `path`, but sends nothing within `seconds`.

    Returns false if no program listens, because systemd itself restarts a program that has ended."""
    with socket.socket(socket.AF_UNIX) as opened:
        opened.settimeout(seconds)
        try:
            opened.connect(str(path))
            opened.sendall(request)
            opened.recv(1)
        except (TimeoutError, BlockingIOError):  # BlockingIOError: the program's queue of new connections is full
            return True
        except OSError:
            return False
    return False


@dataclass
class Watch:
    """The checks of one unit. If all checks fail for HANG_SECONDS, the unit's processes are killed."""

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
        """Return true if the unit is active, false if the unit is stopping. PostgreSQL may need minutes to stop."""
        return subprocess.run([self.systemctl, "is-active", "--quiet", self.unit]).returncode == 0

    def kill(self, seconds: float) -> None:
        message = f"{self.unit} has not answered for {seconds:.0f} s: its processes are killed, and systemd restarts it"
        print(f"mlflow-host: {message}", file=sys.stderr, flush=True)
        subprocess.run([self.systemctl, "kill", "--signal=SIGKILL", self.unit])


if __name__ == "__main__":
    raise SystemExit(main())
