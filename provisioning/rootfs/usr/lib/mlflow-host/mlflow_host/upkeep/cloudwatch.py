"""Timer `mlflow-host-metrics`: send the metrics of the stack's alarms and dashboard to CloudWatch, once a minute.

A failed call to CloudWatch is logged and not repeated. The timer's next run measures and sends new values.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from urllib.parse import urlencode

from mlflow_host.contract import alarms
from mlflow_host.contract.launch import LaunchDocument
from mlflow_host.machine import aws, config
from mlflow_host.upkeep import metrics


def main() -> int:
    document = config.load().launch
    wanted = alarms.metrics(document.monitoring.alarms, document.monitoring.dashboard)
    if not wanted:
        print("the stack has no alarm and no dashboard, so no metric is measured")
        return 0
    found = metrics.measured(wanted)
    if not found:
        print("no metric can be measured yet")
        return 0
    try:
        put(document, found, aws.role_keys(), datetime.now(UTC))
    except (aws.NoRole, aws.ServiceUnreachable, aws.ServiceError) as error:
        print(
            f"mlflow-host: {', '.join(sorted(found))} were not sent to CloudWatch: {error}; the role must allow "
            "cloudwatch:PutMetricData, and the machine must reach CloudWatch (the setting monitoringEndpoint)",
            file=sys.stderr,
        )
        return 2
    return 0


def put(document: LaunchDocument, found: Mapping[str, float], keys: aws.Keys, now: datetime) -> None:
    """Send all values in `found` with one call. The keys of `found` are the names of the metrics.

    Raises aws.ServiceUnreachable or aws.ServiceError."""
    body = {
        "Action": "PutMetricData",
        "Version": "2010-08-01",
        "Namespace": alarms.namespace(document.stack.name),
    }
    for number, (name, value) in enumerate(sorted(found.items()), 1):
        datum = {
            "MetricName": name,
            "Unit": alarms.UNITS[name],
            "Value": str(value),
            "Timestamp": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        if name == alarms.DISK_USED:
            datum |= {"Dimensions.member.1.Name": alarms.VOLUME, "Dimensions.member.1.Value": document.data_volume.id}
        body |= {f"MetricData.member.{number}.{key}": text for key, text in datum.items()}
    aws.call_query_api(document, "monitoring", document.endpoints.monitoring, urlencode(body).encode(), keys, now)


if __name__ == "__main__":
    raise SystemExit(main())
