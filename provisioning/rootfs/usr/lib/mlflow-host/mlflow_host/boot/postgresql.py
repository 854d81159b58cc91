"""Boot step `postgresql`: create the cluster at the first boot, refuse a cluster of another major version, and execute
PostgreSQL.

The cluster's folder contains only data. The configuration and the access rules come from the image and from the step
`configure`, so every image with the same major version of PostgreSQL can use the cluster. The locale is C.UTF-8 of the
C library, which sorts by code point on every distribution. With ICU and other locales, the sort order can change
between versions of the library, which would corrupt indexes.
"""

from __future__ import annotations

import os
import resource
import sys
from datetime import UTC, datetime
from pathlib import Path

from mlflow_host.machine import config
from mlflow_host.machine.status import BootStep, StepFailed, finish
from mlflow_host.postgres import reader_role
from mlflow_host.postgres.initdb import SETTINGS, binaries, create_cluster
from mlflow_host.postgres.pgbackrest import stanza_of, start_stanza


def main(arguments: list[str]) -> None:
    major = config.postgresql_major()
    if arguments == ["--started"]:
        reader_role.create_if_configured()
        return finish("postgresql", f"PostgreSQL {major} accepts connections")
    s = BootStep("postgresql", config.RUN)
    with s.reporting():
        cluster = prepare(config.CLUSTERS, major, binaries(major), s)
        take_over_lock_file(cluster)
        s.say(f"starting PostgreSQL {major}")
    limit = config.load().sizing.process_limit_mb << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    program = binaries(major) / "postgres"
    os.execv(program, [str(program), "-D", str(cluster), "-c", f"config_file={SETTINGS}"])


def take_over_lock_file(cluster: Path) -> None:
    """Write the ID of this process, which becomes PostgreSQL's ID, into postmaster.pid if no postmaster runs.

    After a power loss, postmaster.pid remains, and the process ID in postmaster.pid may belong to another process of
    this user, so PostgreSQL would not start. The other lines of postmaster.pid stay unchanged, because they include the
    key of the shared memory, which PostgreSQL needs to detect backends of a killed postmaster.
    """
    lock = cluster / "postmaster.pid"
    try:
        first, rest = lock.read_text().split("\n", 1)
        owner = abs(int(first))
    except (FileNotFoundError, ValueError):
        return
    if not is_postmaster(owner, cluster):
        lock.write_text(f"{os.getpid()}\n{rest}")


def is_postmaster(process: int, cluster: Path) -> bool:
    """Whether a process is a PostgreSQL server of this cluster. For a process of another user, the result is False."""
    try:
        where, what = (Path(f"/proc/{process}/{link}").readlink() for link in ("cwd", "exe"))
    except OSError:
        return False
    return what.name == "postgres" and where == cluster.resolve()


def prepare(clusters: Path, major: int, programs: Path, s: BootStep) -> Path:
    """Return the cluster of this major version, and create it on a volume without a cluster. Raises StepFailed if the
    volume has only a cluster of another major version."""
    others = sorted(path.name for path in clusters.iterdir() if path.name.isdigit() and path.name != str(major))
    cluster = clusters / str(major)
    if others and not cluster.exists():
        raise StepFailed(
            f"the data volume holds a PostgreSQL {others[-1]} cluster and this image runs PostgreSQL {major}: nothing "
            f"was changed; pin an image with PostgreSQL {others[-1]}. To move the data to PostgreSQL {major}, run "
            "`mlflow-host-dump` on that image, then pin this image and set restoreFrom to the name of the dump"
        )
    if not cluster.exists():
        s.say(f"creating a PostgreSQL {major} cluster")
        create_cluster(cluster, programs)
    if stanza_of(cluster) is None:
        start_stanza(cluster, datetime.now(UTC))
    return cluster


if __name__ == "__main__":
    main(sys.argv[1:])
