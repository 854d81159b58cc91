"""A temporary MariaDB server for tests: a data folder in a temporary directory, a Unix socket, no TCP."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pymysql

ACCOUNT = "mysql"
"""The account that runs MariaDB if the tests run as root, because MariaDB refuses to run as root."""


@dataclass(frozen=True)
class MariaDB:
    socket: Path

    def run(self, statement: str) -> list[tuple[Any, ...]]:
        opened = pymysql.connect(unix_socket=str(self.socket), user="mlflow", password=PASSWORD, autocommit=True)
        with opened, opened.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall())

    def database(self, name: str) -> str:
        """Create an empty database and return its URI for MLflow."""
        self.run(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
        return f"mysql+pymysql://mlflow:{PASSWORD}@localhost/{name}?unix_socket={self.socket}"

    def checksums(self, uri: str) -> dict[str, Any]:
        """A checksum of every table."""
        name = uri.split("/")[3].split("?")[0]
        tables = [table for (table,) in self.run(f"SHOW TABLES FROM {name}")]
        return dict(self.run(f"CHECKSUM TABLE {', '.join(f'{name}.{table}' for table in tables)}"))


PASSWORD = "of-a-test"


@contextmanager
def private_mariadb() -> Iterator[MariaDB]:
    folder = Path(tempfile.mkdtemp(prefix="mlflow-ami-mariadb-", dir="/tmp"))
    options = ["--no-defaults", f"--datadir={folder}/data"]
    if os.getuid() == 0:
        account = pwd.getpwnam(ACCOUNT)
        os.chown(folder, account.pw_uid, account.pw_gid)
        options.append(f"--user={ACCOUNT}")
    owned, log = MariaDB(folder / "socket"), folder / "log"
    init = folder / "init.sql"
    init.write_text(f"CREATE USER mlflow@localhost IDENTIFIED BY '{PASSWORD}';\nGRANT ALL ON *.* TO mlflow@localhost;")
    running = None
    try:
        install = ["mariadb-install-db", *options, "--skip-test-db", "--auth-root-authentication-method=normal"]
        subprocess.run(install, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        server = [shutil.which("mariadbd") or "/usr/sbin/mariadbd", *options, f"--socket={owned.socket}"]
        server += ["--skip-networking", f"--init-file={init}", f"--pid-file={folder}/pid"]
        with log.open("ab") as output:
            running = subprocess.Popen(server, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        ends = time.monotonic() + 60
        while True:
            try:
                owned.run("SELECT 1")
                break
            except pymysql.Error:
                said = log.read_text()[-2000:]
                assert running.poll() is None, f"MariaDB ended with exit status {running.returncode}: {said}"
                assert time.monotonic() < ends, f"MariaDB does not answer: {said}"
            time.sleep(0.1)
        yield owned
    finally:
        if running:
            running.terminate()
            running.wait(60)
        shutil.rmtree(folder, ignore_errors=True)
