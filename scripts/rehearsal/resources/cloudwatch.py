"""Resource types of CloudWatch: alarms, dashboards and log groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from botocore.exceptions import ClientError

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


def _put_dashboard(aws: Aws, inputs: Props) -> str:
    name = str(inputs["dashboardName"])
    aws.client("cloudwatch").put_dashboard(DashboardName=name, DashboardBody=inputs["dashboardBody"])
    return name


def _read_dashboard(aws: Aws, id_: str, inputs: Props) -> Props | None:
    with _unless_missing():
        return {"dashboardArn": aws.client("cloudwatch").get_dashboard(DashboardName=id_)["DashboardArn"]}
    return None


def _update_dashboard(aws: Aws, id_: str, old: Props, new: Props) -> None:
    _put_dashboard(aws, new)


def _delete_dashboard(aws: Aws, id_: str, inputs: Props) -> None:
    with _unless_missing():
        aws.client("cloudwatch").delete_dashboards(DashboardNames=[id_])


@contextmanager
def _unless_missing() -> Iterator[None]:
    """Suppress the error for a dashboard that does not exist."""
    try:
        yield
    except ClientError as error:
        if error.response["Error"]["Code"] != "ResourceNotFound":
            raise


def _recover_dashboard(aws: Aws, inputs: Props) -> str | None:
    return str(inputs["dashboardName"]) if _read_dashboard(aws, inputs["dashboardName"], inputs) else None


def _create_group(aws: Aws, inputs: Props) -> str:
    name = str(inputs["name"])
    aws.client("logs").create_log_group(logGroupName=name, tags=inputs.get("tagsAll", {}))
    _retain(aws, name, inputs)
    return name


def _retain(aws: Aws, name: str, inputs: Props) -> None:
    aws.client("logs").put_retention_policy(logGroupName=name, retentionInDays=int(inputs["retentionInDays"]))


def _read_group(aws: Aws, id_: str, inputs: Props) -> Props | None:
    groups = aws.client("logs").describe_log_groups(logGroupNamePrefix=id_)["logGroups"]
    return next(({"arn": each["arn"].removesuffix(":*")} for each in groups if each["logGroupName"] == id_), None)


def _update_group(aws: Aws, id_: str, old: Props, new: Props) -> None:
    _retain(aws, id_, new)
    before, after = old.get("tagsAll", {}), new.get("tagsAll", {})
    found = _read_group(aws, id_, new)
    if found and (gone := sorted(before.keys() - after.keys())):
        aws.client("logs").untag_resource(resourceArn=found["arn"], tagKeys=gone)
    if found and after != before and after:
        aws.client("logs").tag_resource(resourceArn=found["arn"], tags=after)


def _delete_group(aws: Aws, id_: str, inputs: Props) -> None:
    with suppress(aws.client("logs").exceptions.ResourceNotFoundException):
        aws.client("logs").delete_log_group(logGroupName=id_)


def _recover_group(aws: Aws, inputs: Props) -> str | None:
    if not _read_group(aws, inputs["name"], inputs):
        return None
    _retain(aws, inputs["name"], inputs)
    return str(inputs["name"])


KINDS = {
    "aws:cloudwatch/dashboard:Dashboard": Kind(
        create=_put_dashboard,
        read=_read_dashboard,
        update=_update_dashboard,
        delete=_delete_dashboard,
        recover=_recover_dashboard,
        replace_on=frozenset({"dashboardName"}),
    ),
    "aws:cloudwatch/logGroup:LogGroup": Kind(
        create=_create_group,
        read=_read_group,
        update=_update_group,
        delete=_delete_group,
        recover=_recover_group,
        replace_on=frozenset({"name"}),
        tagged=True,
    ),
    "aws:cloudwatch/metricAlarm:MetricAlarm": Kind(
        create=_put,
        read=_read,
        update=_update,
        delete=_delete,
        recover=_recover,
        replace_on=frozenset({"name"}),
        generate={"name": physical_name},
        tagged=True,
    ),
}
