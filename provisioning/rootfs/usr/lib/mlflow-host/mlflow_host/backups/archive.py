"""Archives the write-ahead log: answers PostgreSQL's archive_command by pushing the segment with pgBackRest.

PostgreSQL itself has no way to the instance's credentials. Its archive_command (`ask_pgbackrest.py`) names a segment
over a Unix socket to this service, which has one, and passes on the answer: PostgreSQL keeps a segment until it has
heard that it is in the bucket. While the bucket is out of reach segments pile up on the data volume, but no further
than a share of it: then they are given up, which the check tells, and the next base backup begins anew.

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

from mlflow_host import config
from mlflow_host.backups.history import History, stamp, time_of
from mlflow_host.backups.repository import BackupError, Repository, Stanza, last_line, stanza_of

SOCKET = config.RUN / "backups" / "archive.sock"
WAITING_SHARE = 0.2
"""Of the data volume: how much of the log may wait for the bucket."""
LEAST_WAITING = 256 << 20
BETWEEN_TRIES = timedelta(minutes=1)
"""While segments are being given up, only one a minute is tried first: giving up must outrun who writes."""
ASKING_SECONDS = 10
"""For PostgreSQL's command to name its segment."""


def main() -> None:
    cluster = config.cluster()
    repository, history = Repository(cluster), History()
    limit = max(LEAST_WAITING, int(shutil.disk_usage(config.DATA).total * WAITING_SHARE))
    with listening(SOCKET) as listener:
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(ASKING_SECONDS)
                try:
                    segment = connection.makefile("r").readline().strip()
                    connection.sendall(f"{push(repository, history, segment, limit)}\n".encode())
                except OSError as error:
                    print(f"mlflow-host: PostgreSQL did not wait for its answer: {error}", file=sys.stderr, flush=True)


def listening(path: Path) -> socket.socket:
    """For this user alone."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(8)
    return listener


def push(repository: Repository, history: History, segment: str, limit: int, now: datetime | None = None) -> str:
    """Archive `segment`, a path below the cluster's folder; "" once it is in the bucket or given up, else why not.

    It is given up when pushing fails and more than `limit` bytes of finished segments wait."""
    if not segment.startswith("pg_wal/") or ".." in segment:
        return f"{segment!r} is no segment of the write-ahead log"
    stanza = stanza_of(repository.cluster)
    if stanza is None:
        return f"{repository.cluster} has no name for its history yet: it gets one when PostgreSQL starts"
    at, name = now or datetime.now(UTC), Path(segment).name
    note = {"at": stamp(at), "segment": name, "stanza": stanza.name}
    too_many = waiting_bytes(repository.cluster) > limit
    given_up = time_of(history.read("gap"))
    if too_many and given_up and at - given_up < BETWEEN_TRIES:
        why = "the one before it was given up just now"
    else:
        why = pushed(repository, stanza, segment)
    if not why:
        history.write("archive", note)
    elif too_many:
        print(f"mlflow-host: {name} was given up, for too many wait: {why}", file=sys.stderr, flush=True)
        history.write("gap", note | ({"at": stamp(given_up)} if given_up and at - given_up < BETWEEN_TRIES else {}))
        return ""
    else:
        print(f"mlflow-host: {name} is not archived: {why}", file=sys.stderr, flush=True)
    return why


def pushed(repository: Repository, stanza: Stanza, segment: str) -> str:
    """Push by pgBackRest, which is told of a new history first; "" or its reason."""
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
    """Of the segments that PostgreSQL has finished and keeps until they are archived."""
    ready = (cluster / "pg_wal" / "archive_status").glob("*.ready")
    sizes = []
    for each in ready:
        with suppress(FileNotFoundError):
            sizes.append((cluster / "pg_wal" / each.stem).stat().st_size)
    return sum(sizes)


if __name__ == "__main__":
    main()
