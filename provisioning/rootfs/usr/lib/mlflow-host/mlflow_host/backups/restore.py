"""Restore a backup: boot step `restore`, before PostgreSQL starts, and the command mlflow-host-restore.

    mlflow-host-restore list                      list the available backups
    mlflow-host-restore latest                    restore all data up to the end of the archived log
    mlflow-host-restore 2026-11-22T14:15:00Z      restore all data that was committed until this time
    mlflow-host-restore 20261122-013005F          restore a base backup, without the log after it
    mlflow-host-restore dumps/….dump              restore a dump, also from an older major version of PostgreSQL

The stack's setting restoreFrom accepts each of these arguments except `list`. The value of restoreFrom is restored only
once, because the data volume contains a record of the last restore.

A restore overwrites no data. A base backup is restored to a second cluster folder, recovered, checked, and then
exchanged with the cluster in service. A dump is restored to a second database, which is then exchanged with the
database in service. The replaced cluster or database is kept under a name that contains the time. After a crash at any
moment, the old data or the restored data is in service. The boot after the crash finishes or repeats the restore.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import psycopg2

from mlflow_host.backups import restore_choice
from mlflow_host.backups.last_runs import LastRuns, stamp
from mlflow_host.backups.restore_choice import RecoveryPoint, RecoveryPoints
from mlflow_host.contract.launch import LaunchDocument
from mlflow_host.machine import atomic_file, config
from mlflow_host.machine.status import BootStep, StepFailed, step
from mlflow_host.postgres import dump_file, flip, initdb, ownership, pgbackrest
from mlflow_host.postgres.catalog import head
from mlflow_host.postgres.cluster import (
    WORK_PREFIX,
    Cluster,
    accepts_connections,
    connection,
    create_empty,
    databases,
    drop,
)
from mlflow_host.postgres.ownership import OwnershipRecord
from mlflow_host.postgres.pgbackrest import BackupError, Repository, last_line, stanza_of, start_stanza

REQUEST, FLIP, RESTORED = "restore-request", "restore-flip", "restored"
"""Files on the data volume: the command's request, the record of an unfinished exchange, the last restore."""


class RestoreState(StrEnum):
    """The state of a restore, as `state_of` reads it from files on the data volume. The boot step acts on this state.

    state               files                            action of the boot step  state after the boot step
    EXCHANGE_DECIDED    FLIP                             finish the exchange      NOTHING_TO_DO
    REQUESTED_BY_HAND   REQUEST, no FLIP                 restore; delete REQUEST  see below
    REQUESTED_BY_STACK  no FLIP, no REQUEST; RESTORED    restore                  see below
                        has another value than the
                        launch document's restoreFrom
    NOTHING_TO_DO       none of these                    delete the work folder   NOTHING_TO_DO

    A restore of a base backup writes FLIP before the exchange. After a crash, the state is EXCHANGE_DECIDED if FLIP was
    written; otherwise the state is unchanged. After a successful restore, the step writes RESTORED, and the state is
    NOTHING_TO_DO. If a restore fails in the state REQUESTED_BY_HAND, the step deletes REQUEST. If a restore fails in
    the state REQUESTED_BY_STACK, the state does not change, and the next boot repeats the restore.
    """

    EXCHANGE_DECIDED = "exchange decided"
    REQUESTED_BY_HAND = "requested by hand"
    REQUESTED_BY_STACK = "requested by the stack"
    NOTHING_TO_DO = "nothing to do"


def state_of(history: LastRuns, restore_from: str) -> RestoreState:
    """Read the state. `restore_from` is the launch document's value, or "" if the document has no value."""
    if history.read(FLIP):
        return RestoreState.EXCHANGE_DECIDED
    if history.read(REQUEST).get("value"):
        return RestoreState.REQUESTED_BY_HAND
    if restore_from and history.read(RESTORED).get("value") != restore_from:
        return RestoreState.REQUESTED_BY_STACK
    return RestoreState.NOTHING_TO_DO


CLUSTER_SPACE = 1.3
"""Free bytes that a restore needs per byte of a base backup: for the cluster and for the replayed log."""
DUMP_SPACE = 9
"""Free bytes that a restore needs per byte of a dump: for the compressed file and for the uncompressed data."""
SPARE = 256 << 20

RENAME_EXCHANGE = 2

TOO_EARLY = "recovery ended before configured recovery target was reached"

FETCH = (
    'for attempt in 1 2 3; do {fetch} archive-get %f "%p"; status=$?; [ $status -le 1 ] && exit $status; sleep 1; '
    "done; exit 126"
)
"""The restore_command. Exit status 1 means that the segment is not archived, and PostgreSQL then ends recovery. After
another failure, such as an unreachable bucket, the exit status is 126, and PostgreSQL then aborts recovery."""


@dataclass(frozen=True)
class RestorePaths:
    """The folders and versions that a restore uses. Tests use their own folders."""

    clusters: Path
    major: int
    programs: Path
    """PostgreSQL's programs."""
    sockets: Path
    """A private folder for PostgreSQL's socket, so that only this step can connect to PostgreSQL during a restore."""
    settings: Path
    repository_settings: Path
    history: LastRuns
    archiving: bool = True

    @property
    def live(self) -> Path:
        return self.clusters / str(self.major)

    @property
    def work(self) -> Path:
        return self.clusters / f"{self.major}.restoring"

    def repository(self, cluster: Path) -> Repository:
        return Repository(cluster, self.repository_settings, self.sockets)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="mlflow-host-restore", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", help="list, latest, a point in time, or the name of a backup")
    parser.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    parser.add_argument("--step", action="store_true", help="run the boot step: perform the requested restore, if any")
    arguments = parser.parse_args()
    if arguments.step:
        with step("restore") as s:
            s.say(perform(this_machine(), config.load().launch, s))
        return
    if not arguments.what:
        parser.error("name a backup to restore, or list")
    try:
        raise SystemExit(command(arguments.what, sure=arguments.yes))
    except (BackupError, StepFailed, OSError) as error:
        print(f"mlflow-host: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def this_machine() -> RestorePaths:
    major = config.postgresql_major()
    return RestorePaths(
        clusters=config.CLUSTERS,
        major=major,
        programs=initdb.binaries(major),
        sockets=config.RUN / "backups",
        settings=initdb.SETTINGS,
        repository_settings=pgbackrest.SETTINGS,
        history=LastRuns(),
        archiving=pgbackrest.archives(config.load().launch),
    )


# The command


def command(what: str, *, sure: bool) -> int:
    """The command mlflow-host-restore: stop PostgreSQL, run the boot step `restore`, and start all units again."""
    host, place = config.load(), this_machine()
    there = available(place, host.launch)
    if what == "list":
        print("\n".join(restore_choice.table(there)))
        return 0
    chosen = restore_choice.choose(what, there, place.major, stanza_of(place.live), datetime.now(UTC))
    aside = "The current data is kept under a new name. MLflow is down during the restore."
    print(f"This restores {chosen.described()}. {aside}", file=sys.stderr)
    if not sure and not confirmed():
        raise BackupError("nothing was restored; --yes skips the confirmation")
    systemctl("stop", "mlflow-host-postgresql.service", *host.server_units)
    place.history.write(REQUEST, {"value": what, "at": stamp(datetime.now(UTC))})
    status = systemctl("restart", "mlflow-host-restore.service")
    if status and going_down():
        raise BackupError("the machine is shutting down: the restore runs at its next boot")
    place.history.forget(REQUEST)
    if status:
        (config.RUN / "status" / "restore.json").unlink(missing_ok=True)
    started = systemctl("start", "mlflow-host-ready.service", *host.server_units)
    if status:
        print("mlflow-host: the restore failed; the previous data is in service again", file=sys.stderr)
        return 2
    # The restored cluster archives to a new stanza, and a new stanza needs a base backup.
    systemctl("start", "--no-block", "mlflow-host-base-backup.service")
    print(json.dumps(place.history.read(RESTORED)))
    return 2 if started else 0


def confirmed() -> bool:
    if not sys.stdin.isatty():
        return False
    print("mlflow-host: type yes to restore: ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip() == "yes"


def systemctl(*arguments: str) -> int:
    return subprocess.run(["systemctl", *arguments], stdin=subprocess.DEVNULL).returncode


def going_down() -> bool:
    """Whether the machine is shutting down. During a shutdown, systemd cancels queued jobs, or does not answer."""
    command = ["systemctl", "is-system-running"]
    state = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout.strip()
    return state not in ("running", "degraded", "starting", "initializing", "maintenance")


# The step


def perform(place: RestorePaths, document: LaunchDocument, s: BootStep) -> str:
    """Perform the requested restore, if it is not done yet. Returns a sentence about the result. If the restore fails,
    raises StepFailed, and the old data stays in service."""
    history = place.history
    match state_of(history, document.backups.restore_from):
        case RestoreState.EXCHANGE_DECIDED:
            return f"finished the exchange that an earlier boot began: {finish_exchange(place)} is in service"
        case RestoreState.NOTHING_TO_DO:
            shutil.rmtree(place.work, ignore_errors=True)  # remains of an interrupted restore
            return "no restore is requested, or it is done already"
        case RestoreState.REQUESTED_BY_HAND:
            value = str(history.read(REQUEST)["value"])
        case RestoreState.REQUESTED_BY_STACK:
            value = document.backups.restore_from
    try:
        there = available(place, document)
        ours, now = stanza_of(place.live), datetime.now(UTC)
        chosen = restore_choice.choose(value, there, place.major, ours, now)
        s.say(f"restoring {chosen.described()}")
        note = {"value": document.backups.restore_from, "asked": value, "at": stamp(now), "what": chosen.described()}
        if chosen.dump:
            kept = restore_dump(place, document, chosen, now, s.say) or set_aside_other_majors(place)
            history.write(RESTORED, {**note, "kept": kept})
        else:
            kept = restore_cluster(place, chosen, note, now, s.say)
    except (BackupError, dump_file.DumpError, psycopg2.Error, OSError) as error:
        raise StepFailed(f"{str(error).strip()}; the previous data is unchanged") from error
    except Exception as error:
        if type(error).__module__.startswith(("boto3", "botocore")):
            raise StepFailed(f"the backups bucket cannot be read: {error}; the previous data is unchanged") from error
        raise
    finally:
        # A request by hand is tried once. If this process is killed before the next line, REQUEST remains, and the next
        # boot repeats the restore.
        history.forget(REQUEST)
    return f"restored {chosen.described()}" + (f"; the previous data is kept as {kept}" if kept else "")


def available(place: RestorePaths, document: LaunchDocument) -> RecoveryPoints:
    bucket = pgbackrest.bucket(document)
    reader = place.repository(place.live) if place.archiving else None
    return restore_choice.list_recovery_points(reader, dump_file.s3_client(bucket), bucket.name)


# Restore of a base backup, and replay of the log that was archived after the backup


def restore_cluster(
    place: RestorePaths, chosen: RecoveryPoint, note: dict[str, Any], now: datetime, say: Callable[[str], None]
) -> str | None:
    """Restore a base backup to a second folder, recover and check the cluster, and exchange the folders. Returns the
    name of the replaced cluster, or None if there was no cluster.

    Raises BackupError."""
    assert chosen.line and chosen.base
    shutil.rmtree(place.work, ignore_errors=True)
    require_space(place.clusters, int(chosen.base.bytes * CLUSTER_SPACE) + SPARE)
    try:
        say(f"fetching base backup {chosen.base.label}, {chosen.base.bytes >> 20} MiB")
        stanza = chosen.line.stanza.name
        fetch = place.repository(place.work)
        arguments = [f"--pg1-path={place.work}", f"--set={chosen.base.label}", "--type=none", "restore"]
        for _ in range(2):  # at boot, the association of the Elastic IP may interrupt the first attempt
            shutil.rmtree(place.work, ignore_errors=True)
            place.work.mkdir(mode=0o700)
            done = fetch.run(stanza, *arguments)
            if not done.returncode:
                break
        else:
            raise BackupError(f"base backup {chosen.base.label} could not be fetched: {last_line(done.stdout)}")
        say("replaying the archived log")
        if remark := replay_log(place, chosen, fetch.command(stanza, f"--pg1-path={place.work}")):
            say(remark)
            note = note | {"remark": remark}
        start_stanza(place.work, now)
    except BaseException:
        shutil.rmtree(place.work, ignore_errors=True)
        raise
    say("putting the restored cluster in service")
    kept = f"{place.major}.kept-{now:%Y%m%dT%H%M%SZ}" if place.live.exists() else None
    stanza_now = stanza_of(place.work)
    assert stanza_now
    place.history.write(FLIP, {"history": stanza_now.name, "kept": kept, "note": {**note, "kept": kept}})
    finish_exchange(place)
    return place.history.read(RESTORED).get("kept")


def replay_log(place: RestorePaths, chosen: RecoveryPoint, fetch: list[str]) -> str:
    """Replay the log. Check that PostgreSQL can open the cluster, and that MLflow's database is readable. Returns a
    remark about a gap in the log, or "".

    Raises BackupError."""
    signal_file = place.work / "recovery.signal"
    signal_file.touch()
    options = {
        "archive_mode": "off",
        # With hot_standby, recovery fails if max_connections is smaller than on the original machine.
        "hot_standby": "off",
        "recovery_target_action": "promote",
        "restore_command": FETCH.format(fetch=" ".join(fetch)),
    }
    if chosen.target:
        options["recovery_target_time"] = chosen.target.isoformat()
    elif not chosen.whole:
        options["recovery_target"] = "immediate"
    log: list[str] = []
    try:
        open_once(place, options, log)
    except BackupError as error:
        if not chosen.target or TOO_EARLY not in str(error):
            raise
        if gap := gap_in(chosen, log):
            raise BackupError(
                f"{gap}, so the state at {stamp(chosen.target)} cannot be restored: name an earlier moment, or a later "
                "base backup"
            ) from None
        # No transaction was committed after the target, so the state at the target is the state at the end of the log.
        del options["recovery_target_time"]
        open_once(place, options, log)
    return gap_in(chosen, log) if chosen.whole else ""


def open_once(place: RestorePaths, options: dict[str, str], log: list[str]) -> None:
    with private_postgresql(place, place.work, options, log) as cluster:
        names = databases(cluster)
        if cluster.database in names:
            with connection(cluster, cluster.database) as opened:
                head(opened)


def gap_in(chosen: RecoveryPoint, log: list[str]) -> str:
    """A text about the gap in the log if the replay ended before the last archived segment, else ""."""
    assert chosen.line
    replayed = [found[1] for line in log if (found := re.search(r'restored log file "([0-9A-F]{24})"', line))]
    if replayed and max(replayed) >= chosen.line.last_segment:
        return ""
    return "the archived write-ahead log has a gap " + (f"after {max(replayed)}" if replayed else "at its beginning")


def finish_exchange(place: RestorePaths) -> str | None:
    """Complete the exchange that the file FLIP records. Idempotent. Returns a description of the restored data, or None
    if the file does not exist.

    The exchange is one system call, so the folder `place.live` exists at every moment."""
    decided = place.history.read(FLIP)
    if not decided:
        return None
    current = stanza_of(place.live)
    if current is None or current.name != decided["history"]:
        exchange(place.work, place.live)
    if place.work.exists() and decided["kept"]:
        place.work.rename(place.clusters / decided["kept"])
        atomic_file.sync(place.clusters)
    note = decided["note"]
    place.history.write(RESTORED, {**note, "kept": note.get("kept") or set_aside_other_majors(place)})
    place.history.forget(REQUEST)
    place.history.forget(FLIP)
    return str(decided["note"]["what"])


def set_aside_other_majors(place: RestorePaths) -> str | None:
    """Rename the outdated clusters of other major versions of PostgreSQL, so that an older image does not start them.
    Returns the last new name, or None if no cluster was renamed."""
    kept = None
    for path in place.clusters.iterdir():
        if path.name.isdigit() and path != place.live:
            kept = f"{path.name}.kept-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
            path.rename(place.clusters / kept)
    atomic_file.sync(place.clusters)
    return kept


def exchange(new: Path, live: Path) -> None:
    """Swap the two folders atomically, or rename `new` to `live` if `live` does not exist."""
    if not live.exists():
        new.rename(live)
    else:
        library = ctypes.CDLL(None, use_errno=True)
        here = ctypes.c_int(-100)  # AT_FDCWD; both paths are absolute
        names = ctypes.c_char_p(os.fsencode(new)), ctypes.c_char_p(os.fsencode(live))
        if library.renameat2(here, names[0], here, names[1], ctypes.c_uint(RENAME_EXCHANGE)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(live))
    atomic_file.sync(live.parent)


# Restore of a dump


def restore_dump(
    place: RestorePaths, document: LaunchDocument, chosen: RecoveryPoint, now: datetime, say: Callable[[str], None]
) -> str | None:
    """Restore a dump to a second database, and put the second database in service. Returns the new name of the replaced
    database, or None if no replaced database is kept.

    Raises BackupError."""
    assert chosen.dump
    require_space(place.clusters, chosen.dump.bytes * DUMP_SPACE + SPARE)
    fresh = not place.live.exists()
    if fresh:
        say(f"creating a PostgreSQL {place.major} cluster")
        initdb.create_cluster(place.live, place.programs)
    with tempfile.TemporaryFile(dir=place.clusters) as fetched, private_postgresql(place, place.live, {}) as cluster:
        work = f"{WORK_PREFIX}restored"
        try:
            create_empty(cluster, work)
            say(f"restoring {chosen.dump.key}, {chosen.dump.bytes >> 20} MiB")
            bucket = pgbackrest.bucket(document)
            metadata = dump_file.fetch(bucket, chosen.dump.key, fetched, recorded=chosen.dump.recorded)
            dump_file.load(cluster, work, fetched)
            with connection(cluster, work, autocommit=True) as opened:
                revision = head(opened)
                with opened.cursor() as cursor:
                    cursor.execute("ANALYZE")
            if revision is None:
                raise BackupError(f"{chosen.dump.key} is not a dump of an MLflow database")
            return put_in_service(cluster, work, ownership_of_dump(metadata, revision, cluster), now)
        except BaseException:
            flip.drop_orphans(cluster)
            raise


def ownership_of_dump(metadata: dict[str, str], revision: str, cluster: Cluster) -> OwnershipRecord:
    """The ownership record for the dumped database. A pending merge is left out if its kept database no longer
    exists."""
    there = set(databases(cluster))
    known = ownership.parse(metadata.get("record"))
    if known and known.head == revision:
        return OwnershipRecord(
            known.head,
            known.count,
            known.mlflow_version,
            known.image_version,
            known.at,
            ownership.existing(known.waiting, there),
            unresolved=tuple(name for name in known.unresolved if name in there),
        )
    count = metadata.get("count", "")
    version, image = metadata.get("mlflow-version", ""), metadata.get("image-version", "")
    return OwnershipRecord(revision, int(count) if count.isdigit() else 0, version, image)


def put_in_service(cluster: Cluster, work: str, successor: OwnershipRecord, now: datetime) -> str | None:
    live = cluster.database
    if live not in databases(cluster):
        flip.flip(cluster, work, successor, "", None)
        return None
    with connection(cluster, live) as opened:
        revision = head(opened)
    with connection(cluster) as opened:
        old = ownership.read(opened, live)
    if revision is None:
        aside = f"{WORK_PREFIX}empty"
        drop(cluster, aside)
        flip.flip(cluster, work, successor, aside, None)
        drop(cluster, aside)
        return None
    kept = flip.kept_name(cluster, revision, now)
    flip.flip(cluster, work, successor, kept, old or OwnershipRecord(revision, 0))
    return kept


# A private PostgreSQL server for this step


@contextmanager
def private_postgresql(
    place: RestorePaths, folder: Path, options: dict[str, str], lines: list[str] | None = None
) -> Iterator[Cluster]:
    """During the `with` block, run PostgreSQL with the cluster in `folder` and a private socket. The block begins when
    PostgreSQL accepts connections. At the end of the block, PostgreSQL is stopped, and PostgreSQL's log lines are
    appended to `lines`.

    Raises BackupError with PostgreSQL's reason if PostgreSQL does not start or stop properly."""
    private = {"listen_addresses": "", "unix_socket_directories": str(place.sockets), "ssl": "off", **options}
    command = [str(place.programs / "postgres"), "-D", str(folder), "-c", f"config_file={place.settings}"]
    command += [part for name, value in private.items() for part in ("-c", f"{name}={value}")]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/")
        try:
            cluster = Cluster(host=str(place.sockets), programs=place.programs)
            while not accepts_connections(cluster):
                if process.poll() is not None:
                    raise BackupError(f"PostgreSQL could not open {folder}: {failure_reason(log)}")
                time.sleep(0.1)
            yield cluster
            process.send_signal(signal.SIGINT)
            if process.wait():
                raise BackupError(f"PostgreSQL did not shut down cleanly on {folder}: {failure_reason(log)}")
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait()
            if lines is not None:
                log.seek(0)
                lines += log.read().splitlines()


def failure_reason(log: Any) -> str:
    """The first FATAL message in PostgreSQL's log, or the log's last line if there is no such message."""
    log.seek(0)
    lines = [line.strip() for line in log.read().splitlines() if line.strip()]
    for line in lines:
        # PostgreSQL also writes a FATAL line if this step connects while PostgreSQL is starting. Skip these lines.
        if "FATAL:" in line and "the database system is " not in line:
            return str(line.partition("FATAL:")[2].strip())
    return lines[-1] if lines else "it gives no reason"


def require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BackupError(
            f"the data volume has {free / (1 << 30):.1f} GiB free, but the restore needs {needed / (1 << 30):.1f} GiB: "
            "make the volume larger (the setting dataVolumeGib)"
        )


if __name__ == "__main__":
    main()
