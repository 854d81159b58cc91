"""Clients that send each request directly after the previous response, and the operations that the clients request."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scripts.interrupts import uninterrupted

TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Target:
    """A contender's address, as (host, port) or as the path of a Unix socket, and the headers of each request."""

    address: tuple[str, int] | str
    host: str = "localhost"
    headers: tuple[str, ...] = ()
    authority: str = ""
    """File of the CA certificate for HTTPS; "" for plain HTTP."""
    logins: tuple[str, ...] = ()
    """The Authorization headers of additional users: client n logs in as user n. If `logins` is empty, all clients use
    the login in `headers`."""

    def of_client(self, number: int) -> Target:
        if not self.logins:
            return self
        others = tuple(line for line in self.headers if not line.startswith("Authorization:"))
        return replace(self, headers=(*others, self.logins[number % len(self.logins)]))


@dataclass(frozen=True)
class Dataset:
    """The IDs of the initial data in every contender's database (see `seed.py`)."""

    empty_experiment: str
    small_experiment: str
    large_experiment: str
    runs: tuple[str, ...]
    history_run: str


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    body: bytes = b""


Requests = Iterator[Request]
Operation = Callable[[Dataset, int], Requests]
"""Endless requests of client n."""


@dataclass
class Measured:
    """The results of one operation in one turn: errors, and the latencies of correct responses in seconds."""

    seconds: float
    latencies: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        return len(self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        """Return the latency in milliseconds, or infinity if there was no correct response."""
        ordered = sorted(self.latencies)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("inf")


def api(path: str, body: Any = None) -> Request:
    if body is None:
        return Request("GET", f"/api/2.0/mlflow/{path}")
    return Request("POST", f"/api/2.0/mlflow/{path}", json.dumps(body).encode())


def log_batch(count: int) -> Operation:
    """Return an operation that logs `count` metrics per request, with new steps. Each client logs to its own run."""

    def requests(data: Dataset, client: int) -> Requests:
        run = data.runs[client % len(data.runs)]
        for turn in itertools.count(random.randrange(10**9)):
            metrics = [
                {"key": f"m{n % 10}", "value": n / 7, "timestamp": 1_700_000_000_000 + n, "step": turn * count + n}
                for n in range(count)
            ]
            yield api("runs/log-batch", {"run_id": run, "metrics": metrics})

    return requests


def log_metric(data: Dataset, client: int) -> Requests:
    run = data.runs[client % len(data.runs)]
    for step in itertools.count(random.randrange(10**9)):
        yield api(
            "runs/log-metric",
            {"run_id": run, "key": "loss", "value": step / 7, "timestamp": 1_700_000_000_000 + step, "step": step},
        )


def create_run(data: Dataset, client: int) -> Requests:
    tags = [{"key": "mlflow.user", "value": "ada"}, {"key": "mlflow.source.name", "value": "train.py"}]
    for number in itertools.count():
        body = {"experiment_id": data.empty_experiment, "start_time": 1_700_000_000_000 + number, "tags": tags}
        yield api("runs/create", {**body, "run_name": f"run-{client}-{number}"})


def get_run(data: Dataset, client: int) -> Requests:
    for number in itertools.count(client):
        yield api(f"runs/get?run_id={data.runs[number % len(data.runs)]}")


def search(experiment: str) -> Operation:
    """The search request of an experiment's page: a hundred runs, best metric first."""

    def requests(data: Dataset, client: int) -> Requests:
        where = {"experiment_ids": [getattr(data, experiment)], "max_results": 100}
        while True:
            yield api("runs/search", {**where, "filter": "metrics.m1 > 0.1", "order_by": ["metrics.m1 DESC"]})

    return requests


def history(data: Dataset, client: int) -> Requests:
    while True:
        yield api(f"metrics/get-history?run_id={data.history_run}&metric_key=loss&max_results=25000")


OPERATIONS: dict[str, Operation] = {
    "log-batch, 1 metric": log_batch(1),
    "log-batch, 100 metrics": log_batch(100),
    "log-batch, 1,000 metrics": log_batch(1000),
    "log-metric": log_metric,
    "create run": create_run,
    "get run": get_run,
    "search in 1,000 runs": search("small_experiment"),
    "search in 20,000 runs": search("large_experiment"),
    "history of 10,000 steps": history,
}

IN_TURN = "every operation in turn"


def in_turn(data: Dataset, client: int) -> Requests:
    """Yield requests of all operations in turn. Each client begins with a different operation."""
    kinds = [operation(data, client) for operation in OPERATIONS.values()]
    for number in itertools.count(client):
        yield next(kinds[number % len(kinds)])


class Connection:
    """A keep-alive connection of one client. MLflow's client also uses such a connection. A closed connection is opened
    again."""

    def __init__(self, target: Target):
        self.target = target
        self.tls = ssl.create_default_context(cafile=target.authority) if target.authority else None
        self.socket: socket.socket | None = None
        self.buffer = b""
        self.head = "".join(f"{line}\r\n" for line in (f"Host: {target.host}", *target.headers))

    def ask(self, request: Request) -> tuple[int, bytes]:
        """Status and body. Raises OSError."""
        head = f"{request.method} {request.path} HTTP/1.1\r\n{self.head}Content-Length: {len(request.body)}\r\n"
        message = head.encode() + b"Content-Type: application/json\r\n\r\n" + request.body
        if self.socket is None:
            self.open()
        assert self.socket
        try:
            self.socket.sendall(message)
            return self.answer()
        except OSError:
            self.close()
            raise

    def open(self) -> None:
        family = socket.AF_UNIX if isinstance(self.target.address, str) else socket.AF_INET
        self.socket = socket.socket(family)
        self.socket.settimeout(TIMEOUT_SECONDS)
        self.socket.connect(self.target.address)
        if family == socket.AF_INET:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.tls:
            self.socket = self.tls.wrap_socket(self.socket, server_hostname=self.target.host)
        self.buffer = b""

    def close(self) -> None:
        if self.socket:
            self.socket.close()
        self.socket = None

    def answer(self) -> tuple[int, bytes]:
        while (end := self.buffer.find(b"\r\n\r\n")) < 0:
            self.more()
        head, self.buffer = self.buffer[:end], self.buffer[end + 4 :]
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        body = (
            self.chunks()
            if headers.get("transfer-encoding") == "chunked"
            else self.exactly(int(headers.get("content-length", 0)))
        )
        if headers.get("connection", "").lower() == "close":
            self.close()
        return int(lines[0].split()[1]), body

    def chunks(self) -> bytes:
        found = []
        while True:
            while (end := self.buffer.find(b"\r\n")) < 0:
                self.more()
            size, self.buffer = int(self.buffer[:end], 16), self.buffer[end + 2 :]
            found.append(self.exactly(size))
            self.exactly(2)
            if not size:
                return b"".join(found)

    def exactly(self, size: int) -> bytes:
        parts, missing = [self.buffer], size - len(self.buffer)
        while missing > 0:
            parts.append(self.receive())
            missing -= len(parts[-1])
        whole = b"".join(parts)
        self.buffer = whole[size:]
        return whole[:size]

    def more(self) -> None:
        self.buffer += self.receive()

    def receive(self) -> bytes:
        assert self.socket
        if not (received := self.socket.recv(2**18)):
            raise ConnectionResetError("connection closed before the answer was complete")
        return received


def run(target: Target, operation: str, data: Dataset, clients: int, seconds: float) -> Measured:
    """Run `clients` clients for `seconds` seconds in a separate process."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    worker = multiprocessing.Process(target=_clients, args=(sender, target, operation, data, clients, seconds))
    worker.start()
    sender.close()
    try:
        measured: Measured = receiver.recv()
    finally:
        worker.join()
    return measured


@uninterrupted()  # the process ignores Ctrl-C; its parent process ends the benchmark after this measurement
def _clients(sender: Any, target: Target, operation: str, data: Dataset, clients: int, seconds: float) -> None:
    measured = Measured(seconds)
    begin = threading.Barrier(clients + 1)
    deadline = [0.0]

    def client(number: int) -> None:
        connection, requests = (
            Connection(target.of_client(number)),
            (OPERATIONS | {IN_TURN: in_turn})[operation](data, number),
        )
        begin.wait()
        while (started := time.monotonic()) < deadline[0]:
            try:
                status, body = connection.ask(next(requests))
                if status == 200:
                    measured.latencies.append(time.monotonic() - started)
                else:
                    measured.errors.append(f"{status} {body[:200].decode(errors='replace')}")
            except OSError as error:
                measured.errors.append(f"{type(error).__name__}: {error}")
        connection.close()

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    deadline[0] = time.monotonic() + seconds
    started = time.monotonic()
    begin.wait()
    for thread in threads:
        thread.join()
    measured.seconds = max(seconds, time.monotonic() - started)
    sender.send(measured)


def cpu_seconds(pids: list[int]) -> float:
    """Return the processor time that the processes have used, in seconds."""
    total = 0.0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / 100
    return total
