"""The progress of the boot: one status file per step. nginx serves a page of all steps until MLflow accepts requests.

    with step("database") as s:
        s.say("copying 64 tables")
        raise StepFailed("the backups bucket mlflow-backups does not exist: …")

StepFailed ends the process with exit status 2. The message of StepFailed is written to the status file, the page, the
journal and the console. After any other exception, the exit status is 1, and the journal also has the traceback.
"""

from __future__ import annotations

import fcntl
import html
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from string import Template
from typing import Any

RUN = Path("/run/mlflow-host")
PAGE = Path("/usr/share/mlflow-host/page.html")
REMOVAL = Path("/srv/mlflow/reports/garbage.json")
"""The last garbage collection (mlflow_host.garbage)."""
IMAGE = Path("/usr/share/mlflow-host/image.json")

STEPS = {
    "configure": "Reading the launch document and the credentials",
    "data-volume": "Mounting the data volume",
    "restore": "Restoring a backup",
    "postgresql": "Starting PostgreSQL",
    "certificates": "Preparing the certificate",
    "database": "Bringing the database to this image's schema",
    "ready": "Starting MLflow",
}
"""The default message on the page for each step, in the order of the boot."""

OPTIONAL = {"certificates", "restore"}
"""Steps that run only on some machines. The page shows such a step after it has begun."""


class StepFailed(Exception):
    """A boot step failed. The message is one sentence for the administrator: the fault, the value and the remedy."""


class BootStep:
    """A running step, which writes its own status file."""

    def __init__(self, name: str, run: Path):
        self.name, self._run = name, run
        self.started = datetime.now(UTC)
        self._message = ""

    def say(self, message: str) -> None:
        """Set the step's message, for example "copying 64 tables"."""
        print(f"{self.name}: {message}", file=sys.stderr, flush=True)
        self._message = message
        self.record("running")

    def record(self, state: str, message: str | None = None) -> None:
        self._message = self._message if message is None else message
        now = datetime.now(UTC)
        content = {
            "step": self.name,
            "state": state,
            "message": self._message,
            "started": self.started.isoformat(timespec="milliseconds"),
            "ended": None if state == "running" else now.isoformat(timespec="milliseconds"),
            "seconds": round(max(0.0, (now - self.started).total_seconds()), 3),
        }
        _write(self._run / "status" / f"{self.name}.json", json.dumps(content) + "\n")
        publish(self._run)

    @contextmanager
    def reporting(self) -> Iterator[BootStep]:
        """Record a failure of the `with` block. If the block succeeds, the recorded state stays "running"."""
        self.record("running")
        try:
            yield self
        except StepFailed as failure:
            self.record("failed", str(failure))
            print(f"mlflow-host: {self.name} failed: {failure}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self.record("failed", f"{reason} (this is a bug: the journal of this machine has the details)")
            raise


@contextmanager
def step(name: str, run: Path = RUN) -> Iterator[BootStep]:
    with (current := BootStep(name, run)).reporting():
        yield current
    current.record("done")


def finish(name: str, message: str, run: Path = RUN) -> None:
    """Record that a step is done, although another process has started the step."""
    print(f"{name}: {message}", file=sys.stderr, flush=True)
    current = BootStep(name, run)
    with suppress(OSError, ValueError, KeyError):
        begun = json.loads((run / "status" / f"{name}.json").read_text())["started"]
        current.started = datetime.fromisoformat(begun)
    current.record("done", message)


def is_done(name: str, run: Path = RUN) -> bool:
    """Whether a boot step has succeeded in this boot."""
    try:
        return bool(json.loads((run / "status" / f"{name}.json").read_text())["state"] == "done")
    except (OSError, ValueError):
        return False


def wait_until_done(name: str, run: Path = RUN, pause: float = 0.05) -> None:
    """Wait until a boot step is done. If the step fails, continue to wait, because the step may be started again."""
    while not is_done(name, run):
        time.sleep(pause)


def read(run: Path = RUN) -> dict[str, Any]:
    """Return the status of the boot: {"state": "starting" | "failed" | "ready", "message": …, "steps": [the status of
    each started step, in the order of the boot]}"""
    found = {}
    for path in (run / "status").glob("*.json"):
        try:
            found[path.stem] = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
    order = [*STEPS, *sorted(found.keys() - STEPS.keys())]
    steps = [found[name] for name in order if name in found]
    failed = next((s for s in steps if s["state"] == "failed"), None)
    if failed:
        return {"state": "failed", "message": f"{failed['step']} failed: {failed['message']}", "steps": steps}
    if found.get("ready", {}).get("state") == "done":
        return {
            "state": "ready",
            "message": "MLflow was started but does not respond: it is restarting",
            "steps": steps,
        }
    # Steps run in parallel, so the message is that of the last running step. If no step runs, the message is that of
    # the next step.
    running = next((s for s in reversed(steps) if s["state"] == "running"), None)
    if running:
        doing = running["message"] or STEPS.get(running["step"], running["step"])
    else:
        doing = next((what for name, what in STEPS.items() if name not in {*found, *OPTIONAL}), "Starting MLflow")
    return {"state": "starting", "message": doing, "steps": steps}


def publish(run: Path = RUN, page: Path = PAGE) -> None:
    """Write web/status.json and web/status.html, which nginx serves.

    Steps run in parallel. A lock ensures that the last writer has read all status files.
    """
    web = run / "web"
    if not web.is_dir():
        return
    lock = os.open(web, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = read(run)
        for report in ("room", "backups"):
            with suppress(OSError, ValueError):
                status[report] = json.loads((web / f"{report}.json").read_text())
        with suppress(OSError, ValueError):
            status["removal"] = {key: json.loads(REMOVAL.read_text())[key] for key in ("at", "summary")}
        with suppress(OSError, ValueError):
            status["fallbacks"] = [entry["what"] for entry in json.loads(IMAGE.read_text()).get("fallbacks", [])]
        _write_pages(web / "status", status, page)
        # If the file web/failed exists, nginx responds with a status code after which clients do not retry.
        if status["state"] == "failed":
            (web / "failed").touch()
        else:
            (web / "failed").unlink(missing_ok=True)
    finally:
        os.close(lock)


def publish_first(share: Path) -> None:
    """Write booting.json and booting.html into the folder `share`. The bake calls this function. nginx serves the two
    files before the first step of a boot."""
    _write_pages(share / "booting", read(share), share / PAGE.name)


def render(status: dict[str, Any], page: str) -> str:
    headings = {
        "starting": "MLflow is starting",
        "failed": "MLflow could not start",
        "ready": "MLflow is restarting",
    }
    begun = {s["step"]: s for s in status["steps"]}
    rows = []
    for name in [*STEPS, *(begun.keys() - STEPS.keys())]:
        if name in OPTIONAL and name not in begun:
            continue
        current = begun.get(name, {"state": "waiting", "message": "", "seconds": None})
        message = current["message"] or (STEPS.get(name, "") if current["state"] != "done" else "")
        seconds = f"{current['seconds']:.1f} s" if current["state"] in ("done", "failed") else ""
        rows.append(
            f'<li class="{html.escape(current["state"])}"><span class="name">{html.escape(name)}</span>'
            f'<span class="message">{html.escape(message)}</span><span class="seconds">{seconds}</span></li>'
        )
    problem = status.get("room", {}).get("problem")
    housekeeping = [problem] if problem else []
    housekeeping += [*last_backups(status.get("backups", {})), *last_removal(status.get("removal", {}))]
    housekeeping += [f"This release of MLflow does not support {what}" for what in status.get("fallbacks", [])]
    return Template(page).substitute(
        state=html.escape(status["state"]),
        heading=headings[status["state"]],
        message=html.escape(status["message"]),
        steps="\n".join(rows),
        backups="".join(f"{html.escape(line)}<br>" for line in housekeeping),
    )


def last_backups(found: dict[str, Any]) -> list[str]:
    """The result of `mlflow_host.backups.check` as lines. Before the first check, the list is empty."""
    names = {"archive": "last segment archived", "base": "last base backup", "dump": "last dump"}
    known = [f"{name} {found[what]['at']}" for what, name in names.items() if what in found]
    return [f"Backups: {', '.join(known)}"] * bool(known) + list(found.get("problems", []))


def last_removal(found: dict[str, str]) -> list[str]:
    """The result of the last garbage collection as a list of one line, or an empty list."""
    return [f"Deleted by users: {found['summary']}, {found['at']}"] if found else []


def _write_pages(path: Path, status: dict[str, Any], page: Path) -> None:
    _write(path.with_suffix(".json"), json.dumps({"error_code": "TEMPORARILY_UNAVAILABLE", **status}) + "\n")
    if page.exists():
        _write(path.with_suffix(".html"), render(status, page.read_text()))


def _write(path: Path, content: str) -> None:
    """Replace a file atomically. All users may read the file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(content)
            os.fchmod(handle, 0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    publish_first(PAGE.parent)
