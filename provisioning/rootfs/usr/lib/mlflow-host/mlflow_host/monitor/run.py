"""Service `mlflow-host-monitor`: follow nginx's request log and write the audit trail to the journal and to files. The
service also counts the requests for Prometheus and for the page /mlflow-host/.

The service does not delay requests. After a restart, the service continues at the last position in nginx's log.

    python -m mlflow_host.monitor.run        as the OS user postgres
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from prometheus_client import CollectorRegistry

from mlflow_host.machine import config
from mlflow_host.monitor import audit, history, metrics, page, request_log, routes, scraping

STATE = Path(os.environ.get("STATE_DIRECTORY", "/var/lib/mlflow-host-monitor"))
RUNTIME = scraping.SOCKET.parent
PAUSE_SECONDS = 1.0
COMPACT = json.JSONEncoder(separators=(",", ":"))
FILE_SECONDS = 600
"""Maximum time in which lines are added to one file. Each file becomes one object in the bucket."""


def main() -> int:
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    spool, registry = audit.Spool(STATE), CollectorRegistry()
    counted = metrics.RequestMetrics(registry)
    processes = config.load().sizing.server_processes
    registry.register(metrics.Machine(processes=processes, waiting=lambda: len(spool.waiting())))
    scraping.serve(scraping.SOCKET, registry)
    shown = history.History.load(STATE / "history.json")
    drawn = page.Page(RUNTIME / "index.html")
    minutes = Minutes(shown, drawn)
    minutes.draw()

    def count(requests: Sequence[request_log.Request]) -> None:
        counted.add(requests)
        shown.add(requests)

    follow(request_log.LOG, spool, routes.installed(), stopping, count, minutes.tick)
    return 0


@dataclass
class Minutes:
    """At the end of each minute, updates the history and writes the page."""

    shown: history.History
    drawn: page.Page
    minute: int = field(default_factory=lambda: int(time.time() // 60))

    def tick(self) -> None:
        if (now := int(time.time() // 60)) == self.minute:
            return
        self.draw(ended=self.minute)
        self.minute = now

    def draw(self, ended: int | None = None) -> None:
        try:
            if ended is not None:
                self.shown.end_minute(ended, page.used_percent(self.drawn.data))
            self.drawn.write(self.shown, datetime.now(UTC))
        except Exception as error:  # the audit trail continues without the page
            print(f"mlflow-host: the page /mlflow-host/ is not written: {error}", file=sys.stderr, flush=True)


def follow(
    log: Path,
    spool: audit.Spool,
    known: routes.Routes,
    stopping: threading.Event,
    count: Callable[[Sequence[request_log.Request]], None] = lambda requests: None,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Write the audit trail, pass all requests to `count`, and call `tick` every second. After `stopping` is set, read
    the log to its end, and return."""
    follower, made = request_log.Follower(log, spool.resume()), audit.Lines(known)
    spool.complete(follower.position)  # a restart of the service also starts a new object
    begun = time.monotonic()
    while True:
        last = stopping.is_set()
        while lines := follower.read():
            requests = [*filter(None, map(request_log.parse, lines))]
            write([*made.of(requests)], spool, follower.position)
            count(requests)
        tick()
        if last or time.monotonic() - begun > FILE_SECONDS or is_large(spool):
            write([*made.rest()], spool, follower.position)
            spool.complete(follower.position)
            for path in spool.limit():
                report = f"{path.name} of the audit trail is deleted: {audit.WAITING_BYTES >> 20} MiB are not uploaded"
                print(f"mlflow-host: {report}; see `journalctl -u mlflow-host-audit`", file=sys.stderr, flush=True)
            begun = time.monotonic()
        if last:
            return
        stopping.wait(PAUSE_SECONDS)


def write(made: list[dict[str, object]], spool: audit.Spool, position: request_log.Position) -> None:
    lines = [COMPACT.encode(line) for line in made]
    spool.add(lines, position)
    if lines:
        print("\n".join(lines), flush=True)


def is_large(spool: audit.Spool) -> bool:
    return spool.current.exists() and spool.current.stat().st_size > audit.FILE_BYTES


if __name__ == "__main__":
    raise SystemExit(main())
