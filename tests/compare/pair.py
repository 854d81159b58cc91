"""Run two servers of one release, each with its own database, and compare their responses to the same requests.

MLflow's server runs in uvicorn, like with `mlflow server`. Our server is started like on a launched machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

from mlflow_host.server.environment import artifacts_destination, private_environment
from tests.compare.grammar import BUCKET, HOST, Request, with_run_ids
from tests.support.services import HOST_PACKAGE, PostgreSQL, create_schema, process, wait_until

HERE = Path(__file__).parent
COMPARED_HEADERS = re.compile("content-type|location|allow|www-authenticate|set-cookie|x-(?!mlflow-host-).*")
"""Lengths are not compared, because the servers format JSON with different line breaks. CORS headers are compared only
if the request has an Origin, because Flask always sends them and FastAPI sends them only for an Origin. The headers
x-mlflow-host-… are for nginx's log, and nginx removes them."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: tuple[str, ...]
    body: str

    def __str__(self) -> str:
        return f"{self.status} {self.body[:1500]} {self.headers}"


@dataclass
class Side:
    """A client's connection to one of the two servers, and the IDs of the runs that this server created."""

    uds: Path
    cluster: PostgreSQL
    database: str
    runs: list[str] = field(default_factory=list)
    connection: socket.socket | None = None

    def ask(self, request: Request) -> Answer:
        """Send the request with this server's run IDs. If the request creates a run, record its ID."""
        body = with_run_ids(request.body, self.runs)
        lines = [f"{request.method} ".encode() + with_run_ids(request.target, self.runs) + b" HTTP/1.1"]
        lines += [f"{name}: {value}".encode() for name, value in request.headers]
        lines += [f"content-length: {len(body)}".encode()]
        told = b"\r\n".join(lines) + b"\r\n\r\n" + body
        try:
            status, headers, got = self.exchanged(request.method, told)
        except (OSError, HTTPException) as error:
            self.close()
            return Answer(0, (), f"{type(error).__name__}: {error}")
        if status == 200 and b"runs/create" in request.target and (made := run_made(got)):
            self.runs.append(made)
        return Answer(status, tuple(map(self.without_ids, headers)), self.without_ids(said(got)))

    def exchanged(self, method: str, told: bytes) -> tuple[int, tuple[str, ...], bytes]:
        if self.connection is None:
            self.connection = socket.socket(socket.AF_UNIX)
            self.connection.settimeout(60)
            self.connection.connect(str(self.uds))
        self.connection.sendall(told)
        with HTTPResponse(self.connection, method=method) as response:
            response.begin()
            got = response.read()
            pairs = sorted((name.lower(), value) for name, value in response.getheaders())
            crossed = b"\r\norigin: " in told
            headers = tuple(
                f"{name}: {value}"
                for name, value in pairs
                if COMPARED_HEADERS.fullmatch(name) or (crossed and name.startswith("access-control-"))
            )
            if response.will_close:
                self.close()
            return response.status, headers, got

    def close(self) -> None:
        if self.connection:
            self.connection.close()
        self.connection = None

    def without_ids(self, text: str) -> str:
        """Return `text` with run numbers instead of run IDs, and with placeholders for other IDs and run names. An SQL
        statement at the end of `text` is removed."""
        for number, run_id in enumerate(self.runs):
            if run_id in text:
                text = text.replace(run_id, f"<run {number}>")
        text = re.sub(r"[0-9a-f]{32}", "<id>", text.split("[SQL:")[0])
        text = re.sub(" at 0x[0-9a-f]+", " at <an address>", text)
        return re.sub(r"\b[a-z]+-[a-z]+-[0-9]+\b", "<a name>", text)

    def tables(self) -> dict[str, list[str]]:
        """Return all rows that the requests write, without generated times and IDs."""
        made_up = ("last_update_time", "creation_time", "deleted_time", "input_uuid", "dataset_uuid", "source_id")
        found = {}
        for table in ("experiments", "runs", "metrics", "latest_metrics", "params", "tags", "inputs", "input_tags"):
            columns = [
                name
                for (name,) in self.cluster.execute(
                    f"select column_name from information_schema.columns where table_name = '{table}' order by 1",
                    self.database,
                )
                if name not in made_up
            ]
            # Values are compared as text, so that 0 and -0 differ.
            row = ", ".join(f"'{name}', {name}::text" for name in columns)
            rows = self.cluster.execute(f"select json_build_object({row})::text from {table}", self.database)
            numbers = {run_id: f"<run {number}>" for number, run_id in enumerate(self.runs)}
            found[table] = sorted(named(text, numbers) for (text,) in rows)
        return found


def named(text: str, numbers: dict[str, str]) -> str:
    text = re.sub(r"[0-9a-f]{32}", lambda found: numbers.get(found[0], "<id>"), text)
    return re.sub(r"\b[a-z]+-[a-z]+-[0-9]+\b", "<a name>", text)


def run_made(body: bytes) -> str | None:
    try:
        return str(json.loads(body)["run"]["info"]["run_id"])
    except (ValueError, KeyError, TypeError):
        return None


def said(body: bytes) -> str:
    """Return JSON with sorted keys, and with lists sorted if MLflow returns them in any order. Return other text
    unchanged."""
    try:
        return json.dumps(in_order(json.loads(body)), sort_keys=True)
    except ValueError:
        return body.decode("utf-8", "backslashreplace")


def in_order(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: in_order(value) for name, value in found.items()}
    if isinstance(found, list):
        members = [in_order(one) for one in found]
        keyed = all(isinstance(one, dict) and {"key", "dataset"} & one.keys() and "step" not in one for one in members)
        return sorted(members, key=json.dumps) if keyed or is_latest(members) else members
    return found


def is_latest(members: list[Any]) -> bool:
    """Return whether `members` are a run's latest metrics (one per key), and not a metric history."""
    keys = [one.get("key") for one in members if isinstance(one, dict) and "step" in one]
    return len(keys) == len(members) == len(set(map(str, keys)))


@dataclass
class Pair:
    own: Side
    ours: Side
    counted: Path
    pool: ThreadPoolExecutor

    def ask(self, request: Request) -> tuple[Answer, Answer]:
        """Send the request to MLflow and to our server at the same time. Returns MLflow's answer and our answer."""
        own = self.pool.submit(self.own.ask, request)
        ours = self.ours.ask(request)
        return own.result(), ours

    def counts(self) -> Counter[str]:
        """Count our server's responses so far by kind, for example `runs/get answered` or `runs/get passed on`."""
        return Counter(self.counted.read_text().split("\n")) if self.counted.exists() else Counter()


@contextlib.contextmanager
def pair(folder: Path, cluster: PostgreSQL, python: Path, name: str) -> Iterator[Pair]:
    """Start both servers with the interpreter `python`. The servers' databases are empty, and their names end with
    `name`."""
    folder.mkdir(parents=True)
    sides, counted = [], folder / "counted"
    with contextlib.ExitStack() as stack:
        for which in ("own", "ours"):
            database, uds = f"{which}_{name}", folder / f"{which}.sock"
            cluster.execute(f"create database {database}")
            create_schema(cluster.uri(database), str(python))
            environment, command = started(which, cluster.uri(database), uds, counted)
            log = folder / f"{which}.log"
            running = stack.enter_context(process([str(python), *command], log, env=environment, cwd=folder))
            wait_until(uds.exists, running, log)
            sides.append(Side(uds, cluster, database))
        with ThreadPoolExecutor(1) as pool:
            yield Pair(sides[0], sides[1], counted, pool)
        for side in sides:
            side.close()


def started(which: str, uri: str, uds: Path, counted: Path) -> tuple[dict[str, str], list[str]]:
    """Return the environment of a server, and its command without the interpreter."""
    public = {
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_ARTIFACTS_DESTINATION": artifacts_destination(BUCKET, "a-models-bucket", "direct"),
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"{HOST},localhost",
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": f"https://{HOST}",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "PYTHONHASHSEED": "0",  # MLflow's messages contain sets, whose order depends on the hash seed
    }
    private = ("MLFLOW_", "_MLFLOW", "PYTEST")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(private)}
    if which == "ours":
        command = [str(HERE / "counted_server.py"), str(counted), "--socket", str(uds)]
        return inherited | public | {"PYTHONPATH": str(HOST_PACKAGE)}, command
    public["MLFLOW_ARTIFACTS_DESTINATION"] = "artifacts"
    command = ["-m", "uvicorn", "--uds", str(uds), "--no-access-log", "--ws", "none"]
    command += ["--no-proxy-headers", "--timeout-keep-alive", "300"]
    return inherited | public | private_environment(public), [*command, "mlflow.server.fastapi_app:app"]
