"""Bring the database to this image's schema: the `database` step of the boot.

    python -m mlflow_host.database            as the OS user postgres, the cluster running, MLflow stopped
    python -m mlflow_host.database --plan     say what would be done, as JSON, and change nothing

    empty   create            an empty database is built by this image's MLflow and put in service
    same    nothing           one look, no import of MLflow
    older   upgrade           copy, migrate the copy, put back what waits in kept databases, verify, flip
    newer   carry back        build this release's schema, copy every table and column both know, verify, flip

The database in service is only ever read until one transaction renames it aside and its successor into its place. A
crash at any moment before that leaves it in service and orphans under working names, which the next start drops. What
was replaced is kept under a name that holds its head and the time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2 import errors, sql

from mlflow_host.schema import blank, dumping, flipping, record, reporting
from mlflow_host.schema.catalog import BOOKKEEPING, head, read_catalog
from mlflow_host.schema.cluster import (
    WORK,
    Cluster,
    accepts,
    connection,
    copy_whole,
    create_empty,
    database_bytes,
    databases,
    drop,
    major,
    rows,
    run,
    value,
)
from mlflow_host.schema.copying import CarryError, Outcome, carry
from mlflow_host.schema.merging import merge
from mlflow_host.schema.record import Record, Waiting
from mlflow_host.schema.release import Image, Release, ReleaseError, release
from mlflow_host.schema.reporting import Report, Returned
from mlflow_host.schema.revisions import known_revisions
from mlflow_host.schema.verifying import counts, nothing_shrank, verify
from mlflow_host.status import StepFailed

MARGIN = 1.25
"""Disk space that a copy may take, for each byte of its source: the write-ahead log and indexes built anew."""

SPARE = 256 << 20
"""Bytes that stay free beside a copy."""

GIB = 1 << 30

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """Everything the step depends on, so that tests run it on a cluster and with releases of their own."""

    cluster: Cluster
    image: Image
    reports: Path
    dump: dumping.Dumper | None
    """None where there is no bucket to dump to (tests only)."""
    blank: Path | None = None
    """An empty database of the image's schema, as a dump; None has MLflow build one (tests only)."""
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))


@dataclass(frozen=True)
class State:
    """What is in service: `head` is None for a database without MLflow's tables, `present` False for none at all."""

    present: bool
    head: str | None
    record: Record | None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mlflow_host.database",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--plan", action="store_true", help="print what would be done as JSON and change nothing")
    arguments = parser.parse_args()
    from mlflow_host.status import step

    if arguments.plan:
        try:
            print(json.dumps(plan(from_machine())))
        except StepFailed as failure:
            print(f"mlflow-host: {failure}", file=sys.stderr)
            raise SystemExit(2) from None
        return
    with step("database") as current:
        current.say(bring_through_restarts(from_machine(), current.say))


def from_machine() -> Settings:
    """From the host's configuration and the image's facts. Raises StepFailed where they are not there."""
    from mlflow_host import config
    from mlflow_host.backups import repository

    try:
        host, facts = config.load(), json.loads(config.IMAGE_FACTS.read_text())
    except OSError as error:
        raise StepFailed(
            f"{error.filename} cannot be read: the configure step and the bake write these files"
        ) from None
    cluster = Cluster(host=str(config.POSTGRESQL_SOCKETS))
    image = Image(
        python=Path(sys.executable),
        head=facts["migration_head"],
        count=int(facts["migration_count"]),
        mlflow_version=facts["mlflow_version"],
        image_version=facts["image_version"],
    )
    dumper = dumping.into(cluster, repository.bucket(host.launch))
    return Settings(cluster, image, config.DATA / "reports", dumper, blank.FILE)


class BrokeOff(StepFailed):
    """PostgreSQL went away, or is not there yet."""


def broke_off(error: BaseException) -> BrokeOff:
    return BrokeOff(
        f"PostgreSQL broke off: {sentence(error)}; the database in service is whole: start the machine again"
    )


def bring_through_restarts(settings: Settings, say: Say, seconds: float = 60) -> str:
    """`bring`, begun again when PostgreSQL was killed on the way and is back within `seconds`: systemd starts it anew,
    and this step with it, or finds it gone when the step has already failed."""
    for _ in range(2):
        try:
            return bring(settings, say)
        except BrokeOff as failure:
            say(f"waiting for PostgreSQL: {failure}")
            if not returns(settings.cluster, seconds):
                raise
    return bring(settings, say)


def returns(cluster: Cluster, seconds: float) -> bool:
    """Whether PostgreSQL accepts connections within that time."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if accepts(cluster):
            return True
        time.sleep(0.2)
    return False


def bring(settings: Settings, say: Say) -> str:
    """Do what is to be done and say in one line what that was. Raises StepFailed, with the old database in service."""
    try:
        state = look(settings.cluster)
        if state.head == settings.image.head and settled(settings):
            keep_record(settings, state)
            return f"the database is at this image's schema ({state.head}, MLflow {settings.image.mlflow_version})"
        with alone(settings.cluster):
            return bring_alone(settings, say)
    except errors.DiskFull as error:
        raise StepFailed(
            f"the data volume is full ({sentence(error)}); the database in service is untouched: make the volume "
            "larger (the setting dataVolumeGib), or drop a kept database that you no longer need"
        ) from error
    except psycopg2.OperationalError as error:
        raise broke_off(error) from error
    except (psycopg2.Error, CarryError, ReleaseError, dumping.DumpError, ValueError) as error:
        raise StepFailed(
            f"the database could not be brought to MLflow {settings.image.mlflow_version}: {sentence(error)}; it is "
            "untouched: pin the image that served it last, and report this with the journal of this machine"
        ) from error
    except OSError as error:
        raise StepFailed(
            f"{error.filename or 'a file'}: {error.strerror}; the database in service is untouched"
        ) from error


def bring_alone(settings: Settings, say: Say) -> str:
    clear_up(settings, say)
    state = look(settings.cluster)
    action = decide(state, settings.image)
    if action == "same":
        keep_record(settings, state)
        return f"the database is at this image's schema ({state.head}, MLflow {settings.image.mlflow_version})"
    try:
        if action == "create" and settings.blank:
            return create(settings, state, settings.blank, say)
        return change(settings, state, action, say)
    except BaseException:
        with suppress(psycopg2.Error):
            flipping.drop_orphans(settings.cluster)
        raise


@contextmanager
def alone(cluster: Cluster, seconds: int = 30) -> Iterator[None]:
    """One step at a time, by a lock of this session; a killed step's is gone once PostgreSQL notices its end.

    Raises BrokeOff where the session is gone when the block fails, whatever it fails with: MLflow words it its way."""
    with connection(cluster, autocommit=True) as opened:
        run(opened, f"SET lock_timeout = '{seconds}s'")
        try:
            run(opened, "SELECT pg_advisory_lock(hashtext('mlflow-host database step'))")
        except errors.LockNotAvailable:
            raise StepFailed(
                f"another database step has been running for more than {seconds} s: wait for its end, or stop it"
            ) from None
        try:
            yield
        except (psycopg2.Error, CarryError, ReleaseError) as error:
            try:
                value(opened, "SELECT 1")
            except psycopg2.Error:
                raise broke_off(error) from error
            raise


def look(cluster: Cluster) -> State:
    with connection(cluster) as opened:
        if not rows(opened, "SELECT 1 FROM pg_database WHERE datname = %s", (cluster.database,)):
            return State(False, None, None)
        found = record.read(opened, cluster.database)
    with connection(cluster, cluster.database) as opened:
        revision = head(opened)
        if revision is None and set(read_catalog(opened).tables) - {BOOKKEEPING}:
            raise StepFailed(
                f"the database {cluster.database} holds tables but none of MLflow's migrations: it is not one of "
                "MLflow's; move it aside (ALTER DATABASE … RENAME TO …) and start the machine again"
            )
    return State(True, revision, found)


def settled(settings: Settings) -> bool:
    """Nothing is left over from an earlier start."""
    orphans = any(name.startswith(WORK) for name in databases(settings.cluster))
    return not orphans and not any(settings.reports.glob(f"*{reporting.PENDING}"))


def decide(state: State, image: Image) -> str:
    """ "create", "same", "upgrade" or "carry back". Raises StepFailed for a database that no image of ours served."""
    if state.head is None:
        return "create"
    if state.head == image.head:
        return "same"
    if state.head in known_revisions(image.python):
        return "upgrade"
    if state.record and state.record.head == state.head:
        return "carry back"
    raise StepFailed(
        f"the database is at migration {state.head}, which MLflow {image.mlflow_version} of this image does not know, "
        "and carries no record of the image that served it: pin an image with that release of MLflow or a newer one "
        "once, so that it is recorded, then this one"
    )


def plan(settings: Settings) -> dict[str, Any]:
    """What `bring` would do, and from where to where."""
    state = look(settings.cluster)
    return {
        "action": decide(state, settings.image),
        "from_head": state.head,
        "from_version": state.record.mlflow_version if state.record else None,
        "to_head": settings.image.head,
        "to_version": settings.image.mlflow_version,
    }


def clear_up(settings: Settings, say: Say) -> None:
    """Idempotent: drop what an interrupted step left under working names, and settle its report."""
    for name in flipping.drop_orphans(settings.cluster):
        say(f"dropped {name}, left over from an interrupted start")
    if settings.reports.is_dir():
        reporting.settle(settings.reports, databases(settings.cluster))


def keep_record(settings: Settings, state: State) -> None:
    """The database's record names this image, and the database takes writes, as one kept aside does not that someone
    renamed into service by hand; written only where that changes something."""
    live, wanted = settings.cluster.database, own_record(settings, state.record.waiting if state.record else ())
    kept_aside = (
        "SELECT 1 FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase WHERE d.datname = %s "
        "AND s.setrole = 0 AND 'default_transaction_read_only=on' = ANY (s.setconfig)"
    )
    with connection(settings.cluster) as opened:
        if rows(opened, kept_aside, (live,)):
            statement = sql.SQL("ALTER DATABASE {} RESET default_transaction_read_only")
            run(opened, statement.format(sql.Identifier(live)))
        if not state.record or replace(state.record, at=wanted.at) != wanted:
            record.write(opened, live, wanted)


def own_record(settings: Settings, waiting: tuple[Waiting, ...]) -> Record:
    image = settings.image
    at = settings.now().isoformat(timespec="seconds")
    return Record(image.head, image.count, image.mlflow_version, image.image_version, at, waiting)


def create(settings: Settings, state: State, empty: Path, say: Say) -> str:
    """The first database of a stack, which MLflow built and opened when the image was baked."""
    say(f"creating the database of MLflow {settings.image.mlflow_version}")
    clock, work = Clock(), f"{WORK}successor"
    now = settings.now()
    blank.load(settings.cluster, work, empty)
    with connection(settings.cluster, work) as opened:
        check_head(head(opened), settings.image)
        begun = {"now": int(now.timestamp() * 1000)}  # and not when the image was baked
        run(opened, "UPDATE experiments SET creation_time = %(now)s, last_update_time = %(now)s", begun)
    clock.lap("create")
    report = describe(settings, state, "create", Built(work), None, {}, clock, now)
    put_in_service(settings, state, work, own_record(settings, ()), "", report, say)
    return report.summary()


def change(settings: Settings, state: State, action: str, say: Say) -> str:
    """Dump, build the successor, verify it, flip, tidy. The work of `bring` when heads differ."""
    cluster, now = settings.cluster, settings.now()
    clock = Clock()
    waiting = present(cluster, state.record.waiting if state.record else ())
    check_room(settings, state, waiting if action == "upgrade" else (), now)
    with (
        release(cluster, settings.image) as mlflow,
        ThreadPoolExecutor(1) as background,
        held_still(cluster, state) as hold,
    ):
        dumps: list[Future[str | None]] = []

        def freeze() -> None:
            hold()
            if state.head:
                dumps.append(background.submit(take_dump, settings, state, now))

        def tell(message: str) -> None:
            if dumps and dumps[0].done():
                finished(dumps)
            say(message)

        built = build(settings, state, action, waiting, mlflow, freeze, clock, tell)
        clock.lap("build")
        if dumps and not dumps[0].done():
            say("waiting for the dump to the backups bucket")
        address = finished(dumps)
        clock.lap("dump")
        say("verifying: MLflow opens the copy")
        answers = verify(cluster, built.database, mlflow, settings.image.head)
        clock.lap("verify")
    replaced = flipping.kept_name(cluster, state.head, now)
    report = describe(settings, state, action, built, address, answers, clock, now, replaced)
    if action == "carry back" and state.head:
        old = state.record or Record(state.head, 0)
        into = settings.image.head
        entry = Waiting(replaced, state.head, old.count, into, old.mlflow_version, old.image_version, report.at)
        successor = own_record(settings, (*built.waiting, entry))
    else:
        successor = own_record(settings, built.waiting)
    put_in_service(settings, state, built.database, successor, replaced, report, say)
    return report.summary()


def describe(
    settings: Settings,
    state: State,
    action: str,
    built: Built,
    dump: str | None,
    answers: dict[str, int],
    clock: Clock,
    now: datetime,
    replaced: str | None = None,
) -> Report:
    return Report(
        action=action,
        at=now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        from_head=state.head,
        to_head=settings.image.head,
        from_version=state.record.mlflow_version if state.record else "",
        to_version=settings.image.mlflow_version,
        kept_database=replaced if state.head else None,
        dump=dump,
        carried=built.outcome.carried,
        left=built.outcome.left,
        returned=built.returned,
        conversions=built.outcome.conversions,
        notes=built.notes,
        answers=answers,
        seconds=clock.laps,
    )


NOTHING_CARRIED = Outcome((), ())


@dataclass(frozen=True)
class Built:
    """A database that is ready to go into service, still under its working name."""

    database: str
    waiting: tuple[Waiting, ...] = ()
    outcome: Outcome = NOTHING_CARRIED
    returned: dict[str, tuple[Returned, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def build(
    settings: Settings,
    state: State,
    action: str,
    waiting: tuple[Waiting, ...],
    mlflow: Release,
    freeze: Callable[[], None],
    clock: Clock,
    say: Say,
) -> Built:
    """The successor under its working name. `freeze` stops writers and starts the dump; it comes after the copy file by
    file, which nobody may be connected for."""
    cluster, image, work = settings.cluster, settings.image, f"{WORK}successor"
    if action == "upgrade":
        say(f"copying the database at {state.head}")
        copy_whole(cluster, cluster.database, work)
        freeze()
        clock.lap("copy")
        check_head(mlflow.head(), image)
        return upgrade(settings, state, waiting, mlflow, work, say)
    freeze()
    if settings.blank:
        blank.load(cluster, work, settings.blank)
    else:
        say(f"building an empty database by MLflow {image.mlflow_version}")
        create_empty(cluster, work)
        mlflow.create(work, image.head)
    clock.lap("create")
    if action == "create":
        return Built(work)
    outcome = carry(cluster, cluster.database, work, say)
    check_head(mlflow.head(), image)
    return Built(work, waiting, outcome)


def check_head(found: str | None, image: Image) -> None:
    if found != image.head:
        raise StepFailed(
            f"the image's facts name migration head {image.head} and its MLflow has {found}: the image is not what it "
            "says; bake it again"
        )


def upgrade(
    settings: Settings, state: State, waiting: tuple[Waiting, ...], mlflow: Release, work: str, say: Say
) -> Built:
    """Migrate `work`, a copy of what is in service, and on the way put back what waits in kept databases.

    Each kept database is put back at its own head where this release knows that, so that the kept rows need no
    migration before they are compared; else what of them this release can hold is put back, and the rest waits on."""
    cluster, image = settings.cluster, settings.image
    known = known_revisions(image.python)
    with connection(cluster, work) as opened:
        before = counts(opened)
    pending, notes = list(waiting), []
    returned: dict[str, tuple[Returned, ...]] = {}
    while pending and pending[-1].carried_to in known:
        entry = pending.pop()
        reached = entry.head in known
        target = entry.head if reached else image.head
        say(f"migrating the copy to {target}")
        mlflow.upgrade(work, target)
        say(f"putting back what waits in {entry.database}")
        returned[entry.database] = put_back(cluster, mlflow, entry, target, work)
        if not reached:
            pending.append(replace(entry, carried_to=target))
            notes.append(f"{entry.database} is of a newer release and waits on for what this one cannot hold")
            break
    say(f"migrating the copy to {image.head}")
    mlflow.upgrade(work, image.head)
    with connection(cluster, work, autocommit=True) as opened:
        run(opened, "ANALYZE")
        notes += nothing_shrank(before, counts(opened))
    return Built(work, tuple(pending), returned=returned, notes=tuple(notes))


def put_back(cluster: Cluster, mlflow: Release, entry: Waiting, target: str, work: str) -> tuple[Returned, ...]:
    """Merge a kept database into `work`, which is at `target`; what is built for that is dropped again."""
    base, fitted = f"{WORK}base", f"{WORK}fitted"
    create_empty(cluster, base)
    mlflow.create(base, entry.carried_to)
    if entry.head == target:
        fitted = entry.database
    else:
        create_empty(cluster, fitted)
        mlflow.create(fitted, target)
        carry(cluster, entry.database, fitted)
    carry(cluster, entry.database, base)
    mlflow.upgrade(base, target)
    found = merge(cluster, fitted, base, work)
    drop(cluster, base)
    if fitted != entry.database:
        drop(cluster, fitted)
    return found


@contextmanager
def held_still(cluster: Cluster, state: State) -> Iterator[Callable[[], None]]:
    """A function that, once called, keeps everyone from writing to the database in service until the block ends;
    readers go on. Held by locks of an open transaction, so that nothing needs undoing after a crash."""
    if not state.present:
        yield lambda: None
        return
    opened: list[Any] = []

    def hold() -> None:
        context = connection(cluster, cluster.database)
        opened.append(context)
        locker = context.__enter__()
        tables = [f'public."{table}"' for table in read_catalog(locker).tables]
        if tables:
            run(locker, "SET lock_timeout = '10s'")
            run(locker, f"LOCK TABLE {', '.join(tables)} IN SHARE ROW EXCLUSIVE MODE")

    try:
        yield hold
    finally:
        for context in opened:
            context.__exit__(None, None, None)


def take_dump(settings: Settings, state: State, now: datetime) -> str | None:
    if settings.dump is None:
        return None
    old = state.record
    key = dumping.key(now, "before-change", state.head)
    return settings.dump(settings.cluster.database, key, dumping.description(state.head, old, major(settings.cluster)))


def finished(dumps: list[Future[str | None]]) -> str | None:
    """Where the dump is, once it is there. Raises StepFailed where there is none."""
    if not dumps:
        return None
    try:
        return dumps[0].result()
    except dumping.DumpError as error:
        raise StepFailed(
            f"the dump that comes before any change of the database failed: {error}; the database is untouched: check "
            "the backups bucket and the instance role's access to it, and start the machine again"
        ) from None


def present(cluster: Cluster, waiting: tuple[Waiting, ...]) -> tuple[Waiting, ...]:
    """Those whose kept database has not been dropped by hand."""
    there = set(databases(cluster))
    return tuple(entry for entry in waiting if entry.database in there)


def check_room(settings: Settings, state: State, waiting: tuple[Waiting, ...], now: datetime) -> None:
    """Make room for the copy, and for what `waiting` takes to be put back, from kept databases that may go.

    Raises StepFailed where that is not enough."""
    cluster = settings.cluster
    if state.head is None:
        return
    size = database_bytes(cluster, cluster.database)
    bases = [database_bytes(cluster, entry.database) for entry in waiting]
    needed = int(MARGIN * (size + 2 * max(bases, default=0))) + SPARE
    still = {entry.database for entry in state.record.waiting} if state.record else set()
    made = flipping.make_room(cluster, needed, still, now)
    if made and made[0] < needed:
        raise StepFailed(
            f"the data volume has {made[0] / GIB:.1f} GiB free, a copy of the database needs {needed / GIB:.1f} GiB: "
            "make the volume larger (the setting dataVolumeGib), or drop a kept database that you no longer need"
        )


def put_in_service(
    settings: Settings, state: State, work: str, successor: Record, replaced: str, report: Report, say: Say
) -> None:
    cluster = settings.cluster
    pending = reporting.write_pending(settings.reports, report)
    say("putting the copy in service")
    aside = replaced if state.head else f"{WORK}empty"
    old = (state.record or Record(state.head, 0)) if state.head else None
    flipping.flip(cluster, work, successor, aside, old)
    if state.head:
        reporting.settle(settings.reports, databases(cluster))
    else:
        reporting.come_true(pending)
        drop(cluster, aside)
    flipping.make_room(cluster, 0, {entry.database for entry in successor.waiting}, settings.now())
    for line in reporting.as_text(report).splitlines():
        print(line, file=sys.stderr, flush=True)


class Clock:
    """Seconds by name of what took them; owns the last reading."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = round(now - self._last, 2), now


def sentence(error: BaseException) -> str:
    """The first line of what went wrong."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


if __name__ == "__main__":
    main()
