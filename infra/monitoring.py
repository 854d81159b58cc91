"""CloudWatch resources: the log group, a dashboard, and alarms on the machine's metrics and EC2's status checks."""

from __future__ import annotations

import re
from typing import Any

import pulumi
import pulumi_aws as aws

from contract import alarms
from preflight import Facts
from settings import Settings
from storage import Storage

STATUS_CHECK_MINUTES = 3
"""The alarm reboots the machine if the status check fails for this number of consecutive minutes. A booting machine
passes the check within two minutes."""


def log_group(config: Settings, opts: pulumi.ResourceOptions) -> aws.cloudwatch.LogGroup | None:
    """The log group of the stack's machines; None if `logRetentionDays` is 0."""
    if not config.log_group:
        return None
    return aws.cloudwatch.LogGroup(
        "server", name=config.log_group, retention_in_days=config.log_retention_days, opts=opts
    )


def build(
    config: Settings, image: Facts, kept: Storage, instance: aws.ec2.Instance, opts: pulumi.ResourceOptions
) -> None:
    """Create the dashboard, and each alarm in the setting `alarms` whose metric the image sends. The alarm on the
    instance status check reboots the machine. There is no alarm for broken hardware, because EC2 itself moves the
    machine to other hardware. Without an SNS topic, alarms are visible only in the console."""
    told = [config.alarm_topic_arn] if config.alarm_topic_arn else []
    if config.dashboard:
        aws.cloudwatch.Dashboard(
            "server",
            # CloudWatch allows no dots in the name of a dashboard.
            dashboard_name=re.sub(r"[^\w-]", "_", config.title),
            dashboard_body=pulumi.Output.json_dumps(dashboard(config, kept)),
            opts=opts,
        )
    fed = set(config.alarms) & set(alarms.fed_by(image.launch_revision))
    for alarm in alarms.ALARMS:
        if alarm.name not in fed:
            continue
        aws.cloudwatch.MetricAlarm(
            alarm.name,
            alarm_description=alarm.says.format(title=config.title),
            namespace=alarms.namespace(config.stack),
            metric_name=alarm.metric,
            dimensions={alarms.VOLUME: kept.volume.id} if alarm.metric == alarms.DISK_USED else {},
            statistic=alarm.statistic,
            period=alarm.period_seconds,
            evaluation_periods=alarm.periods,
            comparison_operator=alarm.comparison,
            threshold=alarm.threshold,
            treat_missing_data=alarm.missing,
            alarm_actions=told,
            ok_actions=told,
            opts=opts,
        )
    if alarms.STATUS_CHECK in config.alarms:
        reboot = kept.buckets["backups"].arn.apply(
            lambda arn: f"arn:{arn.split(':')[1]}:automate:{config.region}:ec2:reboot"
        )
        aws.cloudwatch.MetricAlarm(
            alarms.STATUS_CHECK,
            alarm_description=f"The machine of {config.title} fails EC2's instance status check, and is rebooted.",
            namespace="AWS/EC2",
            metric_name="StatusCheckFailed_Instance",
            dimensions={"InstanceId": instance.id},
            statistic="Maximum",
            period=60,
            evaluation_periods=STATUS_CHECK_MINUTES,
            comparison_operator="GreaterThanOrEqualToThreshold",
            threshold=1,
            treat_missing_data="missing",
            alarm_actions=[reboot, *told],
            ok_actions=told,
            opts=opts,
        )


def dashboard(config: Settings, kept: Storage) -> dict[str, Any]:
    """The content of the dashboard in CloudWatch's format, with two plots per row."""
    namespace = alarms.namespace(config.stack)
    dimensions = {alarms.DISK_USED: [alarms.VOLUME, kept.volume.id]}
    return {
        "widgets": [
            {
                "type": "metric",
                **{"x": 12 * (number % 2), "y": 6 * (number // 2), "width": 12, "height": 6},
                "properties": {
                    "title": plot.title,
                    "metrics": [[namespace, metric, *dimensions.get(metric, [])] for metric in plot.metrics],
                    "region": config.region,
                    **{"view": "timeSeries", "stat": "Average", "period": 60, "yAxis": {"left": {"min": 0}}},
                },
            }
            for number, plot in enumerate(alarms.PLOTS)
        ]
    }
