"""CloudWatch alarms follow their metrics and notify their topics. boto3 calls moto in the local cloud's daemon."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import pytest
from moto import mock_aws

from scripts.local_cloud import alarms

REGION = "eu-central-1"
WATCHED: dict[str, Any] = {"Namespace": "ours", "MetricName": "Full", "Dimensions": [{"Name": "Volume", "Value": "v"}]}


@pytest.fixture
def aws() -> Iterator[Any]:
    with mock_aws():
        yield lambda service: boto3.client(service, region_name=REGION)


@pytest.fixture
def topic(aws: Any) -> str:
    return str(aws("sns").create_topic(Name="ops")["TopicArn"])


def put_alarm(aws: Any, topic: str, **definition: Any) -> None:
    usual = {"Statistic": "Maximum", "Period": 300, "EvaluationPeriods": 1, "Threshold": 90.0}
    usual |= {"ComparisonOperator": "GreaterThanOrEqualToThreshold", "TreatMissingData": "missing"}
    told = {"AlarmActions": [topic], "OKActions": [topic]}
    aws("cloudwatch").put_metric_alarm(**{"AlarmName": "full", **WATCHED, **usual, **told, **definition})


def tell(aws: Any, value: float, ago: float = 0, **other: Any) -> None:
    named = {key: value for key, value in {**WATCHED, **other}.items() if key != "Namespace"}
    datum = {**named, "Value": value, "Timestamp": datetime.now(UTC) - timedelta(seconds=ago)}
    aws("cloudwatch").put_metric_data(Namespace=WATCHED["Namespace"], MetricData=[datum])


def state(aws: Any) -> str:
    return str(aws("cloudwatch").describe_alarms()["MetricAlarms"][0]["StateValue"])


def test_alarm_follows_its_metric_and_notifies_once_per_change(aws: Any, topic: str) -> None:
    queue = aws("sqs").create_queue(QueueName="inbox")["QueueUrl"]
    arn = aws("sqs").get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    aws("sns").subscribe(TopicArn=topic, Protocol="sqs", Endpoint=arn)
    put_alarm(aws, topic)
    assert alarms.settle() and state(aws) == "INSUFFICIENT_DATA"
    tell(aws, 89.9)
    tell(aws, 99, Dimensions=[{"Name": "Volume", "Value": "another"}])
    assert alarms.settle() and state(aws) == "OK"
    tell(aws, 90)
    assert alarms.settle() and state(aws) == "ALARM"
    assert not alarms.settle()
    messages = aws("sqs").receive_message(QueueUrl=queue, MaxNumberOfMessages=10)["Messages"]
    told = [json.loads(json.loads(each["Body"])["Message"]) for each in messages]
    assert [(each["OldStateValue"], each["NewStateValue"]) for each in told] == [
        ("INSUFFICIENT_DATA", "OK"),
        ("OK", "ALARM"),
    ]


def test_older_data_does_not_count(aws: Any, topic: str) -> None:
    put_alarm(aws, topic)
    tell(aws, 99, ago=310)
    alarms.settle()
    assert state(aws) == "INSUFFICIENT_DATA"
    tell(aws, 10, ago=290)
    assert alarms.settle() and state(aws) == "OK"


@pytest.mark.parametrize(
    ("missing", "expected"),
    [("missing", "INSUFFICIENT_DATA"), ("breaching", "ALARM"), ("notBreaching", "OK"), ("ignore", "OK")],
)
def test_period_without_data_counts_as_the_alarm_defines(aws: Any, topic: str, missing: str, expected: str) -> None:
    put_alarm(aws, topic, TreatMissingData=missing)
    alarms.settle()
    assert state(aws) == expected


def test_alarm_needs_the_configured_number_of_periods(aws: Any, topic: str) -> None:
    put_alarm(aws, topic, EvaluationPeriods=3, DatapointsToAlarm=2, Statistic="Average")
    for ago, value in ((0, 99.0), (310, 10.0), (610, 80.0)):
        tell(aws, value, ago)
    alarms.settle()
    assert state(aws) == "OK"
    tell(aws, 100, ago=610)
    assert alarms.settle() and state(aws) == "ALARM", "(80 + 100) / 2 is 90"
