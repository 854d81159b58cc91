"""The calls of AWS that the machine makes itself: Systems Manager parameters and metrics, by the instance's role.

With the standard library alone. botocore would do the same for 0.5 s of processor time per process, which the launch
waits for and the users' timer would spend every minute. Signing is AWS Signature Version 4, compared with botocore's in
the tests.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from mlflow_host.launch import LaunchDocument

METADATA = "http://169.254.169.254"
SECONDS = 10
"""For one answer of a service."""


class NoRole(Exception):
    """The instance metadata service gives no credentials (yet)."""


class Unreachable(Exception):
    """The service could not be asked; says why."""


class Refused(Exception):
    """The service's answer is an error; `code` is AWS's name for it."""

    def __init__(self, code: str, message: str):
        self.code = code
        super().__init__(f"{code}: {message}" if message else code)


@dataclass(frozen=True)
class Keys:
    """Temporary credentials of the instance's role."""

    access: str
    secret: str
    token: str


def role_keys(metadata: str = METADATA) -> Keys:
    """By IMDSv2 only. Raises NoRole."""
    try:
        token = _ask(metadata, "PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, seconds=2)
        header = {"X-aws-ec2-metadata-token": token.decode()}
        folder = "/latest/meta-data/iam/security-credentials/"
        role = _ask(metadata, "GET", folder, header, seconds=2).decode().split()[0]
        given = json.loads(_ask(metadata, "GET", folder + role, header, seconds=2))
        return Keys(given["AccessKeyId"], given["SecretAccessKey"], given["Token"])
    except (Unreachable, Refused, ValueError, KeyError, IndexError) as error:
        raise NoRole(str(error)) from None


def get_parameter(document: LaunchDocument, name: str, keys: Keys) -> str:
    """A parameter's value, decrypted. Raises Unreachable or Refused (ParameterNotFound, AccessDeniedException, …)."""
    answer = _ssm(document, "GetParameter", {"Name": name, "WithDecryption": True}, keys)
    return str(answer["Parameter"]["Value"])


def put_parameter(document: LaunchDocument, name: str, value: str, keys: Keys) -> None:
    """Write a plain parameter, replacing what it held. Raises Unreachable or Refused."""
    _ssm(document, "PutParameter", {"Name": name, "Value": value, "Type": "String", "Overwrite": True}, keys)


def query(document: LaunchDocument, service: str, endpoint: str, body: bytes, keys: Keys, now: datetime) -> None:
    """A call of a service with the Query protocol, whose answer tells nothing. Raises Unreachable or Refused."""
    address = endpoint or regional_address(document.stack.region, service)
    headers = {"Content-Type": "application/x-www-form-urlencoded; charset=utf-8", "Accept": "application/json"}
    headers |= signature(address, headers, body, document.stack.region, service, keys, now)
    _ask(address, "POST", "/", headers, body)


def ssm_address(document: LaunchDocument) -> str:
    return document.endpoints.ssm or regional_address(document.stack.region, "ssm")


def regional_address(region: str, service: str) -> str:
    """AWS's own."""
    return f"https://{service}.{region}.{'amazonaws.com.cn' if region.startswith('cn-') else 'amazonaws.com'}"


def _ssm(document: LaunchDocument, action: str, arguments: dict[str, Any], keys: Keys) -> dict[str, Any]:
    address, body = ssm_address(document), json.dumps(arguments).encode()
    headers = {"Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": f"AmazonSSM.{action}"}
    headers |= signature(address, headers, body, document.stack.region, "ssm", keys, datetime.now(UTC))
    answer: dict[str, Any] = json.loads(_ask(address, "POST", "/", headers, body) or b"{}")
    return answer


def signature(
    address: str, headers: dict[str, str], body: bytes, region: str, service: str, keys: Keys, now: datetime
) -> dict[str, str]:
    """The headers that sign a POST of `body` to the root of `address` with Signature Version 4."""
    stamp, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    added = {"Host": urlsplit(address).netloc, "X-Amz-Date": stamp, "X-Amz-Security-Token": keys.token}
    signed = sorted((name.lower(), value) for name, value in {**headers, **added}.items())
    names = ";".join(name for name, _ in signed)
    lines = [
        "POST",
        "/",
        "",
        *(f"{name}:{value}" for name, value in signed),
        "",
        names,
        hashlib.sha256(body).hexdigest(),
    ]
    scope = f"{day}/{region}/{service}/aws4_request"
    request = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    key = f"AWS4{keys.secret}".encode()
    for part in (day, region, service, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    proof = hmac.digest(key, f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{request}".encode(), "sha256").hex()
    credential = f"Credential={keys.access}/{scope}, SignedHeaders={names}, Signature={proof}"
    return {**added, "Authorization": f"AWS4-HMAC-SHA256 {credential}"}


def _ask(
    address: str, method: str, path: str, headers: dict[str, str], body: bytes | None = None, seconds: float = SECONDS
) -> bytes:
    """The body of a 200. Raises Unreachable, or Refused with the error that an AWS service names in its body."""
    where = urlsplit(address)
    kind = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
    connection = kind(where.netloc, timeout=seconds)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(str(error) or type(error).__name__) from None
    finally:
        connection.close()
    if answer.status == 200:
        return content
    try:
        said = json.loads(content)
        code = str(said.get("__type") or said["code"]).split("#")[-1]
        raise Refused(code, str(said.get("message") or said.get("Message") or ""))
    except (ValueError, KeyError, AttributeError):
        raise Refused(f"HTTP {answer.status}", "") from None
