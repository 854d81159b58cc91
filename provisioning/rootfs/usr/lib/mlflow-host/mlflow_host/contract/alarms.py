"""The metrics that a machine sends to CloudWatch, the stack's alarms on these metrics, and the dashboard's plots.

CloudWatch charges per metric and per alarm, so the machine sends only the metrics that alarms or the dashboard use.
Every stack has its own namespace. Only the metric `DISK_USED` has a dimension, the ID of the data volume.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

WARN_PERCENT, RELENT_PERCENT, REFUSE_PERCENT = 90, 95, 97
"""Used share of the data volume. The alarm `data-volume-full` is on from WARN_PERCENT. From REFUSE_PERCENT, nginx
refuses writes until less than RELENT_PERCENT is used."""

DISK_USED = "DiskUsedPercent"
VOLUME = "VolumeId"
"""Dimension of DISK_USED."""


@dataclass(frozen=True)
class Alarm:
    """An alarm on one metric. The alarm is on if `statistic` of the metric breaches the threshold in `periods`
    consecutive periods of `period_seconds`."""

    name: str
    """The alarm's name in the setting `alarms` and in the launch document, and the name of its Pulumi resource."""
    metric: str
    unit: str
    """CloudWatch's unit."""
    statistic: str
    comparison: str
    threshold: float
    period_seconds: int
    periods: int
    says: str
    """The alarm's message: the fault and the remedy. `{title}` is replaced by the stack's name."""
    missing: str = "missing"
    """How CloudWatch treats a period without data. Only the alarm SERVER_DOWN treats missing data as a breach. The
    machine sends all metrics in one call, so missing data affects every alarm, and one message is enough."""


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
        f"The data volume of {{title}} is at least {WARN_PERCENT} % full. At {REFUSE_PERCENT} % the server refuses "
        "writes. Enlarge the volume (the setting dataVolumeGib).",
    ),
    Alarm(
        *("backups-late", "BackupProblems", "Count", "Minimum", "GreaterThanOrEqualToThreshold", 1, 60, 1),
        "A backup of {title} is late: the archive of the write-ahead log, the base backup or the dump. The page "
        "/mlflow-host/backups.json of the server names the late backup and the remedy.",
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
"""The alarm on EC2's status check. The alarm reboots the instance, and needs no metric from the machine."""
OF_OLDER_IMAGES = ("data-volume-full",)
"""Alarms whose metrics are sent even by images that do not support `monitoring.alarms` in the launch document."""
SINCE = 5
"""The revision of the launch document that added the key `monitoring.alarms`."""


REQUESTS, MEDIAN, SLOW = "RequestsPerSecond", "LatencyMedian", "LatencyPercentile95"


@dataclass(frozen=True)
class Plot:
    """A plot of the dashboard. The page /mlflow-host/ has the same plots of requests, latency and disk."""

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
    """The metrics of the named alarms. With `dashboard`, the metrics of the dashboard's plots are added."""
    watched = {alarm.metric for alarm in ALARMS if alarm.name in set(names)}
    return watched | {metric for plot in PLOTS if dashboard for metric in plot.metrics}


def fed_by(launch_revision: int) -> tuple[str, ...]:
    """The alarms whose metrics are sent by an image with the given launch revision."""
    return NAMES if launch_revision >= SINCE else OF_OLDER_IMAGES


def namespace(stack: str) -> str:
    """CloudWatch namespace of the stack. The role of a stack may send metrics only to the namespace of its stack."""
    return f"mlflow-ami/{stack}"
