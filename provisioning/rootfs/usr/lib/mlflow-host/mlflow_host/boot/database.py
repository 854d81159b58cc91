"""Boot step `database`: bring the database to this image's schema.

    python -m mlflow_host.boot.database            as the OS user postgres, with PostgreSQL running and MLflow stopped
    python -m mlflow_host.boot.database --plan     print the action as JSON and change nothing

    database   action
    empty      create        load the empty database that the bake dumped, flip
    same       same          do nothing; MLflow is not imported
    older      upgrade       copy the database, migrate the copy, merge kept databases back, verify, flip
    newer      carry back    load the empty database, copy the tables and columns that both schemas have, verify, flip

Before the flip, the step only reads the database in service. The flip is one transaction: it renames the database in
service and gives its name to the new database. After a crash before the flip, the old database remains in service, and
the next boot drops unfinished databases. The replaced database is kept under a new name, which contains the time and
the migration head of the replaced database.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psycopg2
from psycopg2 import errors

from mlflow_host.machine.status import StepFailed
from mlflow_host.postgres import dump_file, flip, ownership
from mlflow_host.postgres.cluster import Cluster, accepts_connections, connection, in_service, run, value
from mlflow_host.schema import empty_database
from mlflow_host.schema.change import change, create
from mlflow_host.schema.copying import CarryError
from mlflow_host.schema.release import ReleaseError, of_this_image
from mlflow_host.schema.state import (
    ChangeSettings,
    Say,
    decide,
    drop_leftovers,
    nothing_left_over,
    plan,
    read_state,
    update_ownership,
)

LOCAL_SECONDS, REMOTE_SECONDS = 60, 600
"""The time to wait for the machine's own PostgreSQL and for a server on another host. A failover, a restart or a change
of the class in Amazon RDS takes minutes."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mlflow_host.boot.database",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--plan", action="store_true", help="print what would be done as JSON and change nothing")
    arguments = parser.parse_args()
    from mlflow_host.machine.status import step

    if arguments.plan:
        try:
            print(json.dumps(plan(from_machine())))
        except StepFailed as failure:
            print(f"mlflow-host: {failure}", file=sys.stderr)
            raise SystemExit(2) from None
        return
    with step("database") as current:
        current.say(bring_with_retries(from_machine(), current.say))


def from_machine() -> ChangeSettings:
    """Settings from the host's configuration and from image.json. Raises StepFailed if one of the files is missing."""
    from mlflow_host.machine import config
    from mlflow_host.postgres import pgbackrest

    try:
        host, image = config.load(), of_this_image()
    except OSError as error:
        raise StepFailed(
            f"{error.filename} cannot be read: the step configure or the bake should have written it"
        ) from None
    cluster = in_service()
    dumper = dump_file.dumper_to(cluster, pgbackrest.bucket(host.launch))
    return ChangeSettings(cluster, image, config.DATA / "reports", dumper, empty_database.FILE)


class ConnectionLost(StepFailed):
    """PostgreSQL ended the connection, or does not accept connections yet."""


def connection_lost(error: BaseException) -> ConnectionLost:
    return ConnectionLost(
        f"the connection to PostgreSQL was lost ({sentence(error)}); the database in service is unchanged: reboot the "
        "machine"
    )


def bring_with_retries(settings: ChangeSettings, say: Say) -> str:
    """Run `bring`. If the connection to PostgreSQL is lost and PostgreSQL accepts connections again in time, run
    `bring` again, at most three times in total. systemd restarts the machine's own PostgreSQL, but does not restart a
    failed boot step."""
    seconds = REMOTE_SECONDS if settings.cluster.remote else LOCAL_SECONDS
    for _ in range(2):
        try:
            return bring(settings, say)
        except ConnectionLost as failure:
            say(f"waiting for PostgreSQL: {failure}")
            if not wait_for_postgresql(settings.cluster, seconds):
                raise
    return bring(settings, say)


def wait_for_postgresql(cluster: Cluster, seconds: float) -> bool:
    """Wait for PostgreSQL. Returns whether PostgreSQL accepts connections within `seconds`."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if accepts_connections(cluster):
            return True
        time.sleep(0.2)
    return False


def bring(settings: ChangeSettings, say: Say) -> str:
    """Bring the database to this image's schema. Returns a sentence for the status page. If the action fails, the old
    database stays in service, and `bring` raises StepFailed."""
    try:
        state = read_state(settings.cluster)
        if state.head == settings.image.head and nothing_left_over(settings):
            update_ownership(settings, state)
            return f"the database is at this image's schema ({state.head}, MLflow {settings.image.mlflow_version})"
        with step_lock(settings.cluster):
            return bring_locked(settings, say)
    except errors.DiskFull as error:
        raise volume_is_full(settings.cluster, error) from error
    except psycopg2.OperationalError as error:
        raise connection_lost(error) from error
    except (psycopg2.Error, CarryError, ReleaseError, dump_file.DumpError, ValueError) as error:
        if "DiskFull" in str(error) or os.strerror(errno.ENOSPC) in str(error):  # MLflow's text of PostgreSQL's error
            raise volume_is_full(settings.cluster, error) from error
        raise StepFailed(
            f"the database could not be brought to MLflow {settings.image.mlflow_version}: {sentence(error)}. The "
            "database is unchanged: pin the previous image, and report this error with the journal of this machine"
        ) from error
    except OSError as error:
        raise StepFailed(
            f"{error.filename or 'a file'}: {error.strerror}; the database in service is unchanged"
        ) from error


def volume_is_full(cluster: Cluster, error: BaseException) -> StepFailed:
    """The error for a full volume. The message names the kept databases that an administrator may drop, because they
    hold no data for a later upgrade."""
    idle: list[str] = []
    with suppress(psycopg2.Error), connection(cluster) as opened:
        record = ownership.read(opened, cluster.database)
        needed = record.needed if record else set()
        idle = [name for _, name in flip.kept_databases(cluster) if name not in needed]
    storage, setting = cluster.storage
    return StepFailed(
        f"{storage} is full ({sentence(error)}); the database in service is unchanged: make it larger (the setting "
        f"{setting})"
        + (f", or drop a kept database: {', '.join(idle)} hold no data for a later upgrade" if idle else "")
    )


def bring_locked(settings: ChangeSettings, say: Say) -> str:
    drop_leftovers(settings, say)
    state = read_state(settings.cluster)
    action = decide(state, settings.image)
    if action == "same":
        update_ownership(settings, state)
        return f"the database is at this image's schema ({state.head}, MLflow {settings.image.mlflow_version})"
    try:
        if action == "create" and settings.blank:
            return create(settings, state, settings.blank, say)
        return change(settings, state, action, say)
    except BaseException:
        with suppress(psycopg2.Error):
            flip.drop_orphans(settings.cluster)
        raise


@contextmanager
def step_lock(cluster: Cluster, seconds: int = 30) -> Iterator[None]:
    """Hold an advisory lock, so only one boot step `database` runs at a time. If the step is killed, PostgreSQL
    releases the lock.

    If the `with` block fails and the connection that holds the lock is also lost, raises ConnectionLost. MLflow wraps
    connection errors in its own exceptions, so the type of the block's exception does not show a lost connection."""
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
                raise connection_lost(error) from error
            raise


def sentence(error: BaseException) -> str:
    """The first line of the error's message, without the full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


if __name__ == "__main__":
    main()
