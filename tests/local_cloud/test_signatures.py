"""The APIs accept only requests that an SDK can sign with a key of the cloud, and no requests from web pages."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import pytest
from botocore.awsrequest import AWSPreparedRequest

from mlflow_host.machine import aws
from scripts.local_cloud import object_store, signatures
from scripts.local_cloud.layout import Allotment, object_store_ports
from scripts.local_cloud.roles import Roles, mint

REGION, PORT = "eu-central-1", 21000
HERE = f"http://127.0.0.1:{PORT}"
KEY, SECRET = "AKIAABCDEFGHIJKLMNOP", "a-secret"


def secret_of(access_key: str, token: str) -> str | None:
    return SECRET if (access_key, token) == (KEY, "") else None


class Sent(Exception):
    """The boto3 client raises `Sent` instead of sending a request. The exception `Sent` contains the request."""


def sent(service: str, operation: str, **arguments: Any) -> dict[str, Any]:
    """Return a boto3 request as a WSGI environment for the daemon, with the request's body under "body"."""
    connect: Any = boto3.client
    client = connect(
        service, region_name=REGION, endpoint_url=HERE, aws_access_key_id=KEY, aws_secret_access_key=SECRET
    )

    def catch(request: AWSPreparedRequest, **_: Any) -> None:
        raise Sent(request)

    client.meta.events.register("before-send", catch)
    with pytest.raises(Sent) as caught:
        getattr(client, operation)(**arguments)
    request = caught.value.args[0]
    body = request.body.encode() if isinstance(request.body, str) else bytes(request.body or b"")
    headers = {k: v.decode() if isinstance(v, bytes) else str(v) for k, v in request.headers.items()}
    return environ(request.method, request.url.removeprefix(HERE), headers, body)


def environ(method: str, uri: str, headers: dict[str, str], body: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in headers.items()}
    for name in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        found[name] = found.pop(f"HTTP_{name}", "")
    return {"HTTP_HOST": f"127.0.0.1:{PORT}", **found, "REQUEST_METHOD": method, "RAW_URI": uri, "body": body}


def problem(request: dict[str, Any], secret: Any = secret_of, now: float | None = None) -> str:
    found = signatures.problem(request, request["body"], secret, now)
    return found.code if found else ""


CALLS: list[tuple[str, str, dict[str, Any]]] = [
    ("ec2", "describe_images", {"Filters": [{"Name": "name", "Values": ["a b*~/+&=é"]}]}),
    ("ssm", "get_parameter", {"Name": "/own/sécret", "WithDecryption": True}),
    ("sts", "get_caller_identity", {}),
    ("iam", "list_roles", {"PathPrefix": "/a b/"}),
    ("cloudwatch", "put_metric_data", {"Namespace": "n/x", "MetricData": [{"MetricName": "m", "Value": 1.0}]}),
    (
        "route53",
        "list_resource_record_sets",
        {"HostedZoneId": "Z1", "StartRecordName": "*.a b"},
    ),
    ("lambda", "get_function", {"FunctionName": "arn:aws:lambda:eu-central-1:1:function:a b:$LATEST"}),
    ("s3", "get_bucket_location", {"Bucket": "some-bucket"}),
    ("s3", "head_object", {"Bucket": "some-bucket", "Key": "a b/ü+~*'()%2F", "VersionId": "null"}),
]


@pytest.mark.parametrize(("service", "operation", "arguments"), CALLS, ids=[f"{s} {o}" for s, o, _ in CALLS])
def test_only_requests_signed_like_an_sdk_are_accepted(service: str, operation: str, arguments: dict[str, Any]) -> None:
    request = sent(service, operation, **arguments)
    assert problem(request) == ""
    path, _, query = request["RAW_URI"].partition("?")
    changed: dict[str, dict[str, Any]] = {
        "another path": {"RAW_URI": f"{path}x{'?' + query if query else ''}"},
        "another query": {"RAW_URI": f"{path}?{query}&x=1"},
        "another method": {"REQUEST_METHOD": "DELETE"},
        "another host": {"HTTP_HOST": f"localhost:{PORT}"},
        "another body": {"body": request["body"] + b" "},
        "another time": {"HTTP_X_AMZ_DATE": request["HTTP_X_AMZ_DATE"][:-2] + "!Z"},
        "no signature": {"HTTP_AUTHORIZATION": request["HTTP_AUTHORIZATION"].partition(", Signature")[0]},
        "half a signature": {"HTTP_AUTHORIZATION": request["HTTP_AUTHORIZATION"][:-1]},
        "no header": {"HTTP_AUTHORIZATION": ""},
        "fewer headers": {"HTTP_AUTHORIZATION": request["HTTP_AUTHORIZATION"].replace("host;", "")},
        "another key": {"HTTP_AUTHORIZATION": request["HTTP_AUTHORIZATION"].replace(KEY, KEY[::-1])},
        "another algorithm": {"HTTP_AUTHORIZATION": request["HTTP_AUTHORIZATION"].replace("AWS4-HMAC", "AWS4-ECDSA")},
        "a token": {"HTTP_X_AMZ_SECURITY_TOKEN": "x"},
    }
    for what, change in changed.items():
        assert problem({**request, **change}), what
    assert problem(request, lambda *_: f"{SECRET}x") == "SignatureDoesNotMatch"
    for hours in (-1, 1):
        assert problem(request, now=(datetime.now(UTC) + timedelta(hours=hours)).timestamp())


def test_requests_signed_by_a_machine_are_accepted() -> None:
    """The image contains its own code that signs the machine's few AWS calls."""
    keys, body = aws.Keys(KEY, SECRET, "token", ""), b'{"Name": "/own/secret"}'
    headers = {"Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": "AmazonSSM.GetParameter"}
    headers |= aws.signature(HERE, headers, body, REGION, "ssm", keys, datetime.now(UTC))
    request = environ("POST", "/", headers, body)
    assert problem(request, lambda key, token: SECRET if (key, token) == (KEY, "token") else None) == ""
    assert problem({**request, "body": b"{}"}, lambda *_: SECRET) == "SignatureDoesNotMatch"


@pytest.fixture
def roles(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Roles:
    from scripts.local_cloud import object_store
    from scripts.local_cloud.layout import Places

    monkeypatch.setattr(object_store, "signing_key", lambda places: b"k" * 32)
    return Roles(Places(tmp_path), Allotment(1, PORT, PORT + 1, REGION, KEY, SECRET))


def test_a_session_signs_with_its_own_secret_and_its_token(roles: Roles) -> None:
    session = mint(b"k" * 32, "i-0", "arn:aws:iam::123456789012:role/machine", "{}")
    assert roles.secret(session.access_key, session.token) == session.secret_key
    assert roles.secret(KEY, "") == SECRET
    forged = mint(b"x" * 32, "i-0", "arn:aws:iam::123456789012:role/machine", "{}")
    refused: list[tuple[str, str]] = [
        (session.access_key, ""),
        (KEY, session.token),
        (forged.access_key, forged.token),
        ("AKIAMADEUP", ""),
        ("", ""),
        ("é", ""),
    ]
    for access_key, token in refused:
        assert roles.secret(access_key, token) is None


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ({}, True),
        ({"HTTP_HOST": f"localhost:{PORT}"}, True),
        ({"HTTP_HOST": f"127.0.0.1:{PORT + 1}"}, True),
        ({"HTTP_HOST": "127.0.0.1"}, True),
        ({"HTTP_HOST": f"127.0.0.1:{PORT}0"}, False),
        ({"HTTP_HOST": f"rebound.example.com:{PORT}"}, False),
        ({"HTTP_HOST": ""}, False),
        ({"HTTP_ORIGIN": "https://example.com"}, False),
        ({"HTTP_ORIGIN": "null"}, False),
        ({"HTTP_ORIGIN": HERE}, False),
    ],
)
def test_signed_requests_of_a_web_page_are_refused(headers: dict[str, str], passes: bool) -> None:
    request = {**sent("sts", "get_caller_identity"), **headers}
    assert (signatures.of_a_page(request, (PORT, PORT + 1)) is None) == passes


def test_no_answer_opens_the_apis_to_pages() -> None:
    given = [
        ("Access-Control-Allow-Origin", "*"),
        ("access-control-max-age", "1"),
        ("Content-Type", "text/xml"),
    ]
    assert signatures.without_cors(given) == [("Content-Type", "text/xml")]


@pytest.mark.machine
def test_the_running_apis_and_the_store_refuse_pages_and_made_up_keys(cloud: Any) -> None:
    import requests

    assert cloud.client("sts").get_caller_identity()["Account"]
    # pgBackRest sends a Host header without a port. The store must accept a Host header without a port, and must refuse
    # the request only because the signature is missing.
    unsigned = requests.get(f"{cloud.s3_plain_endpoint}/", headers={"Host": "127.0.0.1"}, timeout=10)
    assert unsigned.status_code == 403 and "AccessDenied" in unsigned.text
    for address in (cloud.endpoint, cloud.s3_plain_endpoint):
        for headers in ({}, {"Origin": "https://example.com"}, {"Host": "rebound.example.com"}):
            for method in ("GET", "POST", "OPTIONS"):
                answer = requests.request(method, f"{address}/", headers=headers, timeout=10)
                assert answer.status_code in (400, 403, 405), (address, headers, method)
                assert not [name for name in answer.headers if name.lower().startswith("access-control-")]
    stranger = {"aws_access_key_id": "AKIAMADEUP", "aws_secret_access_key": "x"}
    for options in (stranger, {"aws_secret_access_key": "x" * 30}):
        for service, call in (("ec2", "describe_instances"), ("ssm", "describe_parameters"), ("iam", "list_roles")):
            with pytest.raises(Exception, match=r"AuthFailure|SignatureDoesNotMatch|Invalid|Unrecognized"):
                getattr(cloud.client(service, **options), call)()


@pytest.mark.machine
def test_another_user_of_this_host_reads_and_writes_no_object(cloud: Any) -> None:
    """Each part of the object store listens on its own port, in addition to the S3 port."""
    s3 = cloud.client("s3")
    s3.create_bucket(Bucket="of-the-account", CreateBucketConfiguration={"LocationConstraint": cloud.region})
    s3.put_object(Bucket="of-the-account", Key="secret", Body=b"secret")
    master, _, filer = object_store_ports(cloud.allotment.number)
    inner = cloud.allotment.inner_address

    def as_nobody(*command: str, told: str = "") -> str:
        run = ["runuser", "-u", "nobody", "--", "timeout", "10", *command]
        return subprocess.run(run, input=told, capture_output=True, text=True).stdout

    try:
        address = f"http://{inner}:{filer}/buckets/of-the-account"
        for how in (
            [f"{address}/"],
            [f"{address}/secret"],
            ["-X", "DELETE", f"{address}/secret"],
            ["-T", "-", address],
        ):
            assert as_nobody("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", *how) == "401", how
        shell = (object_store.program(), "shell", f"-master={inner}:{master}", f"-filer={inner}:{filer}")
        assert "secret" not in as_nobody(*shell, told="fs.ls /buckets/of-the-account\n")
        assert s3.get_object(Bucket="of-the-account", Key="secret")["Body"].read() == b"secret"
    finally:
        s3.delete_object(Bucket="of-the-account", Key="secret")
        s3.delete_bucket(Bucket="of-the-account")
