"""Build a new database at this image's schema from the database in service, verify it, and put it in service."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlflow_host.machine.status import StepFailed
from mlflow_host.postgres import dump_file, flip
from mlflow_host.postgres.catalog import head, read_catalog
from mlflow_host.postgres.cluster import (
    WORK_PREFIX,
    Cluster,
    connection,
    copy_database,
    create_empty,
    database_bytes,
    databases,
    drop,
    major,
    run,
)
from mlflow_host.postgres.ownership import OwnershipRecord, PendingMerge, existing
from mlflow_host.schema import empty_database, reporting, upgrade_losses
from mlflow_host.schema.copying import CarryResult, carry, unreadable_values
from mlflow_host.schema.merging import merge
from mlflow_host.schema.release import ImageSchema, Release, StoreAnswers, release
from mlflow_host.schema.reporting import ChangeReport, MergedTable
from mlflow_host.schema.revisions import known_revisions
from mlflow_host.schema.state import ChangeSettings, Say, SchemaState, ownership_record
from mlflow_host.schema.verifying import check_row_counts, row_counts, verify

MARGIN = 1.25
"""Free bytes that a schema change needs per byte of the database: for the copy, new indexes and the write-ahead log."""

SPARE = 256 << 20
"""Number of bytes that must be free in addition to MARGIN times the size of the database."""

BESIDE = 256 << 20
"""If a kept database has at least this number of bytes, a second process with MLflow prepares its merge during the
migration. For a smaller kept database, the second import of MLflow would take longer than the merge's preparation."""

GIB = 1 << 30


def create(settings: ChangeSettings, state: SchemaState, empty: Path, say: Say) -> str:
    """Create the first database of a stack from the dump that the bake made."""
    say(f"creating the database of MLflow {settings.image.mlflow_version}")
    clock, work = Clock(), f"{WORK_PREFIX}successor"
    now = settings.now()
    empty_database.load(settings.cluster, work, empty)
    with connection(settings.cluster, work) as opened:
        check_head(head(opened), settings.image)
        begun = {"now": int(now.timestamp() * 1000)}  # in the dump, these columns have the time of the bake
        run(opened, "UPDATE experiments SET creation_time = %(now)s, last_update_time = %(now)s", begun)
    clock.lap("create")
    report = make_report(settings, state, "create", Successor(work), None, StoreAnswers({}), clock, now)
    put_in_service(settings, state, work, ownership_record(settings, ()), "", report, say)
    return report.summary()


def change(settings: ChangeSettings, state: SchemaState, action: str, say: Say) -> str:
    """Dump the database, build and verify the new database, flip, and drop kept databases that are no longer needed."""
    cluster, now = settings.cluster, settings.now()
    clock = Clock()
    recorded = state.record.waiting if state.record else ()
    waiting = existing(recorded, set(databases(cluster)))
    gone = [entry for entry in recorded if entry.database not in {each.database for each in waiting}]
    notes = [
        f"the kept database {entry.database} of MLflow {entry.mlflow_version} no longer exists: the data that only "
        "this database had is lost"
        for entry in gone
    ]
    for note in notes:
        say(note)
    require_space(settings, state, waiting if action == "upgrade" else (), now)
    with (
        release(cluster, settings.image) as mlflow,
        ThreadPoolExecutor(1) as background,
        write_lock(cluster, state) as block_writes,
    ):
        dumps: list[Future[str | None]] = []

        def freeze() -> None:
            block_writes()
            if state.head:
                dumps.append(background.submit(take_dump, settings, state, now))

        def say_unless_dump_failed(message: str) -> None:
            if dumps and dumps[0].done():
                dump_address(dumps)
            say(message)

        built = build(settings, state, action, waiting, mlflow, freeze, clock, say_unless_dump_failed)
        clock.lap("build")
        if dumps and not dumps[0].done():
            say("waiting for the dump to the backups bucket")
        address = dump_address(dumps)
        clock.lap("dump")
        say("verifying: MLflow opens the copy")
        answers = verify(cluster, built.database, mlflow, settings.image.head)
        clock.lap("verify")
    for sentence in answers.unread:
        say(f"MLflow {settings.image.mlflow_version} cannot read {sentence}")
    built = replace(built, notes=(*notes, *built.notes))
    earlier = state.record.unresolved if state.record else ()
    unresolved = tuple(name for name in (*earlier, *built.unresolved) if name in databases(cluster))
    replaced = flip.kept_name(cluster, state.head, now)
    report = make_report(settings, state, action, built, address, answers, clock, now, replaced)
    if action == "carry back" and state.head:
        old = state.record or OwnershipRecord(state.head, 0)
        into = settings.image.head
        entry = PendingMerge(
            replaced,
            state.head,
            old.count,
            into,
            old.mlflow_version,
            old.image_version,
            report.at,
            built.unreadable,
        )
        successor = ownership_record(settings, (*built.waiting, entry), unresolved)
    else:
        successor = ownership_record(settings, built.waiting, unresolved)
    put_in_service(settings, state, built.database, successor, replaced, report, say)
    return report.summary()


def make_report(
    settings: ChangeSettings,
    state: SchemaState,
    action: str,
    built: Successor,
    dump: str | None,
    answers: StoreAnswers,
    clock: Clock,
    now: datetime,
    replaced: str | None = None,
) -> ChangeReport:
    return ChangeReport(
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
        answers=answers.answers,
        unread=answers.unread,
        seconds=clock.laps,
    )


NOTHING_CARRIED = CarryResult((), ())


@dataclass(frozen=True)
class Successor:
    """A new database that is ready for verification. Its name starts with WORK_PREFIX."""

    database: str
    waiting: tuple[PendingMerge, ...] = ()
    outcome: CarryResult = NOTHING_CARRIED
    returned: dict[str, tuple[MergedTable, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unresolved: tuple[str, ...] = ()
    """Kept databases with rows that could not be merged back, because another row has the same key."""
    unreadable: dict[str, list[str]] = field(default_factory=dict)
    """The values, by "table.column", that this release cannot read, and whose rows are therefore not carried."""


def build(
    settings: ChangeSettings,
    state: SchemaState,
    action: str,
    waiting: tuple[PendingMerge, ...],
    mlflow: Release,
    freeze: Callable[[], None],
    clock: Clock,
    say: Say,
) -> Successor:
    """Build the new database. `freeze` blocks writes and starts the dump. An upgrade calls `freeze` after the copy of
    the database's files, because PostgreSQL copies a database only while no session is connected to the database."""
    cluster, image, work = settings.cluster, settings.image, f"{WORK_PREFIX}successor"
    if action == "upgrade":
        say(f"copying the database at {state.head}")
        copy_database(cluster, cluster.database, work)
        freeze()
        clock.lap("copy")
        check_head(mlflow.head(), image)
        return upgrade(settings, state, waiting, mlflow, work, say)
    freeze()
    if settings.blank:
        empty_database.load(cluster, work, settings.blank)
    else:
        say(f"creating an empty database with MLflow {image.mlflow_version}")
        create_empty(cluster, work)
        mlflow.create(work, image.head)
    clock.lap("create")
    if action == "create":
        return Successor(work)
    unreadable = unreadable_values(cluster, cluster.database, enumerations(image, mlflow))
    outcome = carry(cluster, cluster.database, work, say, unreadable)
    known = known_revisions(image.python)
    returned = upgrade_losses.put_back(cluster, cluster.database, work, image.head, known)
    check_head(mlflow.head(), image)
    return Successor(work, waiting, outcome, returned, unreadable=unreadable)


def enumerations(image: ImageSchema, mlflow: Release) -> Mapping[str, Sequence[str]]:
    """The values that this release can read, by "table.column". A list in image.json is preferred, because the copy can
    then begin before MLflow's import has ended."""
    return mlflow.enumerations() if image.enumerations is None else image.enumerations


def check_head(found: str | None, image: ImageSchema) -> None:
    if found != image.head:
        raise StepFailed(
            f"image.json names migration head {image.head}, but the image's MLflow or its empty database has {found}: "
            "bake the image again"
        )


def upgrade(
    settings: ChangeSettings,
    state: SchemaState,
    waiting: tuple[PendingMerge, ...],
    mlflow: Release,
    work: str,
    say: Say,
) -> Successor:
    """Migrate `work`, a copy of the database in service, and merge the kept databases back.

    If this release knows a kept database's migration head, the merge runs when `work` is at that head, and no row is
    converted. If it does not know the head, only the data that this release can hold is merged, and the merge stays
    pending."""
    cluster, image = settings.cluster, settings.image
    known = known_revisions(image.python)
    with connection(cluster, work) as opened:
        before = row_counts(opened)
    pending, notes = list(waiting), []
    returned: dict[str, tuple[MergedTable, ...]] = {}
    unresolved: list[str] = []
    while pending and pending[-1].carried_to in known:
        entry = pending.pop()
        reached = entry.head in known
        target = entry.head if reached else image.head
        unreadable = {} if reached else unreadable_values(cluster, entry.database, enumerations(image, mlflow))
        with merge_source(cluster, image, mlflow, entry, target, unreadable) as prepared:
            say(f"migrating the copy to {target}")
            mlflow.upgrade(work, target)
            say(f"merging data back from {entry.database}")
            base, fitted = prepared()
            returned[entry.database] = merge(cluster, fitted, base, work)
            if reached:
                upgrade_losses.copy(cluster, entry.database, work)
        for temporary in {base, fitted} - {entry.database}:
            drop(cluster, temporary)
        if refused := [table for table in returned[entry.database] if table.refused]:
            unresolved.append(entry.database)
            notes += [
                f"{table.refused} rows of {table.table} stay in {entry.database}, because other rows have the same key "
                f"or name: {', '.join(table.refused_keys)}"
                for table in refused
            ]
        if not reached:
            pending.append(replace(entry, carried_to=target, unreadable=unreadable))
            notes.append(f"{entry.database} is kept, because it has data that only a newer release can hold")
            break
    say(f"migrating the copy to {image.head}")
    mlflow.upgrade(work, image.head)
    with ThreadPoolExecutor(1) as beside:
        analyzed = beside.submit(analyze_and_count, cluster, work)
        lost = upgrade_losses.record(cluster, cluster.database, work, str(state.head), known.index(str(state.head)) + 1)
        notes += check_row_counts(before, analyzed.result())
    return Successor(
        work, tuple(pending), CarryResult((), lost), returned, notes=tuple(notes), unresolved=tuple(unresolved)
    )


def analyze_and_count(cluster: Cluster, database: str) -> dict[str, int]:
    """Update the planner's statistics of a migrated database, and return the number of rows of each table."""
    with connection(cluster, database, autocommit=True) as opened:
        run(opened, "ANALYZE")
        return row_counts(opened)


@contextmanager
def merge_source(
    cluster: Cluster,
    image: ImageSchema,
    mlflow: Release,
    entry: PendingMerge,
    target: str,
    unreadable: dict[str, list[str]],
) -> Iterator[Callable[[], tuple[str, str]]]:
    """Yields a function that returns the two databases of `prepare_merge`. The `with` block migrates the copy. For a
    large kept database, `prepare_merge` runs in parallel with the `with` block."""
    if database_bytes(cluster, entry.database) < BESIDE:
        yield lambda: prepare_merge(cluster, mlflow, entry, target, unreadable)
        return
    with release(cluster, image) as other, ThreadPoolExecutor(1) as beside:
        yield beside.submit(prepare_merge, cluster, other, entry, target, unreadable).result


def prepare_merge(
    cluster: Cluster, mlflow: Release, entry: PendingMerge, target: str, unreadable: dict[str, list[str]]
) -> tuple[str, str]:
    """Return the names of two databases at the migration `target`. The first database contains the part of the kept
    database that was carried back. The second database contains all rows of the kept database except those with an
    `unreadable` value. If the kept database is at `target`, it is the second database itself."""
    base, fitted = f"{WORK_PREFIX}base", f"{WORK_PREFIX}fitted"
    create_empty(cluster, base)
    mlflow.create(base, entry.carried_to)
    if entry.head == target:
        fitted = entry.database
    else:
        create_empty(cluster, fitted)
        mlflow.create(fitted, target)
        carry(cluster, entry.database, fitted, unreadable=unreadable)
    carry(cluster, entry.database, base, unreadable=entry.unreadable)
    mlflow.upgrade(base, target)
    return base, fitted


@contextmanager
def write_lock(cluster: Cluster, state: SchemaState) -> Iterator[Callable[[], None]]:
    """Yields a function that blocks writes to the database in service until the `with` block ends. Reads are not
    blocked. The locks belong to an open transaction, so PostgreSQL releases them after a crash."""
    if not state.present:
        yield lambda: None
        return
    opened: list[Any] = []

    def block_writes() -> None:
        context = connection(cluster, cluster.database)
        opened.append(context)
        locker = context.__enter__()
        tables = [f'public."{table}"' for table in read_catalog(locker).tables]
        if tables:
            run(locker, "SET lock_timeout = '10s'")
            run(locker, f"LOCK TABLE {', '.join(tables)} IN SHARE ROW EXCLUSIVE MODE")

    try:
        yield block_writes
    finally:
        for context in opened:
            context.__exit__(None, None, None)


def take_dump(settings: ChangeSettings, state: SchemaState, now: datetime) -> str | None:
    if settings.dump is None:
        return None
    old = state.record
    key = dump_file.dump_key(now, "before-change", state.head)
    return settings.dump(
        settings.cluster.database, key, dump_file.dump_metadata(state.head, old, major(settings.cluster))
    )


def dump_address(dumps: list[Future[str | None]]) -> str | None:
    """Wait for the dump and return its address. If there is no dump, return None. Raises StepFailed if the dump
    failed."""
    if not dumps:
        return None
    try:
        return dumps[0].result()
    except dump_file.DumpError as error:
        raise StepFailed(
            f"the dump before the schema change failed: {error}; the database is unchanged: check the backups bucket "
            "and the instance role's access to the bucket, and reboot the machine"
        ) from None


def require_space(
    settings: ChangeSettings, state: SchemaState, waiting: tuple[PendingMerge, ...], now: datetime
) -> None:
    """Drop kept databases until the copy and the merge of `waiting` have enough space.

    Raises StepFailed if the free space is too small after all possible drops."""
    cluster = settings.cluster
    if state.head is None:
        return
    size = database_bytes(cluster, cluster.database)
    bases = [database_bytes(cluster, entry.database) for entry in waiting]
    needed = int(MARGIN * (size + 2 * max(bases, default=0))) + SPARE
    still = state.record.needed if state.record else set()
    made = flip.drop_kept_for_space(cluster, needed, still, now)
    if made and made[0] < needed:
        idle = [name for _, name in flip.kept_databases(cluster) if name not in still]
        storage, setting = cluster.storage
        raise StepFailed(
            f"{storage} has {made[0] / GIB:.1f} GiB free, a copy of the database needs {needed / GIB:.1f} GiB: make it "
            f"larger (the setting {setting})"
            + (f", or drop a kept database: {', '.join(idle)} hold no data for a later upgrade" if idle else "")
        )


def put_in_service(
    settings: ChangeSettings,
    state: SchemaState,
    work: str,
    successor: OwnershipRecord,
    replaced: str,
    report: ChangeReport,
    say: Say,
) -> None:
    cluster = settings.cluster
    pending = reporting.write_pending(settings.reports, report)
    say("putting the copy in service")
    aside = replaced if state.head else f"{WORK_PREFIX}empty"
    old = (state.record or OwnershipRecord(state.head, 0)) if state.head else None
    flip.flip(cluster, work, successor, aside, old)
    if state.head:
        reporting.settle_pending(settings.reports, databases(cluster))
    else:
        reporting.publish(pending)
        drop(cluster, aside)
    flip.drop_kept_for_space(cluster, 0, successor.needed, settings.now())
    for line in reporting.as_text(report).splitlines():
        print(line, file=sys.stderr, flush=True)


class Clock:
    """Measures the seconds of each phase. `laps` maps each phase's name to its seconds."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = round(now - self._last, 2), now
