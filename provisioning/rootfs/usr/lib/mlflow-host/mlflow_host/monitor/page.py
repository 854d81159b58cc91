"""The page /mlflow-host/ for logged-in users: figures of the last hours and reports, as HTML without JavaScript."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from string import Template

from mlflow_host.backups.last_runs import LastRuns, time_of
from mlflow_host.machine import atomic_file, config, status
from mlflow_host.monitor.history import History, Minute, days_until_full
from mlflow_host.monitor.metrics import read_json

TEMPLATE = Path("/usr/share/mlflow-host/overview.html")
HOURS = 6
"""Number of hours in the plots of requests and latencies. The plot of the data volume shows the whole history."""
WIDTH, HEIGHT = 600, 100
BACKUPS = {"archive": "last log segment", "base": "last base backup", "dump": "last dump"}


@dataclass
class Page:
    """The files from which the page is rendered. The default paths are the paths on the machine."""

    target: Path
    template: Path = TEMPLATE
    run: Path = config.RUN
    data: Path = config.DATA
    facts: Path = config.IMAGE_FACTS

    def write(self, history: History, now: datetime) -> None:
        atomic_file.replace(self.target, self.render(history, now))
        self.target.chmod(0o644)

    def render(self, history: History, now: datetime) -> str:
        facts = read_json(self.facts)
        versions = f"MLflow {facts.get('mlflow_version', '?')}, image {facts.get('image_version', '?')}, "
        versions += f"schema {facts.get('migration_head', '?')}"
        minutes = [each for each in history.minutes if each.at > now.timestamp() // 60 - HOURS * 60]
        sections = [
            requests_of(minutes),
            latencies_of(minutes),
            self.disk(history.minutes),
            self.backups(now),
            self.boot(),
            self.schema_change(now),
            self.removal(),
            users(history, now),
        ]
        return Template(self.template.read_text()).substitute(
            versions=html.escape(versions),
            sections="\n".join(sections),
            now=f"{now:%Y-%m-%d %H:%M} UTC",
        )

    def disk(self, minutes: Sequence[Minute]) -> str:
        room = read_json(self.run / "web/room.json")
        rows = [("used", f"{room['used_percent']:.1f} %, {room['free_mib']:,} MiB left")] if room else []
        days = days_until_full(list(minutes))
        slow = "not filling up" if len(minutes) >= 60 else "not known yet"
        rows.append(("at this rate", f"full in {days:.0f} days" if days is not None else slow))
        plot = chart([each.disk_percent for each in minutes], minutes, "%", most=100.0)
        return section("Data volume", plot + table(rows) + problems([room.get("problem")]))

    def backups(self, now: datetime) -> str:
        runs, found = LastRuns(self.data / "backups"), read_json(self.run / "web/backups.json")
        rows = [(name, age(time_of(runs.read(kind)), now)) for kind, name in BACKUPS.items()]
        return section("Backups", table(rows) + problems(found.get("problems", ())))

    def boot(self) -> str:
        steps = status.read(self.run)["steps"]
        rows = [(each["step"], f"{each['message'] or each['state']} ({each['seconds']:.1f} s)") for each in steps]
        return section("Last boot", table(rows) if rows else paragraph("no step has begun"))

    def schema_change(self, now: datetime) -> str:
        """Render the newest report of a schema change."""
        reports = sorted(path for path in (self.data / "reports").glob("[0-9]*.json"))
        for path in reversed(reports):
            with suppress(OSError, ValueError, KeyError, TypeError):
                found = json.loads(path.read_text())
                rows = [
                    ("what", f"{found['action']} from MLflow {found['from_version'] or '?'} to {found['to_version']}"),
                    ("when", age(datetime.fromisoformat(found["at"]), now)),
                    ("took", f"{sum(found['seconds'].values()):.0f} s"),
                    ("kept", found["kept_database"] or "nothing"),
                ]
                return section("Last change of the schema", table(rows))
        return section("Last change of the schema", paragraph("none on this data volume"))

    def removal(self) -> str:
        found = read_json(self.data / "reports/garbage.json")
        rows = [("at", str(found["at"])), ("result", str(found["summary"]))] if found else []
        return section("Last removal of deleted items", table(rows) if rows else paragraph("nothing removed yet"))


def requests_of(minutes: Sequence[Minute]) -> str:
    per_second = [each.requests / 60 for each in minutes]
    total, errors = sum(each.requests for each in minutes), sum(each.errors for each in minutes)
    rows = [("in these hours", f"{total:,} requests"), ("status 500 or above", f"{errors:,}")]
    return section(f"Requests per second, last {HOURS} hours", chart(per_second, minutes, "/s") + table(rows))


def latencies_of(minutes: Sequence[Minute]) -> str:
    busy = [each for each in minutes if each.requests]
    plot = chart([each.slow_ms for each in minutes], minutes, "ms", [each.median_ms for each in minutes])
    last = f"{busy[-1].median_ms:g} ms, {busy[-1].slow_ms:g} ms" if busy else "no request"
    return section(f"Latency, last {HOURS} hours", plot + table([("last median, 95th percentile", last)]))


def users(history: History, now: datetime) -> str:
    latest = sorted(history.seen.items(), key=lambda each: each[1], reverse=True)
    rows = [(name, age(datetime.fromisoformat(at), now)) for name, at in latest]
    return section("Users last seen", table(rows) if rows else paragraph("nobody yet"))


def chart(
    values: Sequence[float],
    minutes: Sequence[Minute],
    unit: str,
    others: Sequence[float] = (),
    most: float | None = None,
) -> str:
    """An SVG plot over time, with the highest value, the first time and the last time. A missing minute is a gap in the
    line."""
    if not minutes:
        return paragraph("no data yet")
    highest = most if most is not None else max([*values, *others, 1e-9])
    first, last = minutes[0].at, max(minutes[-1].at, minutes[0].at + 1)

    def path(points: Sequence[float]) -> str:
        drawn, before = [], -2
        for minute, value in zip(minutes, points, strict=True):
            x, y = WIDTH * (minute.at - first) / (last - first), HEIGHT * (1 - value / highest)
            drawn.append(f"{'L' if minute.at - before <= 2 else 'M'}{x:.1f} {y:.1f}")
            before = minute.at
        return "".join(drawn)

    second = f'<path class="plot second" d="{path(others)}"/>' if others else ""
    ends = [f"{datetime.fromtimestamp(60 * at, UTC):%H:%M}" for at in (first, minutes[-1].at)]
    return (
        f'<div class="axis"><span>{highest:,.3g} {unit}</span></div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="plot in {unit}">'
        f'<path class="grid" d="M0 0H{WIDTH}M0 {HEIGHT}H{WIDTH}"/>{second}<path class="plot" d="{path(values)}"/></svg>'
        f'<div class="axis"><span>{ends[0]}</span><span>{ends[1]} UTC</span></div>'
    )


def section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def table(rows: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in rows)
    return f"<table>{lines}</table>"


def problems(sentences: Iterable[str | None]) -> str:
    return "".join(f'<p class="bad">{html.escape(each)}</p>' for each in sentences if each)


def paragraph(text: str) -> str:
    return f'<p class="soft">{html.escape(text)}</p>'


def age(at: datetime | None, now: datetime) -> str:
    if at is None:
        return "none yet"
    minutes = max(0, int((now - at) / timedelta(minutes=1)))
    for count, unit in ((minutes // 1440, "days"), (minutes // 60, "hours")):
        if count > 1:
            return f"{count} {unit} ago"
    return f"{minutes} minutes ago"


def used_percent(folder: Path) -> float:
    """Per cent of a file system that is in use. Blocks that are reserved for root are not counted."""
    found = os.statvfs(folder)
    return 100 * (1 - found.f_bavail / (found.f_blocks - found.f_bfree + found.f_bavail))
