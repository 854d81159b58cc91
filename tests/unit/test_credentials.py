"""The credentials parameter: who it lets in, what it refuses, and that nobody reads a secret in a refusal."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import boto3
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow_host import credentials, launch
from mlflow_host.credentials import CredentialsError, User
from mlflow_host.status import StepFailed
from moto.server import ThreadedMotoServer

CANARY = "canary-7f3a-do-not-print"
GOOD: dict[str, Any] = {
    "format": 1,
    "kek_passphrase": "a passphrase of this stack's own",
    "users": {"ada": {"password": CANARY, "role": "admin"}, "bob": {"password": "b", "role": "reader"}},
}


def test_users_with_roles() -> None:
    read = credentials.parse(json.dumps(GOOD))
    assert read.kek_passphrase == "a passphrase of this stack's own"
    assert read.users == (User("ada", CANARY, "admin"), User("bob", "b", "reader"))


def test_short_form_makes_the_first_user_the_admin() -> None:
    read = credentials.parse(json.dumps({**GOOD, "users": {"ada": "a", "bob": "b", "eve": "e"}}))
    assert [(user.name, user.role) for user in read.users] == [("ada", "admin"), ("bob", "writer"), ("eve", "writer")]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"format": 2}, "it must be a JSON object with format 1"),
        ({"kek_passphrase": "short"}, "kek_passphrase must be a string of at least 16 printable characters"),
        (
            {"kek_passphrase": f"{CANARY}\n{CANARY}"},
            "kek_passphrase must be a string of at least 16 printable characters",
        ),
        ({"kek_passphrase": None}, "kek_passphrase must be a string of at least 16 printable characters"),
        ({"users": {}}, "users must name at least one user"),
        ({"users": [CANARY]}, "users must name at least one user"),
        ({"users": {"a:b": CANARY}}, 'the user name "a:b" must be 1 to 64 letters, digits and . _ @ + -'),
        ({"users": {"ada": ""}}, "the password of user ada must be a string of printable characters"),
        ({"users": {"ada": f"{CANARY}\n"}}, "the password of user ada must be a string of printable characters"),
        (
            {"users": {"ada": {"password": CANARY, "role": "root"}}},
            "the role of user ada must be admin, writer or reader",
        ),
        ({"users": {"ada": {"password": CANARY, "mail": CANARY}}}, '"mail" is not a key of user ada'),
        ({"users": {"ada": {"password": CANARY, "role": "reader"}}}, 'no user has the role "admin"'),
        ({"password": CANARY}, '"password" is not a key of it'),
    ],
)
def test_mistakes_are_named_without_the_secret(changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CredentialsError) as refused:
        credentials.parse(json.dumps(GOOD | changed))
    assert refused.value.problems == [sentence]
    assert CANARY not in str(refused.value)


def test_all_mistakes_are_reported_together() -> None:
    with pytest.raises(CredentialsError) as refused:
        credentials.parse(json.dumps({**GOOD, "kek_passphrase": 1, "users": {"a b": "", "c": 5}}))
    assert len(refused.value.problems) == 4


@given(st.text() | st.binary().map(repr) | st.just(json.dumps([GOOD])))
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(CredentialsError):
        credentials.parse(text)


@given(st.text(min_size=1))
def test_clear_password_is_salted_and_hashed(password: str) -> None:
    stored = credentials.hashed(password)
    if credentials.HASHED.fullmatch(password):
        assert stored == password
        return
    raw = base64.b64decode(stored.removeprefix("{SSHA}"))
    assert raw[:20] == hashlib.sha1(password.encode() + raw[20:]).digest()
    assert len(raw) == 36
    assert credentials.hashed(password) != stored


@pytest.mark.parametrize("options", [["-nbm"], ["-nbB", "-C5"], ["-nbs"]])
def test_what_htpasswd_makes_is_taken_as_it_is(options: list[str]) -> None:
    made = subprocess.run(["htpasswd", *options, "ada", "secret"], capture_output=True, text=True, check=True)
    given_hash = made.stdout.strip().removeprefix("ada:")
    if given_hash.startswith("{SHA}"):  # unsalted, so taken for a password
        assert credentials.hashed(given_hash) != given_hash
    else:
        assert credentials.hashed(given_hash) == given_hash


def test_password_file_has_a_line_per_user_and_nothing_in_clear() -> None:
    text = credentials.password_file(credentials.parse(json.dumps(GOOD)).users)
    assert re.fullmatch(r"ada:\{SSHA\}\S+\nbob:\{SSHA\}\S+\n", text)
    assert CANARY not in text


# ── Fetching ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def ssm(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """moto in place of SSM; returns its address."""
    for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    server = ThreadedMotoServer(port=0)
    server.start()
    address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    try:
        urllib.request.urlopen(f"{address}/moto-api/reset", data=b"").close()  # its store is the process's
        yield address
    finally:
        server.stop()


def document(endpoint: str, parameter: str = "/mlflow-ami/dev/credentials") -> launch.LaunchDocument:
    return launch.LaunchDocument(
        stack=launch.Stack("dev", "eu-central-1"),
        buckets=launch.Buckets("aaa", "mmm", "bbb"),
        credentials=launch.Credentials(parameter),
        data_volume=launch.DataVolume("vol-01234567"),
        web=launch.Web(("127.0.0.1",)),
        endpoints=launch.Endpoints(ssm=endpoint),
    )


def put(endpoint: str, value: str) -> None:
    client = boto3.client("ssm", endpoint_url=endpoint, region_name="eu-central-1")
    client.put_parameter(Name="/mlflow-ami/dev/credentials", Value=value, Type="SecureString", Overwrite=True)


def test_parameter_is_fetched_and_decrypted(ssm: str) -> None:
    put(ssm, json.dumps(GOOD))
    assert credentials.fetch(document(ssm), print, patience=0).users[0] == User("ada", CANARY, "admin")


def test_parameter_that_comes_late_is_waited_for(ssm: str) -> None:
    said: list[str] = []

    def say(message: str) -> None:
        said.append(message)
        put(ssm, json.dumps(GOOD))

    assert credentials.fetch(document(ssm), say, patience=20).kek_passphrase
    assert said == [
        "the parameter /mlflow-ami/dev/credentials does not exist in eu-central-1: create it, or correct its name; "
        "trying again"
    ]


def test_missing_parameter_is_named(ssm: str) -> None:
    with pytest.raises(StepFailed, match=r"^the parameter /no/such does not exist in eu-central-1: create it"):
        credentials.fetch(document(ssm, "/no/such"), print, patience=0)


def test_unusable_parameter_is_refused_without_its_content(ssm: str) -> None:
    put(ssm, json.dumps({**GOOD, "format": CANARY}))
    with pytest.raises(StepFailed) as failed:
        credentials.fetch(document(ssm), print, patience=0)
    assert str(failed.value).startswith("the parameter /mlflow-ami/dev/credentials cannot be used: it must be a JSON")
    assert CANARY not in str(failed.value)


def test_unreachable_service_is_named() -> None:
    unreachable = document("http://127.0.0.1:9")
    with pytest.raises(StepFailed, match=r"^http://127.0.0.1:9 cannot be reached \(EndpointConnectionError\)"), \
            pytest.MonkeyPatch.context() as patch:  # fmt: skip
        patch.setenv("AWS_ACCESS_KEY_ID", "x")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "y")
        credentials.fetch(unreachable, print, patience=0)


def test_machine_without_a_role_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(StepFailed, match="the instance has no role yet: give it the stack's instance profile"):
        credentials.fetch(replace(document("http://127.0.0.1:9")), print, patience=0)
