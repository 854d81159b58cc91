"""What CloudWatch watches: how full the data volume is, as the machine tells it."""

from __future__ import annotations

import pulumi
import pulumi_aws as aws
from host import metrics, room
from settings import Settings
from storage import Storage


def alarms(config: Settings, kept: Storage, opts: pulumi.ResourceOptions) -> None:
    """Without a topic the console shows the alarm; while the machine is off there is nothing to tell."""
    told = [config.alarm_topic_arn] if config.alarm_topic_arn else []
    aws.cloudwatch.MetricAlarm(
        "data-volume-full",
        alarm_description=(
            f"The data volume of {config.title} is {room.WARN_PERCENT} % full or more; from {room.REFUSE_PERCENT} % on "
            "nothing can be written. Enlarge it (the setting dataVolumeGib)."
        ),
        namespace=metrics.namespace(config.stack),
        metric_name=metrics.DISK_USED,
        dimensions={metrics.VOLUME: kept.volume.id},
        statistic="Maximum",
        period=metrics.PERIOD_SECONDS,
        evaluation_periods=1,
        comparison_operator="GreaterThanOrEqualToThreshold",
        threshold=room.WARN_PERCENT,
        treat_missing_data="missing",
        alarm_actions=told,
        ok_actions=told,
        opts=opts,
    )
