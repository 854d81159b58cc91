"""The program sends passwords and passphrases to AWS only in values that are marked as secret, and writes passwords and
passphrases nowhere else."""

from __future__ import annotations

import json

import pytest
from google.protobuf import json_format

from mlflow_host.contract.credentials import fits, hashed
from tests.stack.program import SIGNATURE, Registration, Run, run

GIVEN = "canary-Given-4711"
GENERATED = ("generated-kek-passphrase", "generated-admin-password")


@pytest.fixture(scope="module")
def generated() -> Run:
    return run()


@pytest.fixture(scope="module")
def given() -> Run:
    return run(secrets={"adminPassword": GIVEN})


def credentials(found: Run) -> tuple[Registration, dict[str, object]]:
    parameter = found.one("ssm.Parameter", "credentials")
    return parameter, json.loads(parameter.inputs["value"])


def test_both_secrets_are_generated_when_none_is_given(generated: Run) -> None:
    parameter, content = credentials(generated)
    assert parameter.inputs["name"] == "/mlflow-ami/dev/credentials"
    assert parameter.inputs["type"] == "SecureString"
    assert "insecureValue" not in parameter.inputs
    assert content == {
        "format": 1,
        "kek_passphrase": "generated-kek-passphrase",
        "users": {"admin": {"password": hashed(GENERATED[1], b"generated-admin-salt"), "role": "admin"}},
    }
    assert generated.one("ssm.Parameter", "admin-password").inputs["value"] == GENERATED[1]


@pytest.mark.parametrize("password", [GIVEN, GENERATED[1]])
def test_the_machine_reads_a_hash_and_may_not_read_the_password(password: str, generated: Run, given: Run) -> None:
    found = given if password == GIVEN else generated
    _, content = credentials(found)
    stored = content["users"]["admin"]["password"]  # type: ignore[index]
    assert fits(password, stored) and not fits(password + "x", stored) and password not in stored
    assert found.one("ssm.Parameter", "admin-password").inputs["type"] == "SecureString"
    readable = [
        statement["Resource"]
        for policy in found.of_type("iam.RolePolicy")
        for statement in json.loads(policy.inputs["policy"])["Statement"]
        if "ssm:GetParameter" in statement["Action"]
    ]
    assert readable and not [
        each for each in readable if "admin-password" in json.dumps(each) or "*" in json.dumps(each)
    ]


def test_a_given_password_is_used_and_none_is_generated(given: Run) -> None:
    assert given.one("ssm.Parameter", "admin-password").inputs["value"] == GIVEN
    assert [each.name for each in given.of_type("index.RandomPassword")] == ["kek-passphrase", "admin-salt"]


@pytest.mark.parametrize(("name", "length"), [("kek-passphrase", 48), ("admin-password", 24)])
def test_generated_secrets_are_long_and_need_no_quoting(generated: Run, name: str, length: int) -> None:
    """A random letter or digit has 5.95 bits of entropy, so 24 characters have 142 bits. Letters and digits need no
    quoting in a shell, URL or header."""
    inputs = generated.one("index.RandomPassword", name).inputs
    assert inputs == {"length": length, "special": False}


def test_generated_secrets_do_not_depend_on_anything_that_changes(generated: Run) -> None:
    assert all(
        "keepers" not in each.inputs and not each.dependencies for each in generated.of_type("index.RandomPassword")
    )


def test_the_value_is_marked_secret_and_nothing_else_holds_it(generated: Run, given: Run) -> None:
    for found, canaries in ((generated, GENERATED), (given, (GIVEN, GENERATED[0]))):
        (parameter, _), password = credentials(found), found.one("ssm.Parameter", "admin-password")
        assert "value" in parameter.secret and "value" in password.secret
        for each in found.registered:
            wire = json.dumps(json_format.MessageToDict(each.request))
            holds = [canary for canary in canaries if canary in wire]
            assert not holds or each in (parameter, password), f"{each.urn} holds {holds}"
            # The provider marks the value of every parameter as secret, even if the value contains no secret.
            assert not each.secret or each.name in (
                "credentials",
                "admin-password",
                "certificate-authority",
                "in-service",
            )
        assert not [canary for canary in canaries if canary in json.dumps(found.outputs)]
        assert SIGNATURE not in json.dumps(found.outputs), "no output needs to be a secret"
        assert not [text for _, text in found.log if any(canary in text for canary in canaries)]


def test_the_user_data_names_the_parameter_and_holds_no_secret(given: Run) -> None:
    text = given.one("ec2.Instance").inputs["userData"]
    assert 'parameter = "/mlflow-ami/dev/credentials"' in text
    assert not [word for word in ("password", "passphrase", GIVEN, *GENERATED) if word in text.lower()]
