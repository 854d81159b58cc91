"""The control socket: LocalCloud sends commands to the daemon as JSON lines over a Unix socket."""

from __future__ import annotations

import json
import socket
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.local_cloud.layout import LocalCloudError


def serve(path: Path, obey: Callable[[dict[str, Any]], Any], shut_down: Callable[[], None]) -> None:
    """Accept connections forever. Each connection sends one JSON line and gets one JSON line as the answer. After a
    successful command `down`, the function calls `shut_down`."""
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    path.chmod(0o600)
    listening.listen(16)
    while True:
        connection, _ = listening.accept()
        threading.Thread(target=_handle, args=(connection, obey, shut_down), daemon=True).start()


def _handle(connection: socket.socket, obey: Callable[[dict[str, Any]], Any], shut_down: Callable[[], None]) -> None:
    with connection, connection.makefile("rwb") as stream:
        order: dict[str, Any] = {}
        try:
            order = json.loads(stream.readline())
            answer = {"ok": True, "result": obey(order)}
        except LocalCloudError as error:
            answer = {"ok": False, "error": str(error)}
        except Exception as error:
            traceback.print_exc()
            answer = {"ok": False, "error": repr(error)}
        stream.write(json.dumps(answer).encode() + b"\n")
        stream.flush()
        if order.get("op") == "down" and answer["ok"]:
            threading.Thread(target=shut_down).start()
