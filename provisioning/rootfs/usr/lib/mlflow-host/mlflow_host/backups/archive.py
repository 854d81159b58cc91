"""Service that archives the write-ahead log: push a segment to the bucket when the archive_command sends its name.

PostgreSQL has no access to the instance's credentials, but this service has access. PostgreSQL's archive_command
(`pgbackrest_archive_command.py`) sends a segment's name over a Unix socket, and returns the reply to PostgreSQL.
PostgreSQL keeps each segment until it is archived. While the bucket is unreachable, segments wait on the data volume,
up to WAITING_SHARE of the volume. If the waiting segments exceed WAITING_SHARE, the service skips segments. The timer
`check` then reports a gap, and the next base backup is a full backup.

    python -m mlflow_host.backups.archive        as the OS user postgres
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mlflow_host.backups.last_runs import LastRuns, stamp, time_of
from mlflow_host.machine import config
from mlflow_host.postgres.pgbackrest import BackupError, Repository, Stanza, last_line, stanza_of

SOCKET = config.RUN / "backups" / "archive.sock"
WAITING_SHARE = 0.2
"""Share of the data volume that waiting segments may use."""
LEAST_WAITING = 256 << 20
BETWEEN_TRIES = timedelta(minutes=1)
"""If too many segments wait and a push fails, the service skips further segments during this interval, without trying
to push them. The queue therefore shrinks faster than new writes fill it."""
REQUEST_SECONDS = 10
"""Longest time that the service waits for the segment's name from the archive_command."""


def main() -> None:
    cluster = config.cluster()
    repository, history = Repository(cluster), LastRuns()
    limit = max(LEAST_WAITING, int(shutil.disk_usage(config.DATA).total * WAITING_SHARE))
    with listening(SOCKET) as listener:
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(REQUEST_SECONDS)
                try:
                    segment = connection.makefile("r").readline().strip()
                    connection.sendall(f"{push(repository, history, segment, limit)}\n".encode())
                except OSError as error:
                    message = f"mlflow-host: the archive_command closed the connection: {error}"
                    print(message, file=sys.stderr, flush=True)


def listening(path: Path) -> socket.socket:
    """Open the service's Unix socket with mode 0600."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(8)
    return listener


def push(repository: Repository, history: LastRuns, segment: str, limit: int, now: datetime | None = None) -> str:
    """Archive `segment`, a path below the cluster's folder. Returns "" if the segment is in the bucket or was skipped,
    otherwise the reason of the failure.

    A segment is skipped if its push fails and more than `limit` bytes of finished segments wait."""
    if not segment.startswith("pg_wal/") or ".." in segment:
        return f"{segment!r} is not a segment of the write-ahead log"
    stanza = stanza_of(repository.cluster)
    if stanza is None:
        return f"{repository.cluster} has no stanza yet: the start of PostgreSQL creates it"
    at, name = now or datetime.now(UTC), Path(segment).name
    note = {"at": stamp(at), "segment": name, "stanza": stanza.name}
    too_many = waiting_bytes(repository.cluster) > limit
    given_up = time_of(history.read("gap"))
    if too_many and given_up and at - given_up < BETWEEN_TRIES:
        reason = "the previous segment was skipped less than a minute ago"
    else:
        reason = push_once(repository, stanza, segment)
    if not reason:
        history.write("archive", note)
    elif too_many:
        message = f"mlflow-host: skipped WAL segment {name}: the archive queue is over its limit: {reason}"
        print(message, file=sys.stderr, flush=True)
        history.write("gap", note | ({"at": stamp(given_up)} if given_up and at - given_up < BETWEEN_TRIES else {}))
        return ""
    else:
        print(f"mlflow-host: {name} is not archived: {reason}", file=sys.stderr, flush=True)
    return reason


def push_once(repository: Repository, stanza: Stanza, segment: str) -> str:
    """Push a segment with pgBackRest, and create the stanza if it is missing. Returns "" or the reason of the
    failure."""
    arguments = [f"--pg1-path={repository.cluster}", "archive-push", segment]
    done = repository.run(stanza.name, *arguments)
    if done.returncode and "stanza-create" in done.stdout:
        try:
            repository.create_stanza(stanza)
        except BackupError as error:
            return str(error)
        done = repository.run(stanza.name, *arguments)
    return last_line(done.stdout) if done.returncode else ""


def waiting_bytes(cluster: Path) -> int:
    """Total size in bytes of the finished segments that are not archived yet."""
    ready = (cluster / "pg_wal" / "archive_status").glob("*.ready")
    sizes = []
    for each in ready:
        with suppress(FileNotFoundError):
            sizes.append((cluster / "pg_wal" / each.stem).stat().st_size)
    return sum(sizes)


if __name__ == "__main__":
    main()
