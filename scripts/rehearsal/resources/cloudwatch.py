"""CloudWatch: alarms."""

from __future__ import annotations

from typing import Any

from scripts.rehearsal.resource_types import Aws, Kind, physical_name
from scripts.rehearsal.resources.tags import as_list
from scripts.rehearsal.wire import Props

ARGUMENTS = {
    "alarmDescription": "AlarmDescription",
    "namespace": "Namespace",
    "metricName": "MetricName",
    "statistic": "Statistic",
    "period": "Period",
    "evaluationPeriods": "EvaluationPeriods",
    "comparisonOperator": "ComparisonOperator",
    "threshold": "Threshold",
    "treatMissingData": "TreatMissingData",
    "alarmActions": "AlarmActions",
    "okActions": "OKActions",
}


def _put(aws: Aws, inputs: Props) -> str:
    request: dict[str, Any] = {key: inputs[name] for name, key in ARGUMENTS.items() if name in inputs}
    request |= {name: int(request[name]) for name in ("Period", "EvaluationPeriods") if name in request}
    dimensions = [{"Name": name, "Value": each} for name, each in sorted(inputs.get("dimensions", {}).items())]
    if inputs.get("tagsAll"):
        request["Tags"] = as_list(inputs["tagsAll"])
    aws.client("cloudwatch").put_metric_alarm(AlarmName=inputs["name"], Dimensions=dimensions, **request)
    return str(inputs["name"])


def _read(aws: Aws, id_: str, inputs: Props) -> Props | None:
    found = aws.client("cloudwatch").describe_alarms(AlarmNames=[id_])["MetricAlarms"]
    return {"arn": found[0]["AlarmArn"]} if found else None


def _update(aws: Aws, id_: str, old: Props, new: Props) -> None:
    _put(aws, new)


def _delete(aws: Aws, id_: str, inputs: Props) -> None:
    aws.client("cloudwatch").delete_alarms(AlarmNames=[id_])


def _recover(aws: Aws, inputs: Props) -> str | None:
    return str(inputs["name"]) if _read(aws, inputs["name"], inputs) else None


KINDS = {
    "aws:cloudwatch/metricAlarm:MetricAlarm": Kind(
        create=_put,
        read=_read,
        update=_update,
        delete=_delete,
        recover=_recover,
        replace_on=frozenset({"name"}),
        generate={"name": physical_name},
        tagged=True,
    )
}
