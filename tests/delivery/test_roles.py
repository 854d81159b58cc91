"""Tests of the roles in infra/delivery-roles.yaml: which jobs can assume each role, and what each role may do. moto's
CloudFormation creates the roles."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from moto import mock_aws

from scripts.local_cloud import permissions
from tests.delivery.workflows import ROOT

REPOSITORY = "example/mlflow-ami"
PROVIDER = "arn:aws:iam::123456789012:oidc-provider/token.actions.githubusercontent.com"
ISSUER = "token.actions.githubusercontent.com"
BRANCH = "ref:refs/heads/"
LAUNCH = ["LaunchNetworkAndMachine", "LaunchBuckets", "LaunchAlarm", "LaunchLogs", "LaunchRoleAndSecret"]
PARAMETERS = "arn:aws:ssm:eu-central-1:123456789012:parameter/mlflow-ami"


class Role:
    def __init__(self, trust: dict[str, Any], policy: dict[str, Any]) -> None:
        self.trust, self.policy = trust, policy

    def trusts(self, subject: str, audience: str = "sts.amazonaws.com") -> bool:
        """Return whether a job can assume this role with a GitHub token that has this subject and this audience."""
        context = {f"{ISSUER}:aud": audience, f"{ISSUER}:sub": subject}
        request = permissions.Request("sts", "sts:AssumeRoleWithWebIdentity", ("*",), context)
        return any(permissions.applies(each, request, "*") for each in self.trust["Statement"])

    def may(self, action: str, resource: str = "*") -> bool:
        request = permissions.Request(action.split(":")[0], action, (resource,), {})
        return permissions.denial(request, "somebody", [self.policy]) is None

    def actions(self) -> dict[str, list[str]]:
        return {each["Sid"]: each["Action"] for each in self.policy["Statement"] if each["Effect"] == "Allow"}


@pytest.fixture(scope="module")
def roles() -> Iterator[dict[str, Role]]:
    """Return the roles that delivery-roles.yaml creates for the repository `example/mlflow-ami`. The stack gets the ARN
    of an existing identity provider, because moto cannot create identity providers."""
    with mock_aws(), pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        connect: Any = boto3.client
        cloudformation, iam = connect("cloudformation", "eu-central-1"), connect("iam", "eu-central-1")
        given = {"Repository": REPOSITORY, "StateBucket": "state", "ExistingProvider": PROVIDER}
        cloudformation.create_stack(
            StackName="delivery-roles",
            TemplateBody=(ROOT / "infra/delivery-roles.yaml").read_text(),
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in given.items()],
            Capabilities=["CAPABILITY_IAM"],
        )
        [stack] = cloudformation.describe_stacks(StackName="delivery-roles")["Stacks"]
        names = {each["OutputKey"]: each["OutputValue"].rpartition("/")[2] for each in stack["Outputs"]}
        yield {
            key.removesuffix("Role"): Role(
                iam.get_role(RoleName=name)["Role"]["AssumeRolePolicyDocument"], policy_of(iam, name)
            )
            for key, name in names.items()
        }


def policy_of(iam: Any, role: str) -> dict[str, Any]:
    """Return the policy document of a role. moto stores the document as a Python literal, not as JSON."""
    return dict(ast.literal_eval(iam.get_role_policy(RoleName=role, PolicyName="delivery")["PolicyDocument"]))


def readme() -> dict[str, list[str]]:
    text = (ROOT / "infra/README.md").read_text().split("<summary>IAM policy</summary>")[1]
    found: Any = json.loads(re.findall(r"```json\n(.*?)```", text, re.S)[0])
    return {each["Sid"]: each["Action"] for each in found["Statement"]}


TRUSTED = {
    "Bake": ["ref:refs/heads/main"],
    "Deploy": ["environment:production"],
    "Preview": ["environment:preview", "environment:plan"],
}


@pytest.mark.parametrize("name", TRUSTED)
def test_only_the_right_repository_branch_and_environment_get_a_role(roles: dict[str, Role], name: str) -> None:
    role, right = roles[name], [f"repo:{REPOSITORY}:{each}" for each in TRUSTED[name]]
    assert all(role.trusts(each) for each in right)
    wrong = [
        *(each.replace(REPOSITORY, "somebody/mlflow-ami") for each in right),  # a fork
        *(each.replace(REPOSITORY, f"{REPOSITORY}-2") for each in right),
        f"repo:{REPOSITORY}:pull_request",
        *(f"repo:{REPOSITORY}:{BRANCH}{each}" for each in ("feature", "main2", "mai", "Main", "*")),
        f"repo:{REPOSITORY}:ref:refs/tags/main",
        *(f"repo:{REPOSITORY}:environment:{each}" for each in ("staging", "production2", "*")),
        *(f"repo:{REPOSITORY}:{each}" for other in TRUSTED if other != name for each in TRUSTED[other]),
        "*", "",
    ]  # fmt: skip
    assert [each for each in wrong if role.trusts(each)] == []
    assert not any(role.trusts(each, audience="https://github.com/example") for each in right)


def test_a_role_trusts_githubs_provider_only(roles: dict[str, Role]) -> None:
    for role in roles.values():
        [statement] = role.trust["Statement"]
        assert statement["Principal"] == {"Federated": PROVIDER}
        assert statement["Condition"].keys() == {"StringEquals"}


def test_rights_are_those_of_the_readme(roles: dict[str, Role]) -> None:
    known = readme()
    assert roles["Bake"].actions() == {sid: known[sid] for sid in ("Bake", "Images")}
    deploy, preview = roles["Deploy"].actions(), roles["Preview"].actions()
    assert deploy.pop("State") == ["s3:DeleteObject", "s3:GetObject", "s3:ListBucket", "s3:PutObject"]
    assert deploy == {sid: known[sid] for sid in LAUNCH}
    assert preview.pop("State") == ["s3:GetObject", "s3:ListBucket"]
    reading = re.compile(r"\w+:(Describe|Get|List)")
    assert preview == {sid: [each for each in known[sid] if reading.match(each)] for sid in LAUNCH}


def test_bake_role_promotes_to_staging_only(roles: dict[str, Role]) -> None:
    bake = roles["Bake"]
    assert bake.may("ssm:PutParameter", f"{PARAMETERS}/images/staging")
    assert bake.may("ssm:PutParameter", f"{PARAMETERS}/facts/20261129T150000Z/0")
    for name in ("images/production", "prod/credentials"):
        assert not bake.may("ssm:PutParameter", f"{PARAMETERS}/{name}")
        assert not bake.may("ssm:DeleteParameters", f"{PARAMETERS}/{name}")


def test_deploy_role_sets_no_channel(roles: dict[str, Role]) -> None:
    assert roles["Deploy"].may("ssm:PutParameter", f"{PARAMETERS}/prod/credentials")
    assert not roles["Deploy"].may("ssm:PutParameter", f"{PARAMETERS}/images/production")


def test_state_is_the_only_bucket_whose_objects_are_read_by_name(roles: dict[str, Role]) -> None:
    for role in (roles["Deploy"], roles["Preview"]):
        assert role.may("s3:GetObject", "arn:aws:s3:::state/.pulumi/stacks/mlflow-ami/prod.json")
        assert not role.may("s3:GetObject", "arn:aws:s3:::other/x")
    assert not roles["Preview"].may("s3:PutObject", "arn:aws:s3:::state/x")


def test_policies_fit_into_a_role(roles: dict[str, Role]) -> None:
    """IAM allows at most 10,240 characters of inline policies per role."""
    assert all(len(json.dumps(role.policy, separators=(",", ":"))) < 10_000 for role in roles.values())
