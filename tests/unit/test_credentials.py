"""Test the credentials parameter: accepted users, refused documents, and errors without secrets."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotocoreKeys
from hypothesis import given
from hypothesis import strategies as st

from mlflow_host.contract import credentials, launch
from mlflow_host.contract.credentials import CredentialsError, User
from mlflow_host.machine import aws, parameters
from mlflow_host.machine.status import StepFailed
from tests.support.moto_server import moto_server

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
        ({"password": CANARY}, '"password" is not a known key'),
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


@pytest.mark.service
@pytest.mark.parametrize("options", [["-nbm"], ["-nbB", "-C5"], ["-nbs"]])
def test_htpasswd_hashes_are_accepted(options: list[str]) -> None:
    made = subprocess.run(["htpasswd", *options, "ada", "secret"], capture_output=True, text=True, check=True)
    given_hash = made.stdout.strip().removeprefix("ada:")
    if given_hash.startswith("{SHA}"):  # a SHA hash has no salt, so it is treated as a password
        assert credentials.hashed(given_hash) != given_hash
    else:
        assert credentials.hashed(given_hash) == given_hash


def test_password_file_has_a_line_per_user_and_nothing_in_clear() -> None:
    text = credentials.password_file(credentials.parse(json.dumps(GOOD)).users)
    assert re.fullmatch(r"ada:\{SSHA\}\S+\nbob:\{SSHA\}\S+\n", text)
    assert CANARY not in text


# ── Fetching ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Metadata(BaseHTTPRequestHandler):
    """A stand-in for the instance metadata service that accepts only requests of version 2."""

    role = True

    def do_PUT(self) -> None:
        self.answer(200, "token") if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else self.answer(400, "")

    def do_GET(self) -> None:
        if self.headers["X-aws-ec2-metadata-token"] != "token":
            self.answer(401, "")
        elif not self.role:
            self.answer(404, "")
        elif self.path == "/latest/meta-data/iam/security-credentials/":
            self.answer(200, "mlflow-role\n")
        elif self.path == "/latest/meta-data/iam/security-credentials/mlflow-role":
            self.answer(200, json.dumps({"AccessKeyId": "AKIA", "SecretAccessKey": "secret", "Token": "session"}))
        else:
            self.answer(404, "")

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture(autouse=True)
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Metadata]]:
    class Own(Metadata):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(aws.role_keys, "__defaults__", (address,))
    try:
        yield Own
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """The address of moto's SSM."""
    with moto_server() as address:
        yield address


@pytest.fixture
def ssm(moto: str) -> str:
    urllib.request.urlopen(f"{moto}/moto-api/reset", data=b"").close()
    return moto


def document(endpoint: str, parameter: str = "/mlflow-ami/dev/credentials") -> launch.LaunchDocument:
    return launch.LaunchDocument(
        stack=launch.Stack("dev", "eu-central-1"),
        buckets=launch.Buckets("aaa", "mmm", "bbb"),
        credentials=launch.CredentialsParameter(parameter),
        data_volume=launch.DataVolume("vol-01234567"),
        web=launch.Web(("127.0.0.1",)),
        endpoints=launch.Endpoints(ssm=endpoint),
    )


def client(endpoint: str) -> Any:
    return boto3.client(
        "ssm", endpoint_url=endpoint, region_name="eu-central-1", aws_access_key_id="x", aws_secret_access_key="y"
    )


def put(endpoint: str, value: str) -> None:
    client(endpoint).put_parameter(Name="/mlflow-ami/dev/credentials", Value=value, Type="SecureString", Overwrite=True)


def test_parameter_is_fetched_and_decrypted(ssm: str) -> None:
    put(ssm, json.dumps(GOOD))
    assert parameters.fetch(document(ssm), print, patience=0).users[0] == User("ada", CANARY, "admin")


def test_missing_parameter_is_retried(ssm: str) -> None:
    said: list[str] = []

    def say(message: str) -> None:
        said.append(message)
        put(ssm, json.dumps(GOOD))

    assert parameters.fetch(document(ssm), say, patience=60).kek_passphrase
    assert said == [
        "the parameter /mlflow-ami/dev/credentials does not exist in eu-central-1: create it, or correct its name; "
        "trying again"
    ]


def test_missing_parameter_is_named(ssm: str) -> None:
    with pytest.raises(StepFailed, match=r"^the parameter /no/such does not exist in eu-central-1: create it"):
        parameters.fetch(document(ssm, "/no/such"), print, patience=0)


def test_unusable_parameter_is_refused_without_its_content(ssm: str) -> None:
    put(ssm, json.dumps({**GOOD, "format": CANARY}))
    with pytest.raises(StepFailed) as failed:
        parameters.fetch(document(ssm), print, patience=0)
    assert str(failed.value).startswith("the parameter /mlflow-ami/dev/credentials cannot be used: it must be a JSON")
    assert CANARY not in str(failed.value)


def test_unreachable_service_is_named() -> None:
    with pytest.raises(StepFailed, match=r"^http://127.0.0.1:9 cannot be reached \(.*refused\): add a route"):
        parameters.fetch(document("http://127.0.0.1:9"), print, patience=0)


def test_machine_without_a_role_is_reported(metadata: type[Metadata]) -> None:
    metadata.role = False
    with pytest.raises(StepFailed, match="the instance has no role yet: give it the stack's instance profile"):
        parameters.fetch(document("http://127.0.0.1:9"), print, patience=0)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            b'{"__type": "com.amazon.coral.service#AccessDeniedException", "Message": "not authorized"}',
            "the role cannot read the parameter /p: allow ssm:GetParameter and use of its KMS key",
        ),
        (
            b'{"__type": "ThrottlingException", "message": "Rate exceeded"}',
            "SSM does not return the parameter /p (ThrottlingException: Rate exceeded)",
        ),
        (b"<html>", "SSM does not return the parameter /p (HTTP 400)"),
    ],
)
def test_refusal_of_the_service_is_explained(body: bytes, sentence: str) -> None:
    class Refusing(Metadata):
        def do_POST(self) -> None:
            self.answer(400, body.decode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        with pytest.raises(StepFailed) as failed:
            parameters.fetch(document(f"http://127.0.0.1:{server.server_address[1]}", "/p"), print, patience=0)
        assert str(failed.value) == f"{sentence} (tried for 0 s)"
    finally:
        server.shutdown()
        server.server_close()


def test_authority_is_written_where_clients_look(ssm: str) -> None:
    for value in ("first", "second"):
        aws.put_parameter(document(ssm), "/mlflow-ami/dev/authority", value, aws.role_keys())
        found = client(ssm).get_parameter(Name="/mlflow-ami/dev/authority")["Parameter"]
        assert (found["Value"], found["Type"]) == (value, "String")


@pytest.mark.long
@given(
    body=st.binary(max_size=200),
    region=st.sampled_from(["eu-central-1", "us-gov-west-1"]),
    address=st.sampled_from(["https://ssm.eu-central-1.amazonaws.com", "http://127.0.0.1:5000"]),
    secret=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40),
)
def test_signature_is_the_one_botocore_makes(body: bytes, region: str, address: str, secret: str) -> None:
    keys = aws.Keys("AKIAEXAMPLE", secret, "session/token==")
    headers = {"Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": "AmazonSSM.GetParameter"}
    request = AWSRequest("POST", address + "/", data=body, headers=headers)
    SigV4Auth(BotocoreKeys(keys.access, keys.secret, keys.token), "ssm", region).add_auth(request)
    stamp = datetime.strptime(request.headers["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    ours = aws.signature(address, headers, body, region, "ssm", keys, stamp)
    assert ours["Authorization"] == request.headers["Authorization"]


def test_default_endpoint_is_aws() -> None:
    own = document("")
    assert aws.ssm_address(own) == "https://ssm.eu-central-1.amazonaws.com"
    china = replace(own, stack=launch.Stack("dev", "cn-north-1"))
    assert aws.ssm_address(china) == "https://ssm.cn-north-1.amazonaws.com.cn"
