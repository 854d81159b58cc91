"""Run by a timer: tells CloudWatch how full the data volume is, as the room check (`mlflow_host.room`) found it.

The stack's alarm watches the metric; it imports the names from here, so this needs nothing but the standard library.
Nothing depends on CloudWatch: what cannot be told now is told the next time.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from urllib.parse import urlencode

from mlflow_host import aws
from mlflow_host.launch import LaunchDocument

DISK_USED = "DiskUsedPercent"
VOLUME = "VolumeId"
"""The metric's dimension."""
PERIOD_SECONDS = 300
"""How often it is told, which is what CloudWatch charges for."""


def namespace(stack: str) -> str:
    """A stack's own, so that its role can be limited to it."""
    return f"mlflow-ami/{stack}"


def main() -> int:
    from mlflow_host import config

    document = config.load().launch
    try:
        used = float(json.loads((config.RUN / "web" / "room.json").read_text())["used_percent"])
        put(document, used, aws.role_keys(), datetime.now(UTC))
    except FileNotFoundError:
        print("the room check has not looked yet")
    except (aws.NoRole, aws.Unreachable, aws.Refused) as error:
        print(
            f"mlflow-host: CloudWatch was not told how full the data volume is: {error}; the role must allow "
            "cloudwatch:PutMetricData, and the machine must reach CloudWatch (the setting monitoringEndpoint)",
            file=sys.stderr,
        )
        return 2
    return 0


def put(document: LaunchDocument, used: float, keys: aws.Keys, now: datetime) -> None:
    """Raises aws.Unreachable or aws.Refused."""
    datum = {
        "MetricName": DISK_USED,
        "Dimensions.member.1.Name": VOLUME,
        "Dimensions.member.1.Value": document.data_volume.id,
        "Unit": "Percent",
        "Value": str(used),
        "Timestamp": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    body = {
        "Action": "PutMetricData",
        "Version": "2010-08-01",
        "Namespace": namespace(document.stack.name),
        **{f"MetricData.member.1.{name}": value for name, value in datum.items()},
    }
    aws.query(document, "monitoring", document.endpoints.monitoring, urlencode(body).encode(), keys, now)


if __name__ == "__main__":
    raise SystemExit(main())
