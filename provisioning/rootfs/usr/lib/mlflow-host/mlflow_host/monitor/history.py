"""The history of the last 24 hours per minute, for the page /mlflow-host/: requests, latencies, errors, use of the data
volume, and each user's last request. The history is stored in a file, so it survives a restart."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mlflow_host.machine import atomic_file
from mlflow_host.monitor.metrics import kind_of
from mlflow_host.monitor.request_log import Request

MINUTES = 24 * 60
USERS = 200
WITHOUT_LATENCY = ("artifacts", "gateway", "pages")
"""Latencies do not include requests of these kinds, whose duration depends on a transfer, a model or a disk."""


class Minute(NamedTuple):
    at: int
    """Start of the minute, in minutes since the epoch."""
    requests: int
    errors: int
    """Number of responses with status 500 or above."""
    median_ms: float
    slow_ms: float
    """95th percentile."""
    disk_percent: float


@dataclass
class History:
    file: Path
    minutes: list[Minute] = field(default_factory=list)
    seen: dict[str, str] = field(default_factory=dict)
    """Time of the last request with a valid login, by user name."""
    _requests: int = 0
    _errors: int = 0
    _milliseconds: list[float] = field(default_factory=list)

    @classmethod
    def load(cls, file: Path) -> History:
        """Read the history. If the file is missing or unreadable, return an empty history."""
        try:
            raw: dict[str, Any] = json.loads(file.read_text())
            return cls(file, [Minute(*each) for each in raw["minutes"]], dict(raw["seen"]))
        except (OSError, ValueError, TypeError, KeyError):
            return cls(file)

    def add(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self._requests += 1
            self._errors += request.status >= 500
            if request.reached_mlflow and kind_of(request.path) not in WITHOUT_LATENCY:
                self._milliseconds.append(1000 * request.seconds)
            if request.accepted and request.user:
                self.seen[request.user] = request.time

    def end_minute(self, at: int, disk_percent: float) -> None:
        """Add the figures of the minute `at` to the history, and write the file."""
        ordered = sorted(self._milliseconds)
        median, slow = (round(ordered[int(share * len(ordered))], 1) if ordered else 0.0 for share in (0.5, 0.95))
        made = Minute(at, self._requests, self._errors, median, slow, round(disk_percent, 2))
        self.minutes = [each for each in self.minutes if at - MINUTES < each.at < at] + [made]
        self.seen = dict(sorted(self.seen.items(), key=lambda each: each[1], reverse=True)[:USERS])
        self._requests, self._errors, self._milliseconds = 0, 0, []
        atomic_file.replace(self.file, json.dumps({"minutes": self.minutes, "seen": self.seen}) + "\n")


def days_until_full(minutes: list[Minute]) -> float | None:
    """Days until the data volume is full, extrapolated from the given minutes (least squares). None if the used share
    of the volume does not grow, or if fewer than 60 minutes are given."""
    if len(minutes) < 60:
        return None
    count = len(minutes)
    mean_at = sum(each.at for each in minutes) / count
    mean_use = sum(each.disk_percent for each in minutes) / count
    spread = sum((each.at - mean_at) ** 2 for each in minutes)
    slope = sum((each.at - mean_at) * (each.disk_percent - mean_use) for each in minutes) / spread
    if slope * MINUTES < 0.01:  # per cent per day
        return None
    return max(0.0, (100 - minutes[-1].disk_percent) / (slope * MINUTES))
