"""Service `mlflow-host-logs`: send the journal to the stack's log group in CloudWatch Logs, if the stack has one.

The service saves the journal's cursor after CloudWatch has accepted the lines before the cursor. If the service is
killed, no line is lost, and at most the lines of one batch are sent twice. If CloudWatch is unreachable, the lines
remain in the journal. The service does not delay requests to the server.

    python -m mlflow_host.logs.run
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlflow_host.contract.launch import LaunchDocument
from mlflow_host.logs.batch import Batch
from mlflow_host.logs.journal import Event, Journal, JournalEnded, parse
from mlflow_host.machine import atomic_file, config
from mlflow_host.machine.status import StepFailed

STATE = Path(os.environ.get("STATE_DIRECTORY", "/var/lib/mlflow-host-logs"))
MACHINE = Path("/var/lib/cloud/data/instance-id")
"""cloud-init writes the instance's ID to this file at each boot."""
BATCH_SECONDS = 5.0
READ_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0

Put = Callable[[str, Sequence[Event]], None]
"""A function that sends the events of one stream, and raises an exception if CloudWatch does not accept the events."""


def main() -> int:
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    try:
        document = config.launch_document()
    except StepFailed as error:
        print(f"no line is sent to CloudWatch Logs: {error}")
        return 0
    if not document.monitoring.log_group:
        print("the stack has no log group, so no line is sent to CloudWatch Logs")
        return 0
    saved = STATE / "cursor"
    journal = Journal(saved.read_text().strip() if saved.exists() else "")
    put = to_cloudwatch(lambda: connect(document), document.monitoring.log_group, MACHINE.read_text().strip())
    try:
        ship(journal, put, lambda cursor: atomic_file.write(saved, f"{cursor}\n"), stopping)
    except JournalEnded as error:
        print(f"mlflow-host: {error}", file=sys.stderr)
        return 1
    finally:
        journal.close()
    return 0


def ship(journal: Journal, put: Put, save: Callable[[str], None], stopping: threading.Event) -> None:
    """Send the journal's lines in batches until `stopping` is set and all lines are sent. Raises JournalEnded."""
    batch, began = Batch(), time.monotonic()
    while True:
        last = stopping.is_set()
        lines = journal.read(READ_SECONDS)
        for cursor, event in map(parse, lines):
            if event and not batch.takes(event):
                if not deliver(batch, put, save, stopping):
                    return
                batch, began = Batch(), time.monotonic()
            batch.add(cursor, event)
        if batch.cursor and (time.monotonic() - began > BATCH_SECONDS or (last and not lines)):
            if not deliver(batch, put, save, stopping):
                return
            batch = Batch()
        if not batch.cursor:
            began = time.monotonic()
        if last and not lines:
            return


def deliver(batch: Batch, put: Put, save: Callable[[str], None], stopping: threading.Event) -> bool:
    """Send a batch and save its cursor. A failed request is repeated after increasing pauses. Returns False if the
    service stops before the batch is sent."""
    for stream, events in batch.streams.items():
        pause = 1.0
        while True:
            try:
                put(stream, events)
                break
            except Exception as error:  # any error of boto3: the lines stay in the batch
                print(
                    f"mlflow-host: {len(events)} lines of {stream} are not in CloudWatch Logs yet: {error}; the role "
                    "must allow logs:PutLogEvents and logs:CreateLogStream on the stack's log group, and the machine "
                    "must reach CloudWatch Logs (the setting logsEndpoint)",
                    file=sys.stderr,
                    flush=True,
                )
            if stopping.wait(pause):
                return False
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
    save(batch.cursor)
    return True


def connect(document: LaunchDocument) -> Any:
    """Create a boto3 client. If the instance metadata service returns no credentials yet, the client has none."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "logs",
        region_name=document.stack.region,
        endpoint_url=document.endpoints.logs or None,
        config=Config(retries={"mode": "standard", "max_attempts": 3}, connect_timeout=3, read_timeout=10),
    )


def to_cloudwatch(connected: Callable[[], Any], group: str, machine: str) -> Put:
    """Return a function that sends events to the log stream `<machine>/<stream>`. A missing log stream is created.

    After an error, the function creates a new client, because a client that was created without credentials never
    requests credentials again."""
    unused: list[Any] = []

    def put(stream: str, events: Sequence[Event]) -> None:
        logs = unused.pop() if unused else connected()
        there = {"logGroupName": group, "logStreamName": f"{machine}/{stream}"}
        entries = [{"timestamp": each.at, "message": each.text} for each in events]
        refused = None
        try:
            try:
                answer = logs.put_log_events(**there, logEvents=entries)
            except logs.exceptions.ResourceNotFoundException:
                logs.create_log_stream(**there)
                answer = logs.put_log_events(**there, logEvents=entries)
            refused = answer.get("rejectedLogEventsInfo")
        except logs.exceptions.InvalidParameterException as error:
            # CloudWatch would refuse every repetition of this request, and later lines would never be sent.
            refused = error
        if refused:
            report = f"CloudWatch Logs refuses some or all of {len(entries)} lines of {stream}: {refused}"
            print(f"mlflow-host: {report}", file=sys.stderr, flush=True)
        unused.append(logs)

    return put


if __name__ == "__main__":
    raise SystemExit(main())
