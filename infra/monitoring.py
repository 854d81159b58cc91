"""CloudWatch alarms on the machine's own metrics, and on EC2's status checks."""

from __future__ import annotations

import pulumi
import pulumi_aws as aws

from contract import alarms
from preflight import Facts
from settings import Settings
from storage import Storage

STATUS_CHECK_MINUTES = 3
"""Minutes of failed checks in a row after which the machine is rebooted. A booting machine passes within two."""


def build(
    config: Settings, image: Facts, kept: Storage, instance: aws.ec2.Instance, opts: pulumi.ResourceOptions
) -> None:
    """The alarms of the setting `alarms` whose metrics the image sends, and one on the machine's own status check,
    which reboots it. EC2 itself moves a machine off broken hardware. Without a topic alarms are only visible in the
    console."""
    told = [config.alarm_topic_arn] if config.alarm_topic_arn else []
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
