"""connect.py and users.py read the parameters of a Pulumi stack with the configuration of the stack's provider."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from scripts import connect, pulumi_stack
from tests.support.moto_server import moto_server

ROLE = "arn:aws:iam::123456789012:role/deploy"
OTHER_ROLE = "arn:aws:iam::210987654321:role/of-another-account"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with moto_server() as address:
        yield address


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove all AWS settings except one profile in a file: `work` in eu-west-3."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    config = tmp_path / "aws-config"
    config.write_text("[profile work]\naws_access_key_id = AKIAWORK\naws_secret_access_key = x\nregion = eu-west-3\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def pulumi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], *, show: dict[str, Any] | None = None
) -> None:
    """Put a stand-in for the Pulumi CLI on PATH, with a stack `prod` that has this configuration."""
    outputs = {"url": "http://192.0.2.1", "credentialsParameter": "/mlflow-ami/prod/credentials"}
    passphrase = (
        "passphrase must be set with PULUMI_CONFIG_PASSPHRASE or PULUMI_CONFIG_PASSPHRASE_FILE environment variables"
    )
    program = tmp_path / "bin" / "pulumi"
    program.parent.mkdir(exist_ok=True)
    program.write_text(
        f"""#!/bin/sh
        case "$*" in
            "stack output --json --stack prod") echo {shlex.quote(json.dumps(outputs))} ;;
            "config --json --stack prod") echo {shlex.quote(json.dumps(config))} ;;
            "config --json --show-secrets --stack prod") echo {shlex.quote(json.dumps(show or config))} ;;
            "stack output --json --stack sealed") echo "error: getting secrets manager: {passphrase}" >&2; exit 255 ;;
            *) echo "error: no stack named 'other' found" >&2; exit 255 ;;
        esac
        """
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def text(value: Any) -> dict[str, Any]:
    return {"value": value if isinstance(value, str) else json.dumps(value), "secret": False}


def caller(client: Any, endpoint: str) -> str:
    """Return the AWS identity to which the client's credentials belong."""
    keys = client._request_signer._credentials.get_frozen_credentials()
    sts = boto3.client(
        "sts",
        region_name="eu-west-3",
        endpoint_url=endpoint,
        aws_access_key_id=keys.access_key,
        aws_secret_access_key=keys.secret_key,
        aws_session_token=keys.token,
    )
    return str(sts.get_caller_identity()["Arn"])


def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, **config: Any) -> Any:
    endpoints = {"aws:endpoints": text([{"ssm": endpoint, "sts": endpoint}])}
    pulumi(tmp_path, monkeypatch, {**endpoints, **{f"aws:{name}": value for name, value in config.items()}})
    return connect.from_pulumi("prod").ssm


def test_stacks_profile_and_its_region_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    made = client(tmp_path, monkeypatch, endpoint, profile=text("work"))
    assert made._request_signer._credentials.access_key == "AKIAWORK"
    assert made.meta.region_name == "eu-west-3"
    made = client(tmp_path, monkeypatch, endpoint, profile=text("work"), region=text("us-east-2"))
    assert made.meta.region_name == "us-east-2"
    monkeypatch.setenv("AWS_REGION", "ap-south-1")
    assert client(tmp_path, monkeypatch, endpoint, profile=text("work")).meta.region_name == "ap-south-1"


@pytest.mark.parametrize("form", ["text", "object"])
def test_the_stacks_roles_are_assumed_one_after_the_other(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    roles = [
        {"roleArn": ROLE, "externalId": "1234", "duration": "1h", "tags": {"team": "ml"}},
        {"roleArn": OTHER_ROLE, "sessionName": "ada"},
    ]
    entry = text(roles) if form == "text" else {**text(roles), "objectValue": roles}
    made = client(tmp_path, monkeypatch, endpoint, profile=text("work"), assumeRoles=entry)
    assert caller(made, endpoint) == "arn:aws:sts::210987654321:assumed-role/of-another-account/ada"


def test_options_of_an_assumed_role_reach_sts() -> None:
    role = {
        "roleArn": ROLE,
        "duration": "1h15m30s",
        "policyArns": ["arn:aws:iam::aws:policy/ReadOnlyAccess"],
        "transitiveTagKeys": ["team"],
        "tags": {"team": "ml"},
        "sourceIdentity": "ada",
        "externalId": "1234",
        "policy": "{}",
    }
    assert pulumi_stack._arguments(role) == {
        "RoleArn": ROLE,
        "RoleSessionName": "mlflow-ami",
        "DurationSeconds": 4530,
        "PolicyArns": [{"arn": "arn:aws:iam::aws:policy/ReadOnlyAccess"}],
        "TransitiveTagKeys": ["team"],
        "Tags": [{"Key": "team", "Value": "ml"}],
        "SourceIdentity": "ada",
        "ExternalId": "1234",
        "Policy": "{}",
    }
    with pytest.raises(pulumi_stack.PulumiError, match="'an hour' of an assumed role is invalid: use a format such"):
        pulumi_stack._arguments({"roleArn": ROLE, "duration": "an hour"})


def test_a_web_identity_is_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    (tmp_path / "token").write_text("eyJhbGciOi\n")
    role = {"roleArn": ROLE, "sessionName": "ci", "webIdentityTokenFile": str(tmp_path / "token")}
    made = client(tmp_path, monkeypatch, endpoint, region=text("eu-west-3"), assumeRoleWithWebIdentity=text(role))
    assert caller(made, endpoint) == "arn:aws:sts::123456789012:assumed-role/deploy/ci"


def test_keys_that_are_secrets_of_the_stack_are_read_decrypted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {name: text(f"its-{name}") for name in ("aws:accessKey", "aws:secretKey")} | {
        "aws:region": text("eu-west-3")
    }
    hidden = {name: {"secret": True} if "Key" in name else entry for name, entry in shown.items()}
    pulumi(tmp_path, monkeypatch, hidden, show=shown)
    made = connect.from_pulumi("prod").ssm
    assert made._request_signer._credentials.access_key == "its-aws:accessKey"


def test_a_shared_configuration_of_the_stack_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    own = tmp_path / "own-config"
    own.write_text("[profile ci]\naws_access_key_id = AKIACI\naws_secret_access_key = x\nregion = us-west-1\n")
    made = client(tmp_path, monkeypatch, endpoint, profile=text("ci"), sharedConfigFiles=text([str(own)]))
    assert (made._request_signer._credentials.access_key, made.meta.region_name) == ("AKIACI", "us-west-1")


@pytest.mark.parametrize(
    ("stack", "config", "sentence"),
    [
        (
            "sealed",
            {},
            "encrypted with the passphrase that was chosen at `pulumi stack init`. Set the variable",
        ),
        ("other", {}, "no stack named 'other' found"),
        (
            "prod",
            {"aws:profile": text("lost")},
            "the stack's aws:profile is 'lost', but this machine has only these AWS profiles: work.",
        ),
        ("prod", {"aws:sharedConfigFiles": text(["a", "b"])}, "lists 2 files, but boto3 reads only one"),
    ],
)
def test_unusable_provider_setting_is_one_error_sentence(
    stack: str, config: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulumi(tmp_path, monkeypatch, config)
    with pytest.raises(connect.NotConnected) as refused:
        connect.from_pulumi(stack)
    assert sentence in str(refused.value)
    if stack == "sealed":
        assert "PULUMI_CONFIG_PASSPHRASE_FILE" in str(refused.value) and "Pulumi cannot decrypt" in str(refused.value)


def test_users_are_changed_through_the_same_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts import users

    ssm = client(tmp_path, monkeypatch, endpoint, profile=text("work"))
    document = {"format": 1, "kek_passphrase": "k" * 20, "users": {"admin": {"password": "a" * 20, "role": "admin"}}}
    ssm.put_parameter(Name="/mlflow-ami/prod/credentials", Type="SecureString", Value=json.dumps(document))
    assert users.main(["list", "--stack", "prod", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"admin": "admin"}
