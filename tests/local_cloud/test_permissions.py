"""A role's policies allow or deny each request by the rules in IAM's "Policy evaluation logic"."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import boto3
import pytest
from botocore.awsrequest import AWSPreparedRequest

from scripts.local_cloud import permissions, roles

REGION = "eu-central-1"
HERE = "http://127.0.0.1:9"
OWN = f"arn:aws:ssm:{REGION}:123456789012:parameter/own/secret"
GROUP = f"arn:aws:logs:{REGION}:123456789012:log-group:/own"
CALLER = "arn:aws:sts::123456789012:assumed-role/machine/i-0"


def allow(action: Any, resource: Any = "*", **more: Any) -> dict[str, Any]:
    return {"Effect": "Allow", "Action": action, "Resource": resource, **more}


def deny(action: Any, resource: Any = "*", **more: Any) -> dict[str, Any]:
    return {"Effect": "Deny", "Action": action, "Resource": resource, **more}


class Sent(Exception):
    """The boto3 client raises `Sent` instead of sending a request. The exception `Sent` contains the request."""


@cache
def client_of(service: str) -> Any:
    session: Any = boto3.Session("ASIA", "x", "t", REGION)
    client = session.client(service, endpoint_url=HERE)

    def catch(request: AWSPreparedRequest, **_: Any) -> None:
        raise Sent(request)

    client.meta.events.register("before-send", catch)
    return client


def sent(service: str, operation: str, **arguments: Any) -> permissions.Request:
    """Return a boto3 request in the form in which the daemon reads it."""
    with pytest.raises(Sent) as caught:
        getattr(client_of(service), operation)(**arguments)
    return as_daemon_reads(caught.value.args[0])


def as_daemon_reads(request: AWSPreparedRequest) -> permissions.Request:
    from scripts.local_cloud.aws_api_server import parse

    headers = {
        name: value.decode() if isinstance(value, bytes) else str(value) for name, value in request.headers.items()
    }
    environ = {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in headers.items()}
    environ |= {"CONTENT_TYPE": headers.get("Content-Type", ""), "REQUEST_METHOD": request.method or ""}
    path, _, query = (request.url or "").removeprefix(HERE).partition("?")
    environ |= {"PATH_INFO": path, "QUERY_STRING": query}
    content = request.body or b""
    assert isinstance(content, (str, bytes, bytearray)), "boto3 streams the body"
    body = content.encode() if isinstance(content, str) else bytes(content)
    return permissions.read(environ, body, *parse(environ, body))


def refused(request: permissions.Request, *statements: dict[str, Any]) -> permissions.Denial | None:
    return permissions.denial(request, CALLER, [{"Version": "2012-10-17", "Statement": list(statements)}])


def test_requests_are_read_as_policies_name_them() -> None:
    assert sent("ssm", "get_parameter", Name="/own/secret").action == "ssm:GetParameter"
    for name in ("/own/secret", "/own/secret:3", "own/secret", OWN, f"{OWN}:3"):
        assert sent("ssm", "get_parameter", Name=name).resources == (OWN,)
    assert sent("ssm", "get_parameters", Names=["/own/secret", "/b"]).resources == (OWN, f"{OWN[:-10]}b")
    assert sent("ec2", "describe_instances").action == "ec2:DescribeInstances"
    assert sent("sts", "get_caller_identity").action == "sts:GetCallerIdentity"
    metric = sent("cloudwatch", "put_metric_data", Namespace="n", MetricData=[])
    assert (metric.action, metric.context["cloudwatch:namespace"]) == ("cloudwatch:PutMetricData", "n")
    stream = {"logGroupName": "/own", "logStreamName": "i-0/nginx"}
    assert sent("logs", "create_log_stream", **stream).resources == (f"{GROUP}:log-stream:i-0/nginx",)
    events = sent("logs", "put_log_events", **stream, logEvents=[{"timestamp": 1, "message": "m"}])
    assert (events.action, events.resources) == ("logs:PutLogEvents", (f"{GROUP}:log-stream:i-0/nginx",))
    assert sent("logs", "delete_log_group", logGroupName="/own").resources == (GROUP,)
    secret = f"arn:aws:secretsmanager:{REGION}:123456789012:secret:rds!db-0-abcdef"
    assert sent("secretsmanager", "get_secret_value", SecretId=secret).resources == (secret,)
    database = f"arn:aws:rds:{REGION}:123456789012:db:own"
    assert sent("rds", "describe_db_instances", DBInstanceIdentifier="own").resources == (database,)
    assert sent("route53", "list_hosted_zones").action == "route53:GET:/2013-04-01/hostedzone"


@pytest.mark.parametrize(
    ("statements", "allowed"),
    [
        ([], False),
        ([allow("ssm:GetParameter", OWN)], True),
        ([allow("SSM:getparameter", OWN)], True),
        ([allow(["ssm:PutParameter", "ssm:Get*"], [OWN])], True),
        ([allow("ssm:GetParameter", OWN + "-of-another")], False),
        ([allow("ssm:GetParameter", OWN.upper())], False),
        ([allow("ssm:GetParameters", OWN)], False),
        ([allow("ssm:GetParameter", OWN[:-1] + "?")], True),
        ([allow("ssm:GetParameter", OWN[:-1] + "[t]")], False),
        ([allow("*"), deny("ssm:*", OWN)], False),
        ([deny("ssm:*", OWN), allow("*")], False),
        ([allow("*"), deny("ssm:*", OWN + "x")], True),
        ([{"Effect": "Allow", "NotAction": "ssm:*", "Resource": "*"}], False),
        ([{"Effect": "Allow", "NotAction": "ec2:*", "Resource": "*"}], True),
        ([{"Effect": "Allow", "Action": "*", "NotResource": OWN}], False),
        ([allow("*", Condition={"StringEquals": {"aws:RequestedRegion": [REGION, "b"]}})], True),
        ([allow("*", Condition={"StringEquals": {"aws:RequestedRegion": "b"}})], False),
        ([allow("*", Condition={"StringNotEquals": {"aws:RequestedRegion": "b"}})], True),
        ([allow("*", Condition={"StringEquals": {"aws:nobody-knows": "b"}})], False),
        ([allow("*", Condition={"DateLessThan": {"aws:CurrentTime": "2999-01-01"}})], False),
        ([allow("*"), deny("*", Condition={"DateLessThan": {"aws:CurrentTime": "2999-01-01"}})], False),
        ([allow("*"), deny("*", Condition={"Bool": {"aws:SecureTransport": "false"}})], True),
    ],
)
def test_one_denial_outweighs_all_and_nothing_is_allowed_by_itself(
    statements: list[dict[str, Any]], allowed: bool
) -> None:
    assert (refused(sent("ssm", "get_parameter", Name="/own/secret"), *statements) is None) is allowed


def test_every_resource_of_a_request_must_be_allowed() -> None:
    both = sent("ssm", "get_parameters", Names=["/own/secret", "/own/other"])
    assert refused(both, allow("ssm:GetParameters", OWN))
    assert not refused(both, allow("ssm:GetParameters", OWN[:-6] + "*"))


def test_calls_with_an_unknown_resource_need_a_statement_for_all_resources() -> None:
    call = sent("ec2", "terminate_instances", InstanceIds=["i-0"])
    assert refused(call, allow("ec2:TerminateInstances", "arn:aws:ec2:*:*:instance/*"))
    assert not refused(call, allow("ec2:TerminateInstances"))


def test_metrics_go_into_the_namespace_that_the_condition_names() -> None:
    statement = allow("cloudwatch:PutMetricData", Condition={"StringEquals": {"cloudwatch:namespace": "mine"}})
    assert not refused(sent("cloudwatch", "put_metric_data", Namespace="mine", MetricData=[]), statement)
    assert refused(sent("cloudwatch", "put_metric_data", Namespace="AWS/EC2", MetricData=[]), statement)


def test_lines_go_to_the_log_group_that_the_statement_names() -> None:
    statement = allow(["logs:CreateLogStream", "logs:PutLogEvents"], f"{GROUP}:*")
    events: dict[str, Any] = {"logStreamName": "i-0/nginx", "logEvents": [{"timestamp": 1, "message": "m"}]}
    assert not refused(sent("logs", "put_log_events", logGroupName="/own", **events), statement)
    assert refused(sent("logs", "put_log_events", logGroupName="/own-2", **events), statement)
    assert refused(sent("logs", "get_log_events", logGroupName="/own", logStreamName="i-0/nginx"), statement)


def test_get_caller_identity_is_always_allowed() -> None:
    assert refused(sent("sts", "get_caller_identity"), deny("*")) is None


def test_refusal_is_worded_as_by_aws() -> None:
    found = refused(sent("ssm", "get_parameter", Name="/own/secret"))
    assert found and (found.code, found.message) == (
        "AccessDenied",
        f"User: {CALLER} is not authorized to perform: ssm:GetParameter on resource: {OWN} because no identity-based "
        "policy allows the ssm:GetParameter action",
    )


def test_only_the_session_that_was_minted_is_known() -> None:
    key = b"k" * 32
    session = roles.mint(key, "i-0", "arn:aws:iam::123456789012:role/machine", json.dumps({}))
    assert roles._verified(session.token, key)["assumed"] == CALLER
    head, claims, signature = session.token.split(".")
    for token in ("", "x", f"{head}.{claims}.", f"{head}.{claims}x.{signature}", f"{head}.{claims}.{signature[:-1]}x"):
        with pytest.raises(ValueError):
            roles._verified(token, key)


def test_condition_on_if_none_match_is_enforced_as_one_on_the_header_that_the_store_knows() -> None:
    """store_front.py forwards the value of the If-None-Match header in the Referer header."""
    statement = deny("s3:PutObject", "arn:aws:s3:::b/*", Condition={"StringNotEquals": {"s3:if-none-match": "*"}})
    (found,) = roles.s3_policy([{"Statement": [statement]}])["Statement"]
    assert found["Condition"] == {"StringNotEquals": {"referer": "*"}}
    assert (found["Effect"], found["Resource"]) == ("Deny", "arn:aws:s3:::b/*")
    (plain,) = roles.s3_policy([{"Statement": allow("s3:GetObject")}])["Statement"]
    assert "Condition" not in plain
