"""Test with an IAM evaluator: the rights of the machine's role, and requests that the buckets deny to everybody."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable
from typing import Any

import pytest
from moto.iam.access_control import IAMPolicy, PermissionResult

from tests.stack.program import Run, run

ARTIFACTS, MODELS, BACKUPS = (f"arn:aws:s3:::mlflow-{name}-1a2b3c4" for name in ("artifacts", "models", "backups"))
CREDENTIALS = "arn:aws:ssm:eu-central-1:123456789012:parameter/mlflow-ami/dev/credentials"


@pytest.fixture(scope="module")
def stack() -> Run:
    return run()


@pytest.fixture(scope="module")
def policy(stack: Run) -> dict[str, Any]:
    assert {each.name for each in stack.of_type("iam.RolePolicy")} == {"server", "mlflow"}
    assert stack.of_type("iam.RolePolicyAttachment") == [], "managed policies let a machine read every parameter"
    assert not [each for each in stack.of_type("iam.Role") if "managedPolicyArns" in each.inputs]
    found: dict[str, Any] = json.loads(stack.one("iam.RolePolicy", "server").inputs["policy"])
    return found


def allowed(policy: dict[str, Any], action: str, resource: str) -> bool:
    found = IAMPolicy(json.dumps(policy)).is_action_permitted(action, resource)
    return found is PermissionResult.PERMITTED


@pytest.mark.parametrize("bucket", [ARTIFACTS, MODELS, BACKUPS])
@pytest.mark.parametrize("action", ["ListBucket", "GetBucketLocation", "ListBucketMultipartUploads"])
def test_the_machine_may_list_its_buckets(policy: dict[str, Any], bucket: str, action: str) -> None:
    assert allowed(policy, f"s3:{action}", bucket)


@pytest.mark.parametrize("bucket", [ARTIFACTS, MODELS, BACKUPS])
@pytest.mark.parametrize(
    "action", ["GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload", "ListMultipartUploadParts"]
)
def test_the_machine_may_read_and_write_its_objects(policy: dict[str, Any], bucket: str, action: str) -> None:
    assert allowed(policy, f"s3:{action}", f"{bucket}/1/abc/model.pkl")


def test_the_machine_may_read_its_parameter_and_register_with_session_manager(policy: dict[str, Any]) -> None:
    assert allowed(policy, "ssm:GetParameter", CREDENTIALS)
    assert allowed(policy, "ssm:UpdateInstanceInformation", "arn:aws:ec2:eu-central-1:123456789012:instance/i-0")
    for action in ("CreateControlChannel", "CreateDataChannel", "OpenControlChannel", "OpenDataChannel"):
        assert allowed(policy, f"ssmmessages:{action}", "*")


@pytest.mark.parametrize(
    ("action", "resource"),
    [
        *((f"s3:{action}", f"{bucket}/dump") for bucket in (ARTIFACTS, MODELS, BACKUPS)
          for action in ("DeleteObjectVersion", "PutObjectAcl", "BypassGovernanceRetention", "PutObjectRetention")),
        *((f"s3:{action}", BACKUPS) for action in
          ("DeleteBucket", "PutBucketVersioning", "PutLifecycleConfiguration", "PutBucketPolicy", "DeleteBucketPolicy",
           "PutBucketPublicAccessBlock", "PutEncryptionConfiguration", "PutReplicationConfiguration")),
        ("s3:GetObject", "arn:aws:s3:::somebody-elses-bucket/secret"),
        ("s3:GetObject", f"{ARTIFACTS}-of-another/secret"),
        ("s3:ListBucket", "arn:aws:s3:::mlflow-artifacts-0000000"),
        ("s3:ListAllMyBuckets", "*"),
        ("s3:CreateBucket", "arn:aws:s3:::new"),
        ("ssm:GetParameter", "arn:aws:ssm:eu-central-1:123456789012:parameter/mlflow-ami/prod/credentials"),
        ("ssm:GetParameter", f"{CREDENTIALS}-of-another"),
        ("ssm:GetParameters", CREDENTIALS),
        ("ssm:GetParametersByPath", "arn:aws:ssm:eu-central-1:123456789012:parameter/mlflow-ami"),
        ("ssm:PutParameter", CREDENTIALS),
        ("ssm:DeleteParameter", CREDENTIALS),
        ("ssm:DescribeParameters", "*"),
        ("ssm:SendCommand", "*"),
        ("ssm:StartSession", "*"),
        ("ec2:DescribeInstances", "*"),
        ("ec2:DetachVolume", "*"),
        ("ec2:DeleteVolume", "*"),
        ("ec2:ModifyInstanceAttribute", "*"),
        ("iam:PassRole", "*"),
        ("iam:CreateUser", "*"),
        ("sts:AssumeRole", "*"),
        ("kms:Decrypt", "*"),
        ("secretsmanager:GetSecretValue", "*"),
        ("logs:PutLogEvents", "*"),
        ("cloudwatch:GetMetricData", "*"),
        ("cloudwatch:DeleteAlarms", "*"),
        ("route53:ChangeResourceRecordSets", "*"),
    ],
)  # fmt: skip
def test_machine_role_allows_nothing_else(policy: dict[str, Any], action: str, resource: str) -> None:
    assert not allowed(policy, action, resource)


def test_the_machine_may_write_the_authority_and_no_other_parameter(policy: dict[str, Any]) -> None:
    authority = CREDENTIALS.replace("credentials", "certificate-authority")
    assert allowed(policy, "ssm:PutParameter", authority)
    assert not allowed(policy, "ssm:GetParameter", authority)
    assert not allowed(policy, "ssm:PutParameter", CREDENTIALS)
    assert not allowed(policy, "ssm:DeleteParameter", authority)
    without = json.loads(run(tls="off").one("iam.RolePolicy", "server").inputs["policy"])
    assert not allowed(without, "ssm:PutParameter", authority)


def test_machine_can_write_the_in_service_report_but_not_read_it(policy: dict[str, Any]) -> None:
    report = CREDENTIALS.replace("credentials", "in-service")
    assert allowed(policy, "ssm:PutParameter", report)
    assert not allowed(policy, "ssm:GetParameter", report) and not allowed(policy, "ssm:DeleteParameter", report)


def test_the_machine_may_read_the_readers_password_only_where_there_are_readers(policy: dict[str, Any]) -> None:
    reader = CREDENTIALS.replace("credentials", "postgres-reader")
    found = json.loads(run(postgresCidrs='["192.0.2.0/24"]').one("iam.RolePolicy", "server").inputs["policy"])
    assert allowed(found, "ssm:GetParameter", reader) and not allowed(policy, "ssm:GetParameter", reader)
    assert not allowed(found, "ssm:PutParameter", reader)


def test_machine_writes_metrics_in_its_own_namespace_only(policy: dict[str, Any]) -> None:
    """moto does not evaluate conditions, so the test compares the text of the policy's statement."""
    (metrics,) = [each for each in policy["Statement"] if "cloudwatch" in str(each["Action"])]
    assert (metrics["Action"], metrics["Resource"]) == ("cloudwatch:PutMetricData", "*")
    assert metrics["Condition"] == {"StringEquals": {"cloudwatch:namespace": "mlflow-ami/dev"}}


def test_machine_adds_to_its_own_log_group_only_and_only_if_there_is_one(policy: dict[str, Any]) -> None:
    with_logs = json.loads(run(logRetentionDays="7").one("iam.RolePolicy", "server").inputs["policy"])
    group = "arn:aws:logs:eu-central-1:123456789012:log-group:/mlflow-ami/dev"
    for action in ("logs:PutLogEvents", "logs:CreateLogStream"):
        assert allowed(with_logs, action, f"{group}:log-stream:i-0/nginx")
        assert not allowed(with_logs, action, f"{group}-2:log-stream:i-0/nginx")
        assert not allowed(policy, action, f"{group}:log-stream:i-0/nginx")
    for action in ("CreateLogGroup", "DeleteLogGroup", "DeleteLogStream", "GetLogEvents", "PutRetentionPolicy"):
        assert not allowed(with_logs, f"logs:{action}", f"{group}:log-stream:i-0/nginx")


def test_machine_adds_to_the_audit_trail_and_never_replaces_or_deletes(policy: dict[str, Any]) -> None:
    """moto does not evaluate conditions, so the test compares the text of the policy's statement.
    tests/journey/test_role.py sends real requests."""
    trail = f"{BACKUPS}/audit/2026/11/30/x.jsonl.gz"
    assert not allowed(policy, "s3:DeleteObject", trail)
    assert allowed(policy, "s3:DeleteObject", f"{BACKUPS}/dumps/x.dump")
    (adds,) = [each for each in policy["Statement"] if each["Sid"] == "AddToAuditTrail"]
    assert (adds["Effect"], adds["Action"], adds["Resource"]) == ("Deny", "s3:PutObject", [f"{BACKUPS}/audit/*"])
    assert adds["Condition"] == {"StringNotEquals": {"s3:if-none-match": "*"}}


def test_no_statement_is_wider_than_it_looks(policy: dict[str, Any]) -> None:
    for statement in policy["Statement"]:
        actions = [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        assert set(statement) - {"Condition"} == {"Sid", "Effect", "Action", "Resource"}
        assert not [action for action in actions if "*" in action]
        if "*" in statement["Resource"]:
            assert {action.split(":")[0] for action in actions} <= {"ssm", "ssmmessages"} or "Condition" in statement
            assert not [action for action in actions if "Parameter" in action]


MLFLOW = "arn:aws:iam::123456789012:role/mlflow-1a2b3c4"


def test_mlflow_acts_as_a_role_that_reaches_objects_of_two_buckets_and_nothing_else(stack: Run) -> None:
    mlflow = json.loads(stack.one("iam.RolePolicy", "mlflow").inputs["policy"])
    for action in ("GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload"):
        assert all(allowed(mlflow, f"s3:{action}", f"{bucket}/1/x") for bucket in (ARTIFACTS, MODELS))
        assert not allowed(mlflow, f"s3:{action}", f"{BACKUPS}/dumps/x.dump")
    assert not allowed(mlflow, "s3:ListBucket", BACKUPS)
    assert {each["Sid"] for each in mlflow["Statement"]} == {"Buckets", "Objects"}
    for action, resource in (
        ("ssm:GetParameter", CREDENTIALS),
        ("sts:AssumeRole", MLFLOW),
        ("s3:DeleteObjectVersion", ARTIFACTS),
    ):
        assert not allowed(mlflow, action, resource)


def test_only_the_machine_s_role_may_act_as_mlflow_s(stack: Run, policy: dict[str, Any]) -> None:
    document = json.loads(stack.one("iam.Role", "mlflow").inputs["assumeRolePolicy"])
    machine = "arn:aws:iam::123456789012:role/server-1a2b3c4"
    assert document["Statement"] == [{"Effect": "Allow", "Principal": {"AWS": machine}, "Action": "sts:AssumeRole"}]
    assert allowed(policy, "sts:AssumeRole", MLFLOW)
    assert not allowed(policy, "sts:AssumeRole", MLFLOW.replace("mlflow-", "other-"))


def test_only_ec2_may_take_the_role(stack: Run) -> None:
    document = json.loads(stack.one("iam.Role", "server").inputs["assumeRolePolicy"])
    assert document["Statement"] == [
        {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
    ]
    assert stack.one("iam.InstanceProfile").inputs["role"] == "server-1a2b3c4"


@pytest.mark.parametrize("bucket", [ARTIFACTS, MODELS, BACKUPS])
@pytest.mark.parametrize(
    ("request_context", "denied"),
    [
        ({"aws:SecureTransport": "false"}, True),
        ({"aws:SecureTransport": "true", "s3:TlsVersion": 1.1}, True),
        ({"aws:SecureTransport": "true", "s3:TlsVersion": 1.2}, False),
        ({"aws:SecureTransport": "true", "s3:TlsVersion": 1.3}, False),
    ],
)
def test_buckets_are_spoken_to_over_tls_only(
    stack: Run, bucket: str, request_context: dict[str, Any], denied: bool
) -> None:
    policies = [json.loads(each.inputs["policy"]) for each in stack.of_type("s3.BucketPolicy")]
    (policy,) = [each for each in policies if bucket in each["Statement"][0]["Resource"]]
    for resource in (bucket, f"{bucket}/object"):
        assert _is_denied(policy, resource, request_context) is denied


def _is_denied(policy: dict[str, Any], resource: str, context: dict[str, Any]) -> bool:
    """Return whether the policy denies a request. As IAM's reference states, a condition does not match if the request
    lacks its key."""
    operators: dict[str, Callable[[Any, Any], bool]] = {
        "Bool": lambda value, wanted: value == wanted,
        "NumericLessThan": lambda value, wanted: float(value) < float(wanted),
    }
    for statement in policy["Statement"]:
        assert (statement["Effect"], statement["Principal"], statement["Action"]) == ("Deny", "*", "s3:*")
        covered = any(fnmatch.fnmatchcase(resource, pattern) for pattern in statement["Resource"])
        held = all(
            name in context and operators[operator](context[name], wanted)
            for operator, tests in statement["Condition"].items()
            for name, wanted in tests.items()
        )
        if covered and held:
            return True
    return False
