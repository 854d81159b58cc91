"""HTTP server for Prometheus on a Unix socket behind nginx. A response has all metrics in the format that the request
accepts.

A response is reused for KEEP_SECONDS, so frequent scrapes cost little.
"""

from __future__ import annotations

import os
import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

SOCKET = Path("/run/mlflow-host-monitor/metrics.sock")
OPEN = "application/openmetrics-text"
KEEP_SECONDS = 1.0
REQUEST_SECONDS = 5


class Server(socketserver.ThreadingUnixStreamServer):
    """Serves one registry on a Unix socket. Every local process may connect, because the metrics contain no secret."""

    daemon_threads = True

    def __init__(self, path: Path, registry: CollectorRegistry):
        path.unlink(missing_ok=True)
        before = os.umask(0o111)
        try:
            super().__init__(str(path), _Scrape)
        finally:
            os.umask(before)
        self.registry = registry
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[float, bytes]] = {}

    def report(self, accept: str) -> tuple[bytes, str]:
        """Return the report and its content type."""
        # Only two formats are possible. If the key contained the client's version, `_kept` could grow without limit.
        encode, content_type = choose_encoder(f"{OPEN};version=1.0.0" if OPEN in accept else "")
        with self._lock:
            made, report = self._kept.get(content_type, (0.0, b""))
            if not report or time.monotonic() - made > KEEP_SECONDS:
                report = encode(self.registry)
                self._kept[content_type] = (time.monotonic(), report)
        return report, content_type


class _Scrape(BaseHTTPRequestHandler):
    server: Server
    timeout = REQUEST_SECONDS

    def do_GET(self) -> None:
        report, content_type = self.server.report(self.headers.get("Accept", ""))
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(report)))
        self.end_headers()
        self.wfile.write(report)

    def address_string(self) -> str:
        return "nginx"

    def log_message(self, *_: object) -> None:
        return


def serve(path: Path, registry: CollectorRegistry) -> Server:
    """Start a thread that serves the registry. `shutdown` ends the thread."""
    server = Server(path, registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
