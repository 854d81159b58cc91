"""The metrics that a machine sends to CloudWatch, the stack's alarms on them, and the plots of its dashboard.

CloudWatch charges per metric and per alarm, so the machine sends the metrics of the stack's alarms and dashboard only.
The namespace is the stack's own; `DISK_USED` has the data volume's ID as its dimension, the others have none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

WARN_PERCENT, RELENT_PERCENT, REFUSE_PERCENT = 90, 95, 97
"""Use of the data volume: the alarm is on from WARN; writes are refused from REFUSE until it is below RELENT."""

DISK_USED = "DiskUsedPercent"
VOLUME = "VolumeId"
"""Dimension of DISK_USED."""


@dataclass(frozen=True)
class Alarm:
    """An alarm on one metric. It is on when `statistic` of the metric breaches the threshold in `periods` periods of
    `period_seconds` in a row."""

    name: str
    """The alarm's name in the setting `alarms`, in the launch document and as a Pulumi resource."""
    metric: str
    unit: str
    """CloudWatch's unit."""
    statistic: str
    comparison: str
    threshold: float
    period_seconds: int
    periods: int
    says: str
    """The fault and the remedy; `{title}` is the stack's name."""
    missing: str = "missing"
    """Meaning of a period without data. Only SERVER_DOWN counts it as a breach: the machine sends all metrics in one
    call, so without data that alarm is on, and one message is enough."""


SERVER_DOWN = Alarm(
    *("server-down", "ServerAnswers", "Count", "Maximum", "LessThanThreshold", 1, 60, 3),
    "{title} has answered no query through nginx, MLflow and PostgreSQL for three minutes. Look at the machine with "
    "Session Manager: systemctl --failed.",
    missing="breaching",
)
ALARMS = (
    SERVER_DOWN,
    Alarm(
        *("data-volume-full", DISK_USED, "Percent", "Maximum", "GreaterThanOrEqualToThreshold", WARN_PERCENT, 300, 1),
        f"The data volume of {{title}} is {WARN_PERCENT} % full or more; from {REFUSE_PERCENT} % on the server refuses "
        "writes. Enlarge it (the setting dataVolumeGib).",
    ),
    Alarm(
        *("backups-late", "BackupProblems", "Count", "Minimum", "GreaterThanOrEqualToThreshold", 1, 60, 1),
        "A backup of {title} is late: the archive of the write-ahead log, the base backup or the dump. The page "
        "/mlflow-host/backups.json of the server names it and the remedy.",
    ),
    Alarm(
        *("memory-full", "MemoryUsedPercent", "Percent", "Minimum", "GreaterThanOrEqualToThreshold", 95, 300, 2),
        "The memory of {title} has been 95 % full for ten minutes. Choose a larger instanceType.",
    ),
    Alarm(
        *("server-errors", "ServerErrorPercent", "Percent", "Average", "GreaterThanOrEqualToThreshold", 5, 300, 1),
        "Of the requests to {title}, 5 % or more ended with a status of 500 or above in the last five minutes. Their "
        "reasons are in the journal: journalctl -u 'mlflow-server@*'.",
    ),
    Alarm(
        *("certificate-ends", "CertificateDaysLeft", "Count", "Maximum", "LessThanThreshold", 14, 300, 1),
        "The certificate of {title} ends within 14 days, so its renewal fails: journalctl -u mlflow-host-certificates.",
    ),
    Alarm(
        *("unit-failed", "FailedUnits", "Count", "Minimum", "GreaterThanOrEqualToThreshold", 1, 300, 1),
        "A systemd unit of {title} has failed: systemctl --failed.",
    ),
)
NAMES = tuple(alarm.name for alarm in ALARMS)
STATUS_CHECK = "status-check"
"""The alarm on EC2's check of the instance, which reboots it. The machine sends nothing for it."""
OF_OLDER_IMAGES = ("data-volume-full",)
"""Alarms whose metric is sent by an image that does not know the launch document's `monitoring.alarms`."""
SINCE = 5
"""The launch document's revision of that key."""


REQUESTS, MEDIAN, SLOW = "RequestsPerSecond", "LatencyMedian", "LatencyPercentile95"


@dataclass(frozen=True)
class Plot:
    """A plot of the dashboard. Those of requests, latency and disk are those of the page /mlflow-host/."""

    title: str
    metrics: tuple[str, ...]


PLOTS = (
    Plot("Requests per second", (REQUESTS,)),
    Plot("Latency in milliseconds: 95th percentile and median", (SLOW, MEDIAN)),
    Plot("Responses with a status of 500 or above, per cent", ("ServerErrorPercent",)),
    Plot("Data volume, per cent used", (DISK_USED,)),
)
UNITS = {
    **{alarm.metric: alarm.unit for alarm in ALARMS},
    REQUESTS: "Count/Second",
    MEDIAN: "Milliseconds",
    SLOW: "Milliseconds",
}
"""CloudWatch's unit of each metric."""


def metrics(names: Iterable[str], dashboard: bool) -> set[str]:
    """The metrics that the named alarms watch and, if `dashboard`, those that the dashboard plots."""
    watched = {alarm.metric for alarm in ALARMS if alarm.name in set(names)}
    return watched | {metric for plot in PLOTS if dashboard for metric in plot.metrics}


def fed_by(launch_revision: int) -> tuple[str, ...]:
    """The alarms whose metrics an image of that launch revision sends."""
    return NAMES if launch_revision >= SINCE else OF_OLDER_IMAGES


def namespace(stack: str) -> str:
    """CloudWatch namespace of the stack. Each stack has its own, so that its role's permission can be limited to it."""
    return f"mlflow-ami/{stack}"
