"""Metrics for Prometheus: counters of requests from nginx's log, and gauges of the machine, measured at each scrape.

provisioning/README.md lists the names and labels. If a part of the gauges cannot be measured, the scrape lacks the
metrics of this part, and `mlflow_host_collector_success` has the value 0 for this part.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

from mlflow_host.backups.last_runs import LastRuns, time_of
from mlflow_host.machine import config
from mlflow_host.monitor.request_log import Request
from mlflow_host.postgres.cluster import Cluster, connection, in_service

NGINX = Path("/run/nginx/monitor.sock")
SECONDS = 3
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Upper bounds of the buckets in the histogram of request durations, in seconds."""

DURATION = (
    "mlflow_host_request_duration_seconds",
    "Time from a request's first byte to the last byte of its response.",
)

_API = r"/(?:ajax-)?api/[\d.]+/(?:mlflow/)?"
KINDS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in {
        "log_metric": f"{_API}runs/log-metric",
        "log_batch": f"{_API}runs/log-batch",
        "create_run": f"{_API}runs/create",
        "search": rf"{_API}.*(?:search|search-datasets|batchGet\w*)|.*/graphql",
        "history": f"{_API}metrics/.*",
        "artifacts": rf"{_API}(?:mlflow-)?artifacts/.*|/(?:model-versions/)?get-artifact"
        rf"|{_API}(?:upload-artifact|get-trace-artifact|logged-models/.*artifacts/.*)",
        "traces": f"{_API}traces.*|/v1/traces",
        "models": f"{_API}(?:registered-models|model-versions|logged-models).*",
        "runs": f"{_API}runs.*",
        "experiments": f"{_API}experiments.*",
        "gateway": f"/gateway/.*|{_API}gateway.*",
        "other_api": f"{_API}.*",
    }.items()
)
"""A request has the kind of the first pattern that matches its path. If no pattern matches, the kind is `pages`."""

RESTARTED = ("mlflow-server@*", "mlflow-host-postgresql", "nginx", "mlflow-host-archive", "mlflow-host-monitor")
"""Units whose processes systemd restarts."""

STATEMENTS = """
select case when backend_type = 'autovacuum worker' then 'autovacuum'
            when lower(split_part(ltrim(query), ' ', 1)) in ('select', 'insert', 'update', 'delete', 'copy', 'with')
            then lower(split_part(ltrim(query), ' ', 1)) else 'other' end,
       max(extract(epoch from clock_timestamp() - query_start))
from pg_stat_activity
where state = 'active' and pid <> pg_backend_pid() and backend_type in ('client backend', 'autovacuum worker')
group by 1
"""
CONNECTIONS = """
select coalesce(state, 'other'), count(*) from pg_stat_activity where backend_type = 'client backend' group by 1
"""


@lru_cache(maxsize=4096)
def kind_of(path: str) -> str:
    return next((kind for kind, pattern in KINDS if pattern.fullmatch(path)), "pages")


class RequestMetrics:
    """Counters and histograms in a registry. Only one thread updates them."""

    def __init__(self, registry: CollectorRegistry):
        self.requests = Counter(
            "mlflow_host_requests",
            "Requests by kind, status and by what answered: MLflow, this server beside MLflow (direct), or nginx.",
            ("kind", "status", "by"),
            registry=registry,
        )
        self.durations = Durations()
        registry.register(self.durations)
        self.artifacts = Counter(
            "mlflow_host_artifact_bytes",
            "Bytes of artifacts that passed through the server; direct transfers to S3 are not counted.",
            ("direction",),
            registry=registry,
        )
        self.refused = Counter(
            "mlflow_host_logins_refused", "Requests with a user name whose login was refused.", registry=registry
        )
        self.writes = Counter(
            "mlflow_host_audit_lines", "Writes in the audit trail, refused ones included.", registry=registry
        )

    def add(self, requests: Iterable[Request]) -> None:
        counts: dict[tuple[str, str, str], int] = {}
        refused = writes = 0
        for request in requests:
            kind = kind_of(request.path)
            key = kind, str(request.status), request.by or ("mlflow" if request.reached_mlflow else "nginx")
            counts[key] = counts.get(key, 0) + 1
            self.durations.add(kind, request.seconds)
            if kind == "artifacts" and request.status < 300:
                self.artifacts.labels("in").inc(request.bytes_in)
                self.artifacts.labels("out").inc(request.bytes_out)
            refused += bool(request.user) and not request.accepted and request.status in (401, 429)
            writes += request.writes
        for key, count in counts.items():
            self.requests.labels(*key).inc(count)
        self.refused.inc(refused)
        self.writes.inc(writes)


class Durations:
    """Histograms of request durations by kind, which are faster to update than prometheus_client's Histogram."""

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}
        self._seconds: dict[str, float] = {}

    def add(self, kind: str, seconds: float) -> None:
        counts = self._counts.get(kind)
        if counts is None:
            counts = self._counts[kind] = [0] * (len(BUCKETS) + 1)
        counts[bisect_left(BUCKETS, seconds)] += 1
        self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds

    def describe(self) -> list[Metric]:
        return [HistogramMetricFamily(*DURATION, labels=["kind"])]

    def collect(self) -> Iterator[Metric]:
        found = HistogramMetricFamily(*DURATION, labels=["kind"])
        for kind, counts in [*self._counts.items()]:
            bounds = [*map(floatToGoString, BUCKETS), "+Inf"]
            found.add_metric([kind], [*zip(bounds, accumulate(counts), strict=True)], self._seconds.get(kind, 0.0))
        yield found


@dataclass(eq=False)
class Machine:
    """The gauges, which are measured at each scrape. The default paths are the paths on the machine."""

    cluster: Cluster = field(default_factory=in_service)
    nginx: Path = NGINX
    data: Path = config.DATA
    run: Path = config.RUN
    facts: Path = config.IMAGE_FACTS
    memory: Path = Path("/proc/meminfo")
    stat: Path = Path("/proc/stat")
    tmpfs: Path = Path("/run")
    systemctl: str = "/usr/bin/systemctl"
    waiting: Callable[[], int] = lambda: 0
    """Returns the number of files of the audit trail that are not uploaded to the bucket."""
    processes: int = 0

    def collect(self) -> Iterator[Metric]:
        success = gauge("collector_success", "Whether a part of these metrics was measured.", "collector")
        for part in (self.versions, self.requests, self.load, self.postgresql, self.space, self.upkeep, self.restarts):
            try:
                found = [*part()]
            except Exception as error:  # after a failed part, the next part is measured
                print(f"mlflow-host: {part.__name__} is not measured: {error}", file=sys.stderr, flush=True)
                found = []
                success.add_metric([part.__name__], 0)
            else:
                success.add_metric([part.__name__], 1)
            yield from found
        yield success

    def versions(self) -> Iterator[Metric]:
        facts = json.loads(self.facts.read_text())
        names = ("mlflow_version", "image_version", "migration_head", "postgresql_major", "python_version")
        versions = InfoMetricFamily("mlflow_host", "Versions in the image; its schema is that of the database.")
        versions.add_metric([], {name: str(facts[name]) for name in names if name in facts})
        yield versions

    def requests(self) -> Iterator[Metric]:
        told = ask(self.nginx, "/requests").decode()
        found = re.search(r"Writing: (\d+)", told)
        if found is None:
            raise ValueError(f"nginx reports {told!r}")
        yield single("requests_in_flight", "Requests that nginx is handling.", int(found[1]) - 1)  # without this one

    def load(self) -> Iterator[Metric]:
        waiting = gauge("requests_waiting", "Requests that wait for a thread of a server process.", "process", "kind")
        threads = gauge("request_threads", "Threads of a server process.", "process", "kind")
        used = gauge("pool_connections_used", "Database connections that a process's requests hold.", "process")
        for number in range(1, self.processes + 1):
            report = json.loads(ask(self.nginx, f"/processes/{number}"))
            for kind, count in report["waiting"].items():
                waiting.add_metric([str(number), kind], count)
                threads.add_metric([str(number), kind], report["threads"][kind])
            if report["connections"] is not None:
                used.add_metric([str(number)], report["connections"])
        yield from (waiting, threads, used)

    def postgresql(self) -> Iterator[Metric]:
        connections = gauge("postgresql_connections", "Connections of clients.", "state")
        statements = gauge("postgresql_longest_statement_seconds", "Age of the oldest running statement.", "statement")
        with connection(self.cluster, self.cluster.database, autocommit=True) as opened, opened.cursor() as cursor:
            cursor.execute("set statement_timeout = '3s'")
            cursor.execute(CONNECTIONS)
            for state, count in cursor.fetchall():
                connections.add_metric([state], count)
            cursor.execute(STATEMENTS)
            for statement, seconds in cursor.fetchall():
                statements.add_metric([statement], max(0.0, float(seconds)))
            cursor.execute("select pg_database_size(current_database()), (select count(*) from pg_replication_slots)")
            size, slots = cursor.fetchone()
        yield from (connections, statements)
        yield single("postgresql_database_size_bytes", "Size of MLflow's database.", size)
        yield single("postgresql_replication_slots", "Replication slots; this server needs none.", slots)

    def space(self) -> Iterator[Metric]:
        size = gauge("filesystem_size_bytes", "Size of a file system, without root's reserve.", "mountpoint")
        free = gauge("filesystem_free_bytes", "Free space of a file system.", "mountpoint")
        for mount in (Path("/"), self.data, self.tmpfs):
            found = os.statvfs(mount)
            size.add_metric([str(mount)], (found.f_blocks - found.f_bfree + found.f_bavail) * found.f_frsize)
            free.add_metric([str(mount)], found.f_bavail * found.f_frsize)
        yield from (size, free)
        lines = dict(line.split(":", 1) for line in self.memory.read_text().splitlines())
        total, available = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
        yield single("memory_total_bytes", "Memory of the machine.", total)
        yield single("memory_available_bytes", "Memory that is free or can be freed.", available)

    def upkeep(self) -> Iterator[Metric]:
        now = datetime.now(UTC)
        ages = gauge("backup_age_seconds", "Time since the last backup of a kind.", "backup")
        for kind in ("archive", "base", "dump"):
            if at := time_of(LastRuns(self.data / "backups").read(kind)):
                ages.add_metric([kind], (now - at).total_seconds())
        yield ages
        yield single(
            "backup_problems", "Late backups.", len(read_json(self.run / "web/backups.json").get("problems", []))
        )
        yield single(
            "writes_refused",
            "1 while the data volume is too full for writes.",
            read_json(self.run / "web/room.json").get("refusing", False),
        )
        yield single("audit_files_waiting", "Files of the audit trail that are not in the bucket yet.", self.waiting())
        removal = gauge("housekeeping_age_seconds", "Time since deleted items were last removed.")
        if at := time_of(read_json(self.data / "reports/garbage.json")):
            removal.add_metric([], (now - at).total_seconds())
        yield removal

    def restarts(self) -> Iterator[Metric]:
        show = [self.systemctl, "show", "--property=Id,NRestarts", *RESTARTED]
        told = subprocess.run(show, capture_output=True, text=True, timeout=SECONDS, check=True).stdout
        counted = CounterMetricFamily(
            "mlflow_host_unit_restarts", "Restarts by systemd after a process ended or hung.", labels=["unit"]
        )
        for unit in told.strip().split("\n\n"):
            properties = dict(line.split("=", 1) for line in unit.splitlines())
            counted.add_metric([properties["Id"].removesuffix(".service")], int(properties["NRestarts"]))
        yield counted
        (booted,) = (line for line in self.stat.read_text().splitlines() if line.startswith("btime "))
        yield single("boot_time_seconds", "Unix time of the machine's boot.", int(booted.split()[1]))


def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"mlflow_host_{name}", text, labels=labels)


def single(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"mlflow_host_{name}", text, value=float(value))


def read_json(path: Path) -> dict[str, Any]:
    """Read a report. Returns {} if the file is missing or invalid."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path):
        super().__init__("localhost", timeout=SECONDS)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(SECONDS)
        self.sock.connect(str(self.path))


def ask(path: Path, target: str) -> bytes:
    """Send a GET request to a Unix socket, and return the body. Raises OSError if the status is not 200."""
    opened = _UnixConnection(path)
    try:
        opened.request("GET", target)
        answer = opened.getresponse()
        body = answer.read()
    except http.client.HTTPException as error:
        raise OSError(f"{path} answers {target} with {type(error).__name__}") from None
    finally:
        opened.close()
    if answer.status != 200:
        raise OSError(f"{path} answers {target} with status {answer.status}")
    return body
