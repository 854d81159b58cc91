"""The PostgreSQL server of one DB instance: the host's package, with the roles and rights that RDS gives to a customer.

A server is a process of the OS user postgres in namespaces of its own: network, mounts, processes and shared memory.
The server's folder in the state folder is mounted at ROOT, because only root can enter the state folder:

    data/              the cluster
    archive/           completed WAL files
    restored/          WAL files of the source, while a restore to a point in time runs
    postgresql.conf, pg_hba.conf, server.pem, server.key, postgresql.log, pid
"""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2 import sql

from scripts.local_cloud import namespaces, object_store_ca
from scripts.local_cloud.layout import LocalCloudError, Places

ROOT = Path("/mnt")
PROGRAMS = Path("/usr/lib/postgresql")
START_SECONDS = 600
"""Maximum seconds for a start, which replays WAL after a crash and at a restore to a point in time."""
STOP_SECONDS = 60
ARCHIVE_SECONDS = 60
OWNER = "rdsadmin"
"""The superuser of RDS. Only this program logs in as rdsadmin, from the loopback address in the server's namespace."""

LOGIN_PORT, LOGIN_PREFIX = 389, "user="
"""Port of the LDAP server (database_logins.py) on the loopback address, and the text before the user's name in LDAP."""

SHOWN_LOCALE = "en_US.UTF-8"
"""RDS's locale. A host without this locale gets C.UTF-8, which sorts in another order."""


@dataclass(frozen=True)
class Configuration:
    """What the record of a DB instance says about its server."""

    major: str
    port: int
    memory_mib: int
    parameters: Mapping[str, str]
    """Parameters of the instance's parameter group that are not the engine's defaults."""
    archives: bool
    master: str


@dataclass
class Server:
    """A running server. This object owns its descriptors. `parent` is the process that started the server, if this
    daemon started it."""

    folder: Path
    configuration: Configuration
    namespace: int
    pid: int
    pidfd: int
    parent: subprocess.Popen[bytes] | None

    def ended(self, seconds: float = 0) -> bool:
        """Wait at most `seconds` for the server's end, and return whether it has ended. A negative number waits
        forever."""
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        return bool(poller.poll(1000 * seconds if seconds >= 0 else None))

    def release(self) -> None:
        if self.parent is not None:
            self.parent.wait()
        os.close(self.pidfd)
        os.close(self.namespace)


@functools.cache
def versions() -> dict[str, str]:
    """Return the PostgreSQL versions of the host: major version → version, such as {"15": "15.18"}."""
    found = {}
    for program in sorted(PROGRAMS.glob("*/bin/postgres")):
        said = subprocess.check_output([program, "--version"], text=True)
        found[program.parts[-3]] = said.split()[2]
    return found


@functools.cache
def parameters(major: str) -> frozenset[str]:
    """Return the names of the server's parameters that a configuration file can set."""
    described = subprocess.check_output([PROGRAMS / major / "bin/postgres", "--describe-config"], text=True)
    return frozenset(line.split("\t")[0] for line in described.splitlines())


def create(folder: Path, configuration: Configuration) -> None:
    """Create the cluster. Deletes an unfinished cluster of an earlier call."""
    _empty(folder)
    known = subprocess.check_output(["locale", "-a"], text=True).lower().replace("-", "").split()
    locale = SHOWN_LOCALE if "en_us.utf8" in known else "C.UTF-8"
    options = ["--username", OWNER, "--auth", "trust", "--encoding", "UTF8", "--locale", locale, "--no-sync"]
    _run(folder, configuration.major, "initdb", *options, "--pgdata", str(ROOT / "data"))
    alone = ["--single", "-D", str(ROOT / "data"), "-c", "exit_on_error=on", "postgres"]
    _run(folder, configuration.major, "postgres", *alone, input=f"CREATE DATABASE {OWNER}\n")


def create_from(folder: Path, copy: Path, source: Path | None, until: str | None) -> None:
    """Create the cluster from the copy of another cluster. With `source`, the folder of that other cluster, the first
    start replays its archive until the time `until` (to the end if None)."""
    _empty(folder)
    _copy(copy, folder / "data")
    if source is not None:
        subprocess.run(["cp", "-al", str(source / "archive"), str(folder / "restored")], check=True)
        _write(folder / "data/recovery.signal", "")
        target = f"recovery_target_time = '{until}'\nrecovery_target_action = promote\n" if until else ""
        (folder / "recovery.conf").write_text(
            f"restore_command = 'cp {ROOT}/restored/%f %p'\nhot_standby = off\n{target}"
        )


def configure(places: Places, folder: Path, configuration: Configuration) -> None:
    """Write the configuration files. A running server reads them after `reload`."""
    memory = min(configuration.memory_mib << 20, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    archive = f"cp %p {ROOT}/archive/%f.part && mv {ROOT}/archive/%f.part {ROOT}/archive/%f"
    settings: dict[str, Any] = {
        "max_connections": min((configuration.memory_mib << 20) // 9531392, 5000),  # RDS's formula
        "shared_buffers": memory // 4 // 8192,
        **{name: value for name, value in configuration.parameters.items() if not name.startswith("rds.")},
        "listen_addresses": "*",
        "port": configuration.port,
        "unix_socket_directories": "",
        "ssl": "on",
        "ssl_cert_file": ROOT / "server.pem",
        "ssl_key_file": ROOT / "server.key",
        "hba_file": ROOT / "pg_hba.conf",
        "archive_mode": "on",
        "archive_command": archive if configuration.archives else "true",
        "archive_timeout": "5min",
        "password_encryption": "scram-sha-256",
        "timezone": "UTC",
        "log_timezone": "UTC",
        "log_line_prefix": "%t:%r:%u@%d:[%p]:",
    }
    lines = [f"{name} = '{_quoted(value)}'" for name, value in settings.items()]
    lines.append(f"include_if_exists = '{ROOT}/recovery.conf'")
    forced = configuration.parameters.get("rds.force_ssl", "1" if int(configuration.major) >= 15 else "0") == "1"
    login_server = f'ldapserver=127.0.0.1 ldapport={LOGIN_PORT} ldapprefix="{LOGIN_PREFIX}"'
    hba = [
        f"host all {OWNER} 127.0.0.1/32 trust",
        f"host replication {OWNER} 127.0.0.1/32 trust",
        f"host all {OWNER} all reject",
        f"host {OWNER} all all reject",
        # On PostgreSQL 16 and later, only an ADMIN member of rds_iam can grant it, and +rds_iam matches such a member.
        f'{"hostssl" if forced else "host"} all "{configuration.master}" all scram-sha-256',
        f"hostssl all +rds_iam all ldap {login_server}",
        f"{'hostssl' if forced else 'host'} all all all scram-sha-256",
    ]
    certificate = object_store_ca.database_certificate_file(places).read_text()
    _write(folder / "postgresql.conf", "\n".join(lines))
    _write(folder / "pg_hba.conf", "\n".join(hba))
    _write(folder / "server.pem", certificate)
    _write(folder / "server.key", object_store_ca.database_key_file(places).read_text())


def start(folder: Path, configuration: Configuration, namespace: int) -> Server:
    """Start the server and wait until it accepts connections. The returned object owns `namespace`. Raises
    LocalCloudError with the end of the server's log."""
    options = ["-D", str(ROOT / "data"), "-c", f"config_file={ROOT}/postgresql.conf"]
    options += ["-c", f"cluster_name={folder.name}"]
    with (folder / "postgresql.log").open("ab") as log, namespaces.inside(namespace):
        parent = subprocess.Popen(
            _command(folder, configuration.major, "postgres", *options),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    pid = _only_child(parent)
    server = Server(folder, configuration, namespace, pid, os.pidfd_open(pid), parent)
    (folder / "pid").write_text(str(pid))
    deadline = time.monotonic() + START_SECONDS
    while not accepts_connections(server):
        if server.ended(0.05) or time.monotonic() > deadline:
            kill(server)
            parent.wait()
            os.close(server.pidfd)
            tail = (folder / "postgresql.log").read_text(errors="replace")[-500:].strip()
            raise LocalCloudError(f"PostgreSQL did not start in {folder}; its log ends with: {tail}")
    shutil.rmtree(folder / "restored", ignore_errors=True)
    (folder / "recovery.conf").unlink(missing_ok=True)
    return server


def adopt(folder: Path, configuration: Configuration) -> Server | None:
    """Take over a server that an earlier daemon started. Returns None if the server is not running."""
    pid = running_pid(folder)
    if pid is None:
        return None
    return Server(folder, configuration, namespaces.of_process(pid), pid, os.pidfd_open(pid), None)


def running_pid(folder: Path) -> int | None:
    """Return the ID of the server's process, or None if the server is not running."""
    try:
        pid = int((folder / "pid").read_text())
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if f"cluster_name={folder.name}".encode() in arguments.split(b"\0") else None


def accepts_connections(server: Server) -> bool:
    with contextlib.suppress(psycopg2.OperationalError), connect(server):
        return True
    return False


@contextlib.contextmanager
def connect(server: Server) -> Iterator[Any]:
    """Connect as the superuser, and yield a cursor. Each statement is a transaction."""
    options: dict[str, Any] = {"host": "127.0.0.1", "port": server.configuration.port, "sslmode": "disable"}
    with namespaces.inside(server.namespace):
        connection = psycopg2.connect(**options, user=OWNER, dbname=OWNER, connect_timeout=10)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()


def set_up(server: Server, password: str, database: str | None) -> None:
    """Create the roles and databases of a new DB instance, as "Understanding PostgreSQL roles and permissions" in the
    RDS user guide describes them."""
    major, master = int(server.configuration.major), sql.Identifier(server.configuration.master)
    granted = "pg_monitor, pg_signal_backend, pg_read_all_settings, pg_read_all_stats, pg_stat_scan_tables"
    granted += ", rds_replication, rds_password" + (", pg_checkpoint" if major >= 15 else "")
    with connect(server) as cursor:
        for role in ("rds_superuser", "rds_iam", "rds_replication", "rds_password"):
            cursor.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
        cursor.execute(f"GRANT {granted} TO rds_superuser WITH ADMIN OPTION")
        if major >= 15:
            # RDS's engine allows it to rds_superuser: "Reducing replication conflicts with session_replication_role"
            cursor.execute("GRANT SET ON PARAMETER session_replication_role TO rds_superuser")
        cursor.execute(sql.SQL("CREATE ROLE {} LOGIN CREATEDB CREATEROLE VALID UNTIL 'infinity'").format(master))
        cursor.execute(sql.SQL("GRANT rds_superuser TO {} WITH ADMIN OPTION").format(master))
        if major >= 16:
            cursor.execute(sql.SQL("GRANT rds_iam TO {} WITH ADMIN OPTION").format(master))
        cursor.execute(sql.SQL("ALTER DATABASE postgres OWNER TO {}").format(master))
        if database and database != "postgres":
            cursor.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(database), master))
    set_password(server, password)


def set_password(server: Server, password: str) -> None:
    with connect(server) as cursor:
        name = sql.Identifier(server.configuration.master)
        cursor.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(name, sql.Literal(password)))


def reload(server: Server) -> None:
    signal.pidfd_send_signal(server.pidfd, signal.SIGHUP)


def copy(server: Server, target: Path) -> None:
    """Copy the running cluster to `target`, with the WAL that makes the copy consistent."""
    unfinished = server.folder / "copy"
    shutil.rmtree(unfinished, ignore_errors=True)
    options = ["--host", "127.0.0.1", "--port", str(server.configuration.port), "--username", OWNER]
    options += ["--checkpoint", "fast", "--wal-method", "stream", "--no-sync"]
    with namespaces.inside(server.namespace):
        _run(server.folder, server.configuration.major, "pg_basebackup", *options, "--pgdata", str(ROOT / "copy"))
    unfinished.rename(target)


def copy_stopped(folder: Path, target: Path) -> None:
    """Copy the cluster of a server that is not running."""
    unfinished = target.with_suffix(".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    _copy(folder / "data", unfinished)
    unfinished.rename(target)


def finish_archive(server: Server) -> None:
    """Commit a transaction, and wait until the archive contains it. A restore to any earlier time needs a transaction
    that was committed later. Raises LocalCloudError."""
    with connect(server) as cursor:
        cursor.execute(
            "SELECT pg_current_xact_id()" if int(server.configuration.major) >= 13 else "SELECT txid_current()"
        )
        cursor.execute("SELECT pg_walfile_name(pg_switch_wal())")
        archived = server.folder / "archive" / str(cursor.fetchone()[0])
    deadline = time.monotonic() + ARCHIVE_SECONDS
    while not archived.exists():
        if time.monotonic() > deadline or server.ended():
            raise LocalCloudError(f"PostgreSQL did not archive {archived.name}: see {server.folder}/postgresql.log")
        time.sleep(0.05)


def delete_archive(folder: Path, major: str, oldest_copy: Path) -> None:
    """Delete the WAL files that a restore from `oldest_copy` and later copies does not need."""
    label = (oldest_copy / "backup_label").read_text()
    first = label.partition("(file ")[2].partition(")")[0]
    _run(folder, major, "pg_archivecleanup", str(ROOT / "archive"), first)


def stop(server: Server) -> None:
    """Shut the server down: end its sessions, archive its WAL. Kills the server after STOP_SECONDS."""
    with contextlib.suppress(psycopg2.Error, LocalCloudError):
        if server.configuration.archives:
            finish_archive(server)
    with contextlib.suppress(OSError):
        signal.pidfd_send_signal(server.pidfd, signal.SIGINT)
    if not server.ended(STOP_SECONDS):
        kill(server)


def kill(server: Server) -> None:
    """Kill all processes of the server, like a crash of its host."""
    with contextlib.suppress(OSError):
        signal.pidfd_send_signal(server.pidfd, signal.SIGKILL)
    server.ended(-1)


def kill_leftover(folder: Path) -> None:
    """Kill a server that no daemon owns."""
    if pid := running_pid(folder):
        pidfd = os.pidfd_open(pid)
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [])
        os.close(pidfd)


def _command(folder: Path, major: str, program: str, *options: str) -> list[str]:
    """Return the command that runs a program of PostgreSQL as the user postgres, with `folder` mounted at ROOT."""
    # When the program ends, the kernel ends all processes and the shared memory of its namespaces.
    alone = ["unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc", "--"]
    script = f'mount --bind "$0" {ROOT}; mount -t tmpfs shm /dev/shm; exec "$@"'
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]
    environment = ["env", "-i", "LANG=C.UTF-8", "PATH=/usr/bin:/bin"]
    named = str(PROGRAMS / major / "bin" / program)
    return [*alone, "sh", "-ec", script, str(folder), *as_user, *environment, named, *options]


def _run(folder: Path, major: str, program: str, *options: str, input: str = "") -> None:
    argv = _command(folder, major, program, *options)
    done = subprocess.run(argv, cwd="/", capture_output=True, text=True, input=input)
    if done.returncode != 0:
        raise LocalCloudError(f"{program} failed in {folder}: {done.stderr.strip()[-500:]}")


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for made in (folder, folder / "archive"):
        made.mkdir(mode=0o700)
        _give(made)


def _copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", "--reflink=auto", str(source), str(target)], check=True)


def _write(path: Path, content: str) -> None:
    """Write a file that only the user postgres can read."""
    new = path.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_text(content + "\n")
    _give(new)
    new.rename(path)


def _give(path: Path) -> None:
    account = pwd.getpwnam("postgres")
    os.chown(path, account.pw_uid, account.pw_gid)


def _quoted(value: Any) -> str:
    return str(value).replace("\\", "\\\\").replace("'", "''")


def _only_child(parent: subprocess.Popen[bytes]) -> int:
    """Wait for the process that `unshare` starts, and return its ID."""
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    while parent.poll() is None:
        if found := children.read_text().split():
            return int(found[0])
        time.sleep(0.001)
    raise LocalCloudError(f"unshare ended with status {parent.returncode}")
