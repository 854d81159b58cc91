"""Evaluate CloudWatch alarms, because moto stores alarms but never changes their state.

Like CloudWatch, this module compares the alarm's statistic in each of the last periods with the threshold. The alarm's
setting TreatMissingData applies to periods without data. A change of state is published to the alarm's SNS topics.
Composite alarms and alarms on anomalies, percentiles or expressions are not evaluated.
"""

from __future__ import annotations

import json
import operator
from datetime import datetime, timedelta
from typing import Any

from moto.cloudwatch.models import Alarm, CloudWatchBackend, cloudwatch_backends
from moto.core.utils import utcnow
from moto.sns.models import sns_backends

from scripts.local_cloud.layout import ACCOUNT

COMPARISONS = {
    "GreaterThanOrEqualToThreshold": operator.ge,
    "GreaterThanThreshold": operator.gt,
    "LessThanThreshold": operator.lt,
    "LessThanOrEqualToThreshold": operator.le,
}
STATISTICS = ("SampleCount", "Average", "Sum", "Minimum", "Maximum")


def settle() -> bool:
    """Update every alarm's state from its metric. Returns whether a state changed. The caller holds the API lock."""
    regions: Any = cloudwatch_backends[ACCOUNT]
    changed = False
    for backend in list(regions.values()):
        for alarm in list(backend.alarms.values()):
            if alarm.statistic in STATISTICS and alarm.comparison_operator in COMPARISONS:
                values = recent(backend, alarm, utcnow())
                state = state_of(alarm, values)
                if state != alarm.state_value:
                    turn(alarm, state, values)
                    changed = True
    return changed


def recent(backend: CloudWatchBackend, alarm: Alarm, now: datetime) -> list[float | None]:
    """Return the alarm's statistic over each evaluated period, newest first; None for a period without data."""
    period = timedelta(seconds=int(alarm.period))
    dimensions: Any = [{"Name": each.name, "Value": each.value} for each in alarm.dimensions]
    found: list[float | None] = []
    for index in range(int(alarm.evaluation_periods)):
        end = now - index * period + timedelta(seconds=1)  # include data of the current second
        start = end - period
        points = backend.get_metric_statistics(
            alarm.namespace, alarm.metric_name, start, end, 2 * int(alarm.period), [alarm.statistic], dimensions
        )
        value = points[0].get_statistics_for_type(alarm.statistic) if points else None
        found.append(None if value is None else float(value))
    return found


def state_of(alarm: Alarm, values: list[float | None]) -> str:
    """Return the alarm's state for the values of the last periods."""
    missing = alarm.treat_missing_data or "missing"
    known = [value for value in values if value is not None]
    if not known and missing in ("missing", "ignore"):
        return "INSUFFICIENT_DATA" if missing == "missing" else str(alarm.state_value)
    breaching = sum(COMPARISONS[alarm.comparison_operator](value, float(alarm.threshold)) for value in known)
    if missing == "breaching":
        breaching += len(values) - len(known)
    wanted = int(alarm.datapoints_to_alarm or alarm.evaluation_periods)
    if missing in ("missing", "ignore"):
        wanted = min(wanted, len(known))
    return "ALARM" if breaching >= wanted else "OK"


def turn(alarm: Alarm, state: str, values: list[float | None]) -> None:
    """Change the alarm's state and publish the change to the SNS topics that the alarm has for the new state."""
    before = alarm.state_value
    reason = f"{alarm.metric_name}: {', '.join(map(str, values))}; the threshold is {alarm.threshold}"
    alarm.update_state(reason, "{}", state)
    topics = {"ALARM": alarm.alarm_actions, "OK": alarm.ok_actions}.get(state, alarm.insufficient_data_actions)
    told = {
        "AlarmName": alarm.name,
        "AlarmDescription": alarm.description,
        "OldStateValue": before,
        "NewStateValue": state,
        "NewStateReason": reason,
    }
    for arn in (topics or []) if alarm.actions_enabled else []:
        notifying = sns_backends[ACCOUNT][alarm.region_name]
        if arn in notifying.topics:
            notifying.publish(json.dumps(told), arn=arn, subject=f'{state}: "{alarm.name}"')
