"""CloudWatch: the log group, a dashboard, alarms on the machine's own metrics and on EC2's status checks."""

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
"""Minutes of failed checks in a row after which the machine is rebooted. A booting machine passes within two."""


def log_group(config: Settings, opts: pulumi.ResourceOptions) -> aws.cloudwatch.LogGroup | None:
    """The log group of the stack's machines, if the settings name a retention."""
    if not config.log_group:
        return None
    return aws.cloudwatch.LogGroup(
        "server", name=config.log_group, retention_in_days=config.log_retention_days, opts=opts
    )


def build(
    config: Settings, image: Facts, kept: Storage, instance: aws.ec2.Instance, opts: pulumi.ResourceOptions
) -> None:
    """The dashboard; the alarms of the setting `alarms` whose metrics the image sends, and one on the machine's own
    status check, which reboots it. EC2 itself moves a machine off broken hardware. Without a topic alarms are only
    visible in the console."""
    told = [config.alarm_topic_arn] if config.alarm_topic_arn else []
    if config.dashboard:
        aws.cloudwatch.Dashboard(
            "server",
            # A dashboard's name has no dots.
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
    """The content of the dashboard in CloudWatch's format: two plots in a row."""
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
