"""Bring back what was backed up: the step before PostgreSQL at boot, and the command mlflow-host-restore.

    mlflow-host-restore list                      what there is
    mlflow-host-restore latest                    the last that was archived
    mlflow-host-restore 2026-11-22T14:15:00Z      all that was committed until then
    mlflow-host-restore 20261122-013005F          a base backup, as it was at its end
    mlflow-host-restore dumps/….dump              a dump, of another PostgreSQL major too

The stack's restoreFrom asks for the same, once per value: what was restored is noted on the data volume.

Nothing is overwritten. A base backup is restored beside the cluster, recovered and looked at, and then exchanged with
it by name; a dump becomes a database of its own, which is exchanged with the one in service. What was replaced stays
under a name with the time. A crash at any moment leaves the old one in service, or the new one, and the next start
finishes the exchange or starts over.
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
from pathlib import Path
from typing import Any

import psycopg2

from mlflow_host import config, durable, postgresql
from mlflow_host.backups import listing, repository
from mlflow_host.backups.history import History, stamp
from mlflow_host.backups.listing import Available, Chosen
from mlflow_host.backups.repository import BackupError, Repository, begin_history, last_line, stanza_of
from mlflow_host.launch import LaunchDocument
from mlflow_host.schema import dumping, flipping, record
from mlflow_host.schema.catalog import head
from mlflow_host.schema.cluster import WORK, Cluster, accepts, connection, create_empty, databases, drop
from mlflow_host.schema.record import Record
from mlflow_host.status import Step, StepFailed, step

REQUEST, FLIP, RESTORED = "restore-request", "restore-flip", "restored"
"""In the history on the data volume: what a person asked for, an exchange under way, and what was done."""

ROOM = 1.3
"""Free space a restored cluster takes, for each byte of the base backup: the log that is replayed on it."""
DUMP_ROOM = 8
"""The same for each byte of a dump, which is compressed."""
SPARE = 256 << 20

RENAME_EXCHANGE = 2

TOO_EARLY = "recovery ended before configured recovery target was reached"

FETCH = '{fetch} archive-get %f "%p"; status=$?; [ $status -le 1 ] && exit $status; exit 126'
"""1 is "not archived", which ends recovery. For anything else, such as a bucket out of reach, PostgreSQL must give up
rather than take it for the end of the log; 126 tells it so."""


@dataclass(frozen=True)
class Place:
    """Where the step works; tests have one of their own."""

    clusters: Path
    major: int
    programs: Path
    """PostgreSQL's."""
    sockets: Path
    """A private folder: while the step works nobody else reaches PostgreSQL."""
    settings: Path
    repository_settings: Path
    history: History
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
    parser.add_argument("what", nargs="?", help="list, latest, a point in time, or a backup's name")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--step", action="store_true", help="the boot's step: do what is asked for on the data volume")
    arguments = parser.parse_args()
    if arguments.step:
        with step("restore") as s:
            s.say(perform(this_machine(), config.load().launch, s))
        return
    if not arguments.what:
        parser.error("say what to restore, or list")
    try:
        raise SystemExit(command(arguments.what, sure=arguments.yes))
    except (BackupError, StepFailed, OSError) as error:
        print(f"mlflow-host: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def this_machine() -> Place:
    major = config.postgresql_major()
    return Place(
        clusters=config.CLUSTERS,
        major=major,
        programs=postgresql.binaries(major),
        sockets=config.RUN / "backups",
        settings=postgresql.SETTINGS,
        repository_settings=repository.SETTINGS,
        history=History(),
        archiving=repository.archives(config.load().launch),
    )


# The command


def command(what: str, *, sure: bool) -> int:
    """As root on the machine: hand the request to the step, with PostgreSQL stopped, and start everything again."""
    host, place = config.load(), this_machine()
    there = available(place, host.launch)
    if what == "list":
        print("\n".join(listing.table(there)))
        return 0
    chosen = listing.choose(what, there, place.major, stanza_of(place.live), datetime.now(UTC))
    aside = "The present one is kept aside; MLflow is away meanwhile."
    print(f"This restores {chosen.described()}. {aside}", file=sys.stderr)
    if not sure and not confirmed():
        raise BackupError("nothing was done; --yes skips the question")
    systemctl("stop", "mlflow-host-postgresql.service", *host.server_units)
    place.history.write(REQUEST, {"value": what, "at": stamp(datetime.now(UTC))})
    status = systemctl("restart", "mlflow-host-restore.service")
    if status and going_down():
        raise BackupError("the machine is going down: it restores that at its next start")
    place.history.forget(REQUEST)
    if status:
        (config.RUN / "status" / "restore.json").unlink(missing_ok=True)
    started = systemctl("start", "mlflow-host-ready.service", *host.server_units)
    if status:
        print("mlflow-host: the restore failed, and what was there is in service again", file=sys.stderr)
        return 2
    # What the restored cluster writes from now on is a history of its own, which begins with a base backup.
    systemctl("start", "--no-block", "mlflow-host-base-backup.service")
    print(json.dumps(place.history.read(RESTORED)))
    return 2 if started else 0


def confirmed() -> bool:
    if not sys.stdin.isatty():
        return False
    print("mlflow-host: type yes to restore it: ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip() == "yes"


def systemctl(*arguments: str) -> int:
    return subprocess.run(["systemctl", *arguments], stdin=subprocess.DEVNULL).returncode


def going_down() -> bool:
    """Whether the machine is shutting down; then systemd cancels what it was asked for, or answers no more."""
    asked = ["systemctl", "is-system-running"]
    said = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout.strip()
    return said not in ("running", "degraded", "starting", "initializing", "maintenance")


# The step


def perform(place: Place, document: LaunchDocument, s: Step) -> str:
    """Do what is asked for and not done yet, and say what that was. Raises StepFailed with the old data in service."""
    history = place.history
    if finished := finish(place):
        return f"finished the exchange that an earlier start had begun: {finished} is in service"
    request = history.read(REQUEST)
    value = request.get("value") or pending(history, document.backups.restore_from)
    if not value:
        shutil.rmtree(place.work, ignore_errors=True)  # of one that was interrupted, and that nobody asks for any more
        return "nothing is to be restored that was not restored before"
    try:
        there = available(place, document)
        ours, now = stanza_of(place.live), datetime.now(UTC)
        chosen = listing.choose(value, there, place.major, ours, now)
        s.say(f"restoring {chosen.described()}")
        note = {"value": document.backups.restore_from, "asked": value, "at": stamp(now), "what": chosen.described()}
        if chosen.dump:
            kept = restore_dump(place, document, chosen, now, s.say) or set_aside_other_majors(place)
            history.write(RESTORED, {**note, "kept": kept})
        else:
            kept = restore_cluster(place, chosen, note, now, s.say)
    except (BackupError, dumping.DumpError, psycopg2.Error, OSError) as error:
        raise StepFailed(f"{str(error).strip()}; what was there is untouched") from error
    except Exception as error:
        if type(error).__module__.startswith("botocore"):
            raise StepFailed(f"the backups bucket cannot be read: {error}; what was there is untouched") from error
        raise
    finally:
        # Asked for by hand it is tried once; after a crash it is still there.
        history.forget(REQUEST)
    return f"restored {chosen.described()}" + (f"; what was there is kept as {kept}" if kept else "")


def pending(history: History, value: str) -> str:
    """What the launch document asks for, "" once that was done."""
    return "" if history.read(RESTORED).get("value") == value else value


def available(place: Place, document: LaunchDocument) -> Available:
    bucket = repository.bucket(document)
    reader = place.repository(place.live) if place.archiving else None
    return listing.look(reader, dumping.client(bucket), bucket.name)


# A base backup and the log after it


def restore_cluster(
    place: Place, chosen: Chosen, note: dict[str, Any], now: datetime, say: Callable[[str], None]
) -> str | None:
    """Restore beside the cluster, recover, look at it, exchange; what the replaced one is called, if there was one.

    Raises BackupError."""
    assert chosen.line and chosen.base
    shutil.rmtree(place.work, ignore_errors=True)
    require_room(place.clusters, int(chosen.base.bytes * ROOM) + SPARE)
    try:
        say(f"fetching base backup {chosen.base.label}, {chosen.base.bytes >> 20} MiB")
        place.work.mkdir(mode=0o700)
        stanza = chosen.line.stanza.name
        fetch = place.repository(place.work)
        arguments = [f"--pg1-path={place.work}", f"--set={chosen.base.label}", "--type=none", "restore"]
        done = fetch.run(stanza, *arguments)
        if done.returncode:
            raise BackupError(f"base backup {chosen.base.label} could not be fetched: {last_line(done.stdout)}")
        say("replaying the archived log")
        if remark := recover(place, chosen, fetch.command(stanza, f"--pg1-path={place.work}")):
            say(remark)
            note = note | {"remark": remark}
        begin_history(place.work, now)
    except BaseException:
        shutil.rmtree(place.work, ignore_errors=True)
        raise
    say("putting the restored cluster in service")
    kept = f"{place.major}.kept-{now:%Y%m%dT%H%M%SZ}" if place.live.exists() else None
    stanza_now = stanza_of(place.work)
    assert stanza_now
    place.history.write(FLIP, {"history": stanza_now.name, "kept": kept, "note": {**note, "kept": kept}})
    finish(place)
    return place.history.read(RESTORED).get("kept")


def recover(place: Place, chosen: Chosen, fetch: list[str]) -> str:
    """Replay, and verify that the cluster opens and holds a database that can be read; what is to be said of it, or "".

    Raises BackupError."""
    signal_file = place.work / "recovery.signal"
    signal_file.touch()
    options = {
        "archive_mode": "off",
        # So that a smaller machine than the one it comes from can do it.
        "hot_standby": "off",
        "recovery_target_action": "promote",
        "restore_command": FETCH.format(fetch=" ".join(fetch)),
    }
    if chosen.target:
        options["recovery_target_time"] = chosen.target.isoformat()
    elif not chosen.whole:
        options["recovery_target"] = "immediate"
    said: list[str] = []
    try:
        look_at(place, options, said)
    except BackupError as error:
        if not chosen.target or TOO_EARLY not in str(error):
            raise
        if gap := gap_in(chosen, said):
            raise BackupError(
                f"{gap}, so the state at {stamp(chosen.target)} cannot be had: name an earlier moment, or a later base "
                "backup"
            ) from None
        # Nothing was committed after that moment, so all that there is is the state at it.
        del options["recovery_target_time"]
        look_at(place, options, said)
    return gap_in(chosen, said) if chosen.whole else ""


def look_at(place: Place, options: dict[str, str], said: list[str]) -> None:
    with running(place, place.work, options, said) as cluster:
        names = databases(cluster)
        if cluster.database in names:
            with connection(cluster, cluster.database) as opened:
                head(opened)


def gap_in(chosen: Chosen, said: list[str]) -> str:
    """That replaying ended before the last archived segment, for one between is missing; "" where it did not."""
    assert chosen.line
    replayed = [found[1] for line in said if (found := re.search(r'restored log file "([0-9A-F]{24})"', line))]
    if replayed and max(replayed) >= chosen.line.last_segment:
        return ""
    return "the archived write-ahead log has a gap " + (f"after {max(replayed)}" if replayed else "at its beginning")


def finish(place: Place) -> str | None:
    """Idempotent: complete the exchange that was decided, if one was; what is in service then.

    The exchange is one system call, so that there is a cluster under the name in service at every moment."""
    decided = place.history.read(FLIP)
    if not decided:
        return None
    current = stanza_of(place.live)
    if current is None or current.name != decided["history"]:
        exchange(place.work, place.live)
    if place.work.exists() and decided["kept"]:
        place.work.rename(place.clusters / decided["kept"])
        durable.sync(place.clusters)
    note = decided["note"]
    place.history.write(RESTORED, {**note, "kept": note.get("kept") or set_aside_other_majors(place)})
    place.history.forget(REQUEST)
    place.history.forget(FLIP)
    return str(decided["note"]["what"])


def set_aside_other_majors(place: Place) -> str | None:
    """After a move to this image's major the other one's cluster must not be taken for the data in service by an image
    that could read it; what it is called then."""
    kept = None
    for path in place.clusters.iterdir():
        if path.name.isdigit() and path != place.live:
            kept = f"{path.name}.kept-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
            path.rename(place.clusters / kept)
    durable.sync(place.clusters)
    return kept


def exchange(new: Path, live: Path) -> None:
    """Put `new` under the name `live`, and what was there under the name of `new`, at once."""
    if not live.exists():
        new.rename(live)
    else:
        library = ctypes.CDLL(None, use_errno=True)
        here = ctypes.c_int(-100)  # AT_FDCWD; both paths are absolute
        names = ctypes.c_char_p(os.fsencode(new)), ctypes.c_char_p(os.fsencode(live))
        if library.renameat2(here, names[0], here, names[1], ctypes.c_uint(RENAME_EXCHANGE)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(live))
    durable.sync(live.parent)


# A dump


def restore_dump(
    place: Place, document: LaunchDocument, chosen: Chosen, now: datetime, say: Callable[[str], None]
) -> str | None:
    """Restore into a database of its own and exchange that; what the replaced one is called, if there was one.

    Raises BackupError."""
    assert chosen.dump
    require_room(place.clusters, chosen.dump.bytes * DUMP_ROOM + SPARE)
    fresh = not place.live.exists()
    if fresh:
        say(f"creating a PostgreSQL {place.major} cluster")
        postgresql.make(place.live, place.programs)
    bucket = repository.bucket(document)
    found = dumping.client(bucket).get_object(Bucket=bucket.name, Key=chosen.dump.key)
    with running(place, place.live, {}) as cluster:
        work = f"{WORK}restored"
        try:
            create_empty(cluster, work)
            say(f"restoring {chosen.dump.key}, {chosen.dump.bytes >> 20} MiB")
            dumping.load(cluster, work, found["Body"])
            with connection(cluster, work, autocommit=True) as opened:
                revision = head(opened)
                with opened.cursor() as cursor:
                    cursor.execute("ANALYZE")
            if revision is None:
                raise BackupError(f"{chosen.dump.key} holds no database of MLflow's")
            return put_in_service(cluster, work, of_dump(found["Metadata"], revision, cluster), now)
        except BaseException:
            flipping.drop_orphans(cluster)
            raise


def of_dump(metadata: dict[str, str], revision: str, cluster: Cluster) -> Record:
    """The record that a database had when it was dumped; kept databases it named count while they are there."""
    there = set(databases(cluster))
    known = record.parse(metadata.get("record"))
    if known and known.head == revision:
        return Record(
            known.head,
            known.count,
            known.mlflow_version,
            known.image_version,
            known.at,
            tuple(entry for entry in known.waiting if entry.database in there),
        )
    count = metadata.get("count", "")
    version, image = metadata.get("mlflow-version", ""), metadata.get("image-version", "")
    return Record(revision, int(count) if count.isdigit() else 0, version, image)


def put_in_service(cluster: Cluster, work: str, successor: Record, now: datetime) -> str | None:
    live = cluster.database
    if live not in databases(cluster):
        flipping.flip(cluster, work, successor, "", None)
        return None
    with connection(cluster, live) as opened:
        revision = head(opened)
    with connection(cluster) as opened:
        old = record.read(opened, live)
    if revision is None:
        aside = f"{WORK}empty"
        drop(cluster, aside)
        flipping.flip(cluster, work, successor, aside, None)
        drop(cluster, aside)
        return None
    kept = flipping.kept_name(cluster, revision, now)
    flipping.flip(cluster, work, successor, kept, old or Record(revision, 0))
    return kept


# PostgreSQL for the step alone


@contextmanager
def running(place: Place, folder: Path, options: dict[str, str], said: list[str] | None = None) -> Iterator[Cluster]:
    """A cluster that only this step reaches, once it accepts connections; stopped in order when the block ends.
    What it printed is added to `said`.

    Raises BackupError, with PostgreSQL's own last words, when it does not get that far."""
    private = {"listen_addresses": "", "unix_socket_directories": str(place.sockets), "ssl": "off", **options}
    command = [str(place.programs / "postgres"), "-D", str(folder), "-c", f"config_file={place.settings}"]
    command += [part for name, value in private.items() for part in ("-c", f"{name}={value}")]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/")
        try:
            cluster = Cluster(host=str(place.sockets), programs=place.programs)
            while not accepts(cluster):
                if process.poll() is not None:
                    raise BackupError(f"PostgreSQL could not open {folder}: {reason(log)}")
                time.sleep(0.1)
            yield cluster
            process.send_signal(signal.SIGINT)
            if process.wait():
                raise BackupError(f"PostgreSQL did not close {folder} in order: {reason(log)}")
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait()
            if said is not None:
                log.seek(0)
                said += log.read().splitlines()


def reason(log: Any) -> str:
    """The first fatal line of PostgreSQL's, or its last."""
    log.seek(0)
    lines = [line.strip() for line in log.read().splitlines() if line.strip()]
    for line in lines:
        # Not what it told this step, which asked too early.
        if "FATAL:" in line and "the database system is " not in line:
            return str(line.partition("FATAL:")[2].strip())
    return lines[-1] if lines else "it gives no reason"


def require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BackupError(
            f"the data volume has {free / (1 << 30):.1f} GiB free and the restore needs {needed / (1 << 30):.1f} GiB "
            "beside what is there: make the volume larger (the setting dataVolumeGib)"
        )


if __name__ == "__main__":
    main()
