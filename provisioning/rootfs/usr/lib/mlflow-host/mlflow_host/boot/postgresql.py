"""Boot step `postgresql`: create the cluster on first use, refuse one of another major, then execute PostgreSQL.

The cluster's folder contains only data. Its configuration and access rules come from the image and from `configure`, so
the same cluster runs with any image of its major. The locale is the C library's C.UTF-8: it sorts by code point on
every distribution. ICU and other locales change their order between versions, which would corrupt indexes.
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
    """Write this process's ID, which will be PostgreSQL's, into the postmaster.pid of a postmaster that no longer runs.

    A machine that lost power leaves the file, and after the boot the ID in it may belong to another process of this
    user. PostgreSQL then refuses to start. The rest of the file stays: it contains the key of the shared memory, by
    which PostgreSQL detects backends of a killed postmaster.
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
    """Whether a process runs PostgreSQL on this cluster. Processes of other users cannot."""
    try:
        where, what = (Path(f"/proc/{process}/{link}").readlink() for link in ("cwd", "exe"))
    except OSError:
        return False
    return what.name == "postgres" and where == cluster.resolve()


def prepare(clusters: Path, major: int, programs: Path, s: BootStep) -> Path:
    """The cluster of this major; created if the volume has none. Raises StepFailed if it has one of another major."""
    others = sorted(path.name for path in clusters.iterdir() if path.name.isdigit() and path.name != str(major))
    cluster = clusters / str(major)
    if others and not cluster.exists():
        raise StepFailed(
            f"the data volume holds a PostgreSQL {others[-1]} cluster and this image runs PostgreSQL {major}: nothing "
            f"was changed; pin an image with PostgreSQL {others[-1]}, or move by dump and restore: take a dump there "
            "with `mlflow-host-dump`, and set restoreFrom to its name with this image"
        )
    if not cluster.exists():
        s.say(f"creating a PostgreSQL {major} cluster")
        create_cluster(cluster, programs)
    if stanza_of(cluster) is None:
        start_stanza(cluster, datetime.now(UTC))
    return cluster


if __name__ == "__main__":
    main(sys.argv[1:])
