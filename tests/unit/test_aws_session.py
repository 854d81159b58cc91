"""All scripts use the same rules to choose AWS profile and region, and report separate errors for profile, region,
network and credentials."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import botocore.session
import pytest
from botocore import exceptions

from scripts import aws_session
from tests.support.readme_commands import REPOSITORY

CONFIG = """[default]
region = eu-west-3
[profile work]
region = ap-south-1
[profile bare]
output = json
"""


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    config = tmp_path / "config"
    config.write_text(CONFIG)
    given = {
        "AWS_CONFIG_FILE": str(config),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return given


@pytest.mark.parametrize(
    ("given", "region"),
    [
        ({}, "eu-west-3"),
        ({"AWS_PROFILE": "work"}, "ap-south-1"),
        ({"AWS_PROFILE": "bare"}, "eu-central-1"),
        ({"AWS_DEFAULT_REGION": "us-west-2"}, "us-west-2"),
        ({"AWS_REGION": "us-east-2", "AWS_DEFAULT_REGION": "us-west-2", "AWS_PROFILE": "work"}, "us-east-2"),
    ],
)
def test_region_is_the_environments_then_the_profiles(
    given: dict[str, str], region: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert aws_session.choose().region_name == region
    assert aws_session.choose("sa-east-1").region_name == "sa-east-1"
    assert aws_session.choose(profile="work").region_name == given.get(
        "AWS_REGION", given.get("AWS_DEFAULT_REGION", "ap-south-1")
    )


def client_error(code: str) -> exceptions.ClientError:
    return exceptions.ClientError({"Error": {"Code": code, "Message": "as AWS words it."}}, "DescribeImages")


@pytest.mark.parametrize(
    ("error", "region", "parts"),
    [
        (exceptions.ProfileNotFound(profile="nosuch"), None, ("nosuch", "bare", "work", "AWS_PROFILE")),
        (exceptions.NoCredentialsError(), None, ("no AWS credentials", "aws configure")),
        (exceptions.UnauthorizedSSOTokenError(), None, ("aws sso login",)),
        (exceptions.TokenRetrievalError(provider="sso", error_msg="expired"), None, ("aws sso login",)),
        (exceptions.EndpointConnectionError(endpoint_url="https://x"), "eu-nowhere-1", ("not a known region",)),
        (exceptions.EndpointConnectionError(endpoint_url="https://x"), "eu-west-1", ("https://x", "network")),
        (exceptions.ConnectTimeoutError(endpoint_url="https://x"), "eu-west-1", ("check the network",)),
        (exceptions.ProxyConnectionError(proxy_url="http://p"), "eu-west-1", ("proxy",)),
        (exceptions.InvalidRegionError(region_name="a b"), "a b", ("'a b' is not a region",)),
        (client_error("InvalidClientTokenId"), "eu-south-1", ("does not accept the credentials", "eu-south-1")),
        (client_error("ExpiredToken"), None, ("does not accept the credentials",)),
        (client_error("UnauthorizedOperation"), None, ("lack a right", "AWS rights")),
        (client_error("InternalError"), None, ("InternalError",)),
    ],
)
def test_each_mistake_has_its_sentence(error: Exception, region: str | None, parts: tuple[str, ...]) -> None:
    said = aws_session.explain(error, region)
    for part in parts:
        assert part in said
    assert "\n" not in said


def test_only_refused_credentials_are_reported_as_refused() -> None:
    for error in (
        exceptions.EndpointConnectionError(endpoint_url="https://x"),
        exceptions.ProfileNotFound(profile="nosuch"),
        client_error("UnauthorizedOperation"),
    ):
        assert "does not accept the credentials" not in aws_session.explain(error, "eu-west-1")


def test_the_local_clouds_session_reads_nothing_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nosuch")
    session = aws_session.isolated()
    session.client("ec2", region_name="eu-central-1", aws_access_key_id="x", aws_secret_access_key="y")
    with pytest.raises(exceptions.ProfileNotFound):
        botocore.session.Session().get_credentials()


SCRIPTS = [
    pytest.param(("bake.py",), marks=pytest.mark.service),  # looks for Packer first
    ("images.py", "list"),
    ("images.py", "sweep", "--dry-run"),
]


def run(arguments: tuple[str, ...], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    script = str(REPOSITORY / "scripts" / arguments[0])
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return subprocess.run(
        [sys.executable, script, *arguments[1:]], env=clean | environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.long
@pytest.mark.parametrize("arguments", SCRIPTS, ids=" ".join)
@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"AWS_PROFILE": "nosuch"}, ("nosuch", "AWS_PROFILE")),
        ({"AWS_REGION": "eu-nowhere-1"}, ("eu-nowhere-1", "region")),
        ({"AWS_REGION": "bad name!"}, ("bad name!", "region")),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, ("cannot be reached", "127.0.0.1:9", "network")),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, ("no AWS credentials", "aws configure")),
    ],
    ids=["profile", "region", "no region", "network", "credentials"],
)
def test_scripts_end_with_2_and_the_sentence(
    arguments: tuple[str, ...], given: dict[str, str], parts: tuple[str, ...], environment: dict[str, str]
) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_MAX_ATTEMPTS": "1"}
    done = run(arguments, environment | keys | given)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    for part in parts:
        assert part in last
