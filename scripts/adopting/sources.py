"""Sources of an adoption. Each source is read in one snapshot. adopt.py never writes to a source."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from mlflow_host.contract import adoption
from mlflow_host.contract.adoption import AdoptionError
from scripts.adopting.target import Api

ALEMBIC = "alembic_version"
DUMP_MAGIC = b"PGDMP"


@dataclass(frozen=True)
class Snapshot:
    """A snapshot of a source. `write_rows(table, sink)` writes a table's rows in the format of `contract.adoption`, and
    returns, for each column, the number of values from which NUL characters or invalid UTF-8 were removed."""

    kind: str
    head: str
    columns: dict[str, list[str]]
    write_rows: Callable[[str, IO[bytes]], dict[str, int]]
    folder: Path
    """The base folder of relative artifact locations."""
    traces: frozenset[str] = frozenset()
    """The IDs of the traces whose spans are in a file. The set is empty if the source is not a tracking server."""


def default_name(source: str) -> str:
    """A name for the source, made from the name of its database, file, folder or host."""
    if server_url(source):
        return _as_name(urlsplit(source).netloc + urlsplit(source).path)
    path = urlsplit(source).path if "://" in source else str(Path(source).resolve())
    last = [part for part in path.split("/") if part][-2:] if path.endswith(("mlflow.db", "mlruns")) else [path]
    text = "-".join(Path(part).stem for part in last) if len(last) > 1 else Path(last[0]).stem
    return _as_name(text)


def _as_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-") or "source"


def server_url(text: str) -> bool:
    return urlsplit(text).scheme in ("http", "https")


@contextlib.contextmanager
def read(source: str, server: Api | None, say: Callable[[str], None]) -> Iterator[Snapshot]:
    """The snapshot of `source`, an argument of the command line. If `source` is an HTTP URL, `server` is the API client
    for this URL. Raises AdoptionError."""
    scheme = urlsplit(source).scheme.partition("+")[0] if "://" in source else ""
    if scheme in ("postgresql", "postgres"):
        opened: Any = from_postgresql(source)
    elif scheme in ("mysql", "mariadb"):
        opened = from_mysql(source)
    elif scheme == "sqlite":
        opened = from_sqlite(Path(unquote(urlsplit(source).path)[1:]))
    elif server_url(source):
        assert server
        opened = from_server(server, say)
    elif scheme:
        raise AdoptionError(
            f"{scheme}:// is not a source: use a file, a folder mlruns/, postgresql://…, mysql://… or https://…"
        )
    elif Path(source).is_dir():
        opened = from_mlruns(Path(source))
    elif not Path(source).exists():
        raise AdoptionError(f"{source} does not exist")
    elif _begins_with(Path(source), b"SQLite format 3\0"):
        opened = from_sqlite(Path(source))
    else:
        opened = from_dump(Path(source))
    with opened as snapshot:
        if not re.fullmatch(r"[0-9a-f]{12}", snapshot.head):
            raise AdoptionError(f"{source} is not an MLflow database: it has no migration in {ALEMBIC}")
        yield snapshot


def _begins_with(path: Path, sign: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(sign)) == sign


# SQLite


@contextlib.contextmanager
def from_sqlite(path: Path, folder: Path | None = None) -> Iterator[Snapshot]:
    """Copy the file with SQLite's backup function. The copy is consistent even if a server writes to the file."""
    if not path.exists():
        raise AdoptionError(f"{path} does not exist")
    with tempfile.TemporaryDirectory(prefix="mlflow-ami-adopt-") as scratch:
        copy = sqlite3.connect(Path(scratch) / "copy.db")
        try:
            source = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
            try:
                source.backup(copy)
            finally:
                source.close()
            tables = [name for (name,) in copy.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            columns = {
                name: [row[1] for row in copy.execute(f'PRAGMA table_info("{name}")')]
                for name in tables
                if not name.startswith("sqlite_")
            }
            # The default text_factory raises an error for text that is not UTF-8. `_write` counts and repairs it.
            copy.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
            head = _head_of(columns, lambda query: copy.execute(query).fetchall())

            def write_rows(table: str, sink: IO[bytes]) -> dict[str, int]:
                listed = ", ".join(f'"{column}"' for column in columns[table])
                return _write(copy.execute(f'SELECT {listed} FROM "{table}"'), columns[table], sink)

            yield Snapshot("SQLite", head, columns, write_rows, folder or path.resolve().parent)
        except sqlite3.DatabaseError as error:
            raise AdoptionError(f"{path} cannot be read as a SQLite database: {error}") from None
        finally:
            copy.close()


def _query_of(opened: Any) -> Callable[[str], list[tuple[Any, ...]]]:
    """A function that runs a query on this PostgreSQL or MySQL connection and returns the rows."""

    def query(text: str) -> list[tuple[Any, ...]]:
        with opened.cursor() as cursor:
            cursor.execute(text)
            return list(cursor.fetchall())

    return query


def _columns_of(schema: str, query: Callable[[str], list[tuple[Any, ...]]]) -> dict[str, list[str]]:
    """The columns of each table. `schema` is the SQL function that returns the name of the current schema."""
    columns: dict[str, list[str]] = {}
    for table, column in query(
        "SELECT c.table_name, c.column_name FROM information_schema.columns c JOIN information_schema.tables t "
        f"USING (table_schema, table_name) WHERE table_schema = {schema} AND t.table_type = 'BASE TABLE' "
        "ORDER BY c.table_name, c.ordinal_position"
    ):
        columns.setdefault(str(table), []).append(str(column))
    return columns


def _head_of(columns: dict[str, list[str]], query: Callable[[str], Any]) -> str:
    if ALEMBIC not in columns:
        return ""
    found = query(f"SELECT version_num FROM {ALEMBIC}")
    return str(found[0][0]) if len(found) == 1 else ""


def _write(found: Any, columns: list[str], sink: IO[bytes]) -> dict[str, int]:
    removed: dict[str, int] = {}
    for row in found:
        fields = []
        for column, value in zip(columns, row, strict=True):
            text = _as_text(value)
            if text is not None and isinstance(value, str) and ("\0" in text or not _is_utf8(text)):
                removed[column] = removed.get(column, 0) + 1
                text = text.replace("\0", "").encode("utf-8", "ignore").decode()
            fields.append(adoption.escape(text))
        sink.write(("\t".join(fields) + "\n").encode())
    return removed


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return "\\x" + bytes(value).hex()
    if isinstance(value, bool):
        return str(int(value))
    return repr(value) if isinstance(value, float) else str(value)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


# PostgreSQL


@contextlib.contextmanager
def from_postgresql(url: str) -> Iterator[Snapshot]:
    import psycopg2

    try:
        opened = psycopg2.connect(re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql://", url), connect_timeout=15)
    except psycopg2.Error as error:
        raise AdoptionError(f"the source cannot be reached: {' '.join(str(error).split())}") from None
    try:
        opened.set_session(isolation_level="REPEATABLE READ", readonly=True)
        query = _query_of(opened)
        columns = _columns_of("current_schema()", query)

        def write_rows(table: str, sink: IO[bytes]) -> dict[str, int]:
            listed = ", ".join(f'"{column}"' for column in columns[table])
            with opened.cursor() as cursor:
                cursor.execute("SET LOCAL extra_float_digits = 3")
                cursor.execute("SET LOCAL client_encoding = 'UTF8'")
                cursor.copy_expert(f'COPY (SELECT {listed} FROM "{table}") TO STDOUT', sink)
            return {}

        yield Snapshot("PostgreSQL", _head_of(columns, query), columns, write_rows, Path.cwd())
    except psycopg2.Error as error:
        raise AdoptionError(f"the source cannot be read: {' '.join(str(error).split())}") from None
    finally:
        opened.close()


# MySQL and MariaDB


@contextlib.contextmanager
def from_mysql(url: str) -> Iterator[Snapshot]:
    """Read a MySQL or MariaDB database. The URL's query may contain these options of SQLAlchemy's pymysql dialect:
    unix_socket, ssl_ca, ssl_cert, ssl_key. The password comes from the URL, else from MYSQL_PWD, else from
    ~/.my.cnf."""
    import pymysql
    from pymysql.converters import encoders
    from pymysql.cursors import SSCursor

    where = urlsplit(url)
    given: dict[str, Any] = {"host": where.hostname, "port": where.port, "user": unquote(where.username or "")}
    given["password"] = unquote(where.password or "") or os.environ.get("MYSQL_PWD")
    wanted = ("unix_socket", "ssl_ca", "ssl_cert", "ssl_key")
    given |= {name: text for name, text in parse_qsl(where.query) if name in wanted}
    own = Path.home() / ".my.cnf"
    if own.exists():
        given["read_default_file"] = str(own)
    try:
        opened = pymysql.connect(
            database=unquote(where.path.strip("/")),
            charset="utf8mb4",
            connect_timeout=15,
            conv=encoders,  # type: ignore[arg-type]  # without decoders, numbers stay text and lose no digits
            **{name: value for name, value in given.items() if value},
        )
    except (pymysql.Error, OSError, RuntimeError) as error:
        raise AdoptionError(f"the source cannot be reached: {_reason(error)}") from None
    try:
        query = _query_of(opened)
        query("SET SESSION net_write_timeout = 3600")
        query("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        query("START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY")
        columns = _columns_of("database()", query)

        def write_rows(table: str, sink: IO[bytes]) -> dict[str, int]:
            listed = ", ".join(f"`{column}`" for column in columns[table])
            with opened.cursor(SSCursor) as cursor:  # SSCursor reads row by row
                cursor.execute(f"SELECT {listed} FROM `{table}`")
                return _write(cursor, columns[table], sink)

        yield Snapshot("MySQL", _head_of(columns, query), columns, write_rows, Path.cwd())
    except pymysql.Error as error:
        raise AdoptionError(f"the source cannot be read: {_reason(error)}") from None
    finally:
        opened.close()


def _reason(error: Exception) -> str:
    """The text of an error. An error of pymysql contains a number and a sentence."""
    return " ".join(str(error.args[-1] if error.args else error).split())


# pg_dump


@contextlib.contextmanager
def from_dump(path: Path) -> Iterator[Snapshot]:
    """Read a dump by pg_dump, in its custom or plain format. The rows in a dump are already in COPY's text format."""
    with tempfile.TemporaryDirectory(prefix="mlflow-ami-adopt-") as scratch:
        tables = _split_dump(path, Path(scratch))
        if ALEMBIC not in tables:
            raise AdoptionError(f"{path} is neither a SQLite database nor a dump by pg_dump with MLflow's tables")
        lines = (Path(scratch) / ALEMBIC).read_text().split()

        def write_rows(table: str, sink: IO[bytes]) -> dict[str, int]:
            with (Path(scratch) / table).open("rb") as file:
                shutil.copyfileobj(file, sink, 1 << 20)
            return {}

        yield Snapshot("pg_dump", lines[0] if len(lines) == 1 else "", tables, write_rows, path.resolve().parent)


_COPY = re.compile(rb'^COPY (?:[\w"]+\.)?"?(\w+)"? \(([^)]*)\) FROM stdin;$')


def _split_dump(path: Path, scratch: Path) -> dict[str, list[str]]:
    """Write the rows of each table to a separate file. Returns the columns of each table."""
    with contextlib.ExitStack() as stack:
        if _begins_with(path, DUMP_MAGIC):
            if shutil.which("pg_restore") is None:
                raise AdoptionError(f"{path} is read by pg_restore, which is not on PATH: install postgresql-client")
            command = ["pg_restore", "--data-only", "--file=-", str(path)]
            running = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
            assert running.stdout
            lines: IO[bytes] = running.stdout
        else:
            running, lines = None, stack.enter_context(path.open("rb"))
        tables: dict[str, list[str]] = {}
        sink: IO[bytes] | None = None
        for line in lines:
            if sink:
                if line == b"\\.\n":
                    sink.close()
                    sink = None
                else:
                    sink.write(line)
            elif found := _COPY.match(line.rstrip(b"\n")):
                table = found[1].decode()
                tables[table] = [name.strip().strip('"') for name in found[2].decode().split(",")]
                sink = stack.enter_context((scratch / table).open("wb"))
        if running and running.wait():
            said = running.stderr.read().decode(errors="replace").strip() if running.stderr else ""
            raise AdoptionError(
                f"pg_restore cannot read {path}: {said.splitlines()[-1] if said else 'no reason given'}"
            )
    return tables


# FileStore


@contextlib.contextmanager
def from_mlruns(path: Path) -> Iterator[Snapshot]:
    """Read a folder mlruns/. The command `mlflow migrate-filestore` first copies the folder into a SQLite file."""
    with tempfile.TemporaryDirectory(prefix="mlflow-ami-adopt-") as scratch:
        made = Path(scratch) / "migrated.db"
        command = [sys.executable, "-W", "ignore", "-m", "mlflow", "migrate-filestore"]
        command += ["--source", str(path.resolve()), "--target", f"sqlite:///{made}"]
        kept = {name: text for name, text in os.environ.items() if not name.startswith("MLFLOW_")}
        environment = {**kept, "MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scratch)
        if done.returncode or not made.exists():
            said = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
            raise AdoptionError(f"mlflow migrate-filestore cannot read {path}: {said}")
        with from_sqlite(made, path.resolve().parent if path.name == "mlruns" else path.resolve()) as snapshot:
            yield dataclasses.replace(snapshot, kind="mlruns")


# A tracking server


@contextlib.contextmanager
def from_server(api: Api, say: Callable[[str], None]) -> Iterator[Snapshot]:
    from scripts.adopting import server

    with tempfile.TemporaryDirectory(prefix="mlflow-ami-adopt-") as scratch:
        made = Path(scratch) / "read.db"
        traces = server.read(api, made, say)
        with from_sqlite(made) as snapshot:
            yield dataclasses.replace(snapshot, kind="tracking server", traces=traces)
