"""Read the state of the database in service, and decide which action the database step must perform."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from psycopg2 import sql

from mlflow_host.machine.status import StepFailed
from mlflow_host.postgres import dump_file, flip, ownership
from mlflow_host.postgres.catalog import BOOKKEEPING, head, read_catalog
from mlflow_host.postgres.cluster import WORK_PREFIX, Cluster, connection, databases, rows, run
from mlflow_host.postgres.ownership import OwnershipRecord, PendingMerge
from mlflow_host.schema import reporting
from mlflow_host.schema.release import ImageSchema
from mlflow_host.schema.revisions import known_revisions

Say = Callable[[str], None]


@dataclass(frozen=True)
class ChangeSettings:
    """The inputs of the database step. Tests pass their own cluster and MLflow releases in this class."""

    cluster: Cluster
    image: ImageSchema
    reports: Path
    dump: dump_file.Dumper | None
    """The function that takes a dump before the change. If the value is None (only in tests), no dump is taken."""
    blank: Path | None = None
    """The dump of an empty database with the image's schema. If the value is None (only in tests), MLflow creates the
    database."""
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))


@dataclass(frozen=True)
class SchemaState:
    """The database in service. `present` is false if there is no database. `head` is None if there are no MLflow
    tables."""

    present: bool
    head: str | None
    record: OwnershipRecord | None


def read_state(cluster: Cluster) -> SchemaState:
    with connection(cluster) as opened:
        if not rows(opened, "SELECT 1 FROM pg_database WHERE datname = %s", (cluster.database,)):
            return SchemaState(False, None, None)
        found = ownership.read(opened, cluster.database)
    with connection(cluster, cluster.database) as opened:
        revision = head(opened)
        if revision is None and set(read_catalog(opened).tables) - {BOOKKEEPING}:
            raise StepFailed(
                f"the database {cluster.database} holds tables but none of MLflow's migrations: it is not an MLflow "
                "database; rename it (ALTER DATABASE … RENAME TO …) and start the machine again"
            )
    return SchemaState(True, revision, found)


def nothing_left_over(settings: ChangeSettings) -> bool:
    """Return true if an earlier step left neither an unfinished database nor a pending report."""
    orphans = any(name.startswith(WORK_PREFIX) for name in databases(settings.cluster))
    return not orphans and not any(settings.reports.glob(f"*{reporting.PENDING}"))


def decide(state: SchemaState, image: ImageSchema) -> str:
    """Return "create", "same", "upgrade" or "carry back". Raises StepFailed if this image's MLflow lacks the database's
    migration, and no ownership record names the migration."""
    if state.head is None:
        return "create"
    if state.head == image.head:
        return "same"
    if state.head in known_revisions(image.python):
        return "upgrade"
    if state.record and state.record.head == state.head:
        return "carry back"
    raise StepFailed(
        f"the database is at migration {state.head}, which MLflow {image.mlflow_version} of this image does not have, "
        "and the database has no ownership record: pin an image with that migration's MLflow release, or a newer one, "
        "and start the machine so that the record is written; then pin this image"
    )


def plan(settings: ChangeSettings) -> dict[str, Any]:
    """Return the action that the database step would perform, with the old and the new MLflow release."""
    state = read_state(settings.cluster)
    return {
        "action": decide(state, settings.image),
        "from_head": state.head,
        "from_version": state.record.mlflow_version if state.record else None,
        "to_head": settings.image.head,
        "to_version": settings.image.mlflow_version,
    }


def drop_leftovers(settings: ChangeSettings, say: Say) -> None:
    """Drop the unfinished databases of an interrupted step, and publish or delete its pending report. Idempotent."""
    for name in flip.drop_orphans(settings.cluster):
        say(f"dropped {name}, left by an interrupted step")
    if settings.reports.is_dir():
        reporting.settle_pending(settings.reports, databases(settings.cluster))


def update_ownership(settings: ChangeSettings, state: SchemaState) -> None:
    """Write this image into the ownership record, and make the database writable. If an administrator put a kept
    database in service by renaming it, that database is read-only. Nothing is written if no change is needed."""
    live, wanted = settings.cluster.database, ownership_record(settings)
    if state.record:
        wanted = replace(wanted, waiting=state.record.waiting, unresolved=state.record.unresolved)
    kept_aside = (
        "SELECT 1 FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase WHERE d.datname = %s "
        "AND s.setrole = 0 AND 'default_transaction_read_only=on' = ANY (s.setconfig)"
    )
    with connection(settings.cluster) as opened:
        if rows(opened, kept_aside, (live,)):
            statement = sql.SQL("ALTER DATABASE {} RESET default_transaction_read_only")
            run(opened, statement.format(sql.Identifier(live)))
        if not state.record or replace(state.record, at=wanted.at) != wanted:
            ownership.write(opened, live, wanted)


def ownership_record(
    settings: ChangeSettings, waiting: tuple[PendingMerge, ...] = (), unresolved: tuple[str, ...] = ()
) -> OwnershipRecord:
    image = settings.image
    at = settings.now().isoformat(timespec="seconds")
    return OwnershipRecord(
        image.head, image.count, image.mlflow_version, image.image_version, at, waiting, unresolved=unresolved
    )
