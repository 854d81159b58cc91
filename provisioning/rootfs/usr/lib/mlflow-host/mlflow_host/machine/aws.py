"""Call AWS with the instance's role: Systems Manager, CloudWatch metrics and STS. Sign logins to Amazon RDS.

This module imports only the standard library, because the import of botocore would take 0.5 s of processor time in each
boot step, and every minute in the users timer. Requests are signed with Signature Version 4. A test compares a
signature of this module with botocore's signature for the same request.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode, urlsplit
from xml.etree import ElementTree

from mlflow_host.contract.launch import LaunchDocument

METADATA = "http://169.254.169.254"
SECONDS = 5
"""Timeout of a request. When AWS attaches the Elastic IP, open connections hang without a reset. Callers then retry."""


class NoRole(Exception):
    """The instance metadata service returns no credentials."""


class ServiceUnreachable(Exception):
    """The connection to the AWS service failed. The message is the reason."""


class ServiceError(Exception):
    """The AWS service returned an error. `code` is the error code of AWS."""

    def __init__(self, code: str, message: str):
        self.code = code
        super().__init__(f"{code}: {message}" if message else code)


@dataclass(frozen=True)
class Keys:
    """Temporary credentials of a role."""

    access: str
    secret: str
    token: str
    expires: str = ""
    """Expiry time in ISO 8601, or "" if no caller needs the time."""


def role_keys(metadata: str = METADATA) -> Keys:
    """Read the role's credentials from the instance metadata service (IMDSv2). Raises NoRole."""
    try:
        token = _request(
            metadata, "PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, seconds=2
        )
        header = {"X-aws-ec2-metadata-token": token.decode()}
        folder = "/latest/meta-data/iam/security-credentials/"
        role = _request(metadata, "GET", folder, header, seconds=2).decode().split()[0]
        given = json.loads(_request(metadata, "GET", folder + role, header, seconds=2))
        return Keys(given["AccessKeyId"], given["SecretAccessKey"], given["Token"], given.get("Expiration", ""))
    except (ServiceUnreachable, ServiceError, ValueError, KeyError, IndexError) as error:
        raise NoRole(str(error)) from None


def get_parameter(document: LaunchDocument, name: str, keys: Keys) -> str:
    """The decrypted value of a parameter. Raises ServiceUnreachable or ServiceError (for example ParameterNotFound)."""
    answer = _ssm(document, "GetParameter", {"Name": name, "WithDecryption": True}, keys)
    return str(answer["Parameter"]["Value"])


def put_parameter(document: LaunchDocument, name: str, value: str, keys: Keys) -> None:
    """Create or overwrite a parameter of type String. Raises ServiceUnreachable or ServiceError."""
    _ssm(document, "PutParameter", {"Name": name, "Value": value, "Type": "String", "Overwrite": True}, keys)


def call_query_api(
    document: LaunchDocument, service: str, endpoint: str, body: bytes, keys: Keys, now: datetime
) -> None:
    """Send a request in AWS's Query protocol, and ignore the response. Raises ServiceUnreachable or ServiceError."""
    address = endpoint or regional_address(document.stack.region, service)
    headers = {"Content-Type": "application/x-www-form-urlencoded; charset=utf-8", "Accept": "application/json"}
    headers |= signature(address, headers, body, document.stack.region, service, keys, now)
    _request(address, "POST", "/", headers, body)


def assume_role(document: LaunchDocument, role: str, keys: Keys, now: datetime) -> Keys:
    """Call AssumeRole. The credentials are valid for one hour, STS's maximum if one role assumes another role.

    Raises ServiceUnreachable or ServiceError."""
    arguments = {
        "Action": "AssumeRole",
        "Version": "2011-06-15",
        "RoleArn": role,
        "RoleSessionName": "mlflow-server",
        "DurationSeconds": "3600",
    }
    address, body = sts_address(document), urlencode(arguments).encode()
    headers = {"Content-Type": "application/x-www-form-urlencoded; charset=utf-8"}
    headers |= signature(address, headers, body, document.stack.region, "sts", keys, now)
    answer = _request(address, "POST", "/", headers, body)
    try:
        found = {each.tag.rpartition("}")[2]: each.text or "" for each in ElementTree.fromstring(answer).iter()}
        return Keys(found["AccessKeyId"], found["SecretAccessKey"], found["SessionToken"], found["Expiration"])
    except (ElementTree.ParseError, KeyError):
        raise ServiceUnreachable(f"{address} does not answer as AWS STS does") from None


def sts_address(document: LaunchDocument) -> str:
    return document.endpoints.sts or regional_address(document.stack.region, "sts")


def ssm_address(document: LaunchDocument) -> str:
    return document.endpoints.ssm or regional_address(document.stack.region, "ssm")


def regional_address(region: str, service: str) -> str:
    """The URL of AWS's public endpoint for a service."""
    return f"https://{service}.{region}.{'amazonaws.com.cn' if region.startswith('cn-') else 'amazonaws.com'}"


def _ssm(document: LaunchDocument, action: str, arguments: dict[str, Any], keys: Keys) -> dict[str, Any]:
    address, body = ssm_address(document), json.dumps(arguments).encode()
    headers = {"Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": f"AmazonSSM.{action}"}
    headers |= signature(address, headers, body, document.stack.region, "ssm", keys, datetime.now(UTC))
    answer: dict[str, Any] = json.loads(_request(address, "POST", "/", headers, body) or b"{}")
    return answer


def signature(
    address: str, headers: dict[str, str], body: bytes, region: str, service: str, keys: Keys, now: datetime
) -> dict[str, str]:
    """The headers with Signature Version 4 for a POST request that sends `body` to the path / of `address`."""
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
    proof = _proof(lines, stamp, scope, keys)
    credential = f"Credential={keys.access}/{scope}, SignedHeaders={names}, Signature={proof}"
    return {**added, "Authorization": f"AWS4-HMAC-SHA256 {credential}"}


def database_token(host: str, port: int, role: str, region: str, keys: Keys, now: datetime) -> str:
    """The password for IAM authentication of a PostgreSQL role in Amazon RDS. The token is signed without a request to
    AWS, and RDS accepts it for 15 minutes. The owner of `keys` needs the permission rds-db:connect for the role."""
    stamp, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    scope = f"{day}/{region}/rds-db/aws4_request"
    query = {
        "Action": "connect",
        "DBUser": role,
        "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
        "X-Amz-Credential": f"{keys.access}/{scope}",
        "X-Amz-Date": stamp,
        "X-Amz-Expires": "900",
        "X-Amz-Security-Token": keys.token,
        "X-Amz-SignedHeaders": "host",
    }
    signed = urlencode(query, quote_via=quote, safe="-_.~")
    lines = ["GET", "/", signed, f"host:{host}:{port}", "", "host", hashlib.sha256(b"").hexdigest()]
    return f"{host}:{port}/?{signed}&X-Amz-Signature={_proof(lines, stamp, scope, keys)}"


def _proof(lines: list[str], stamp: str, scope: str, keys: Keys) -> str:
    """The signature of a canonical request, which is given as its lines."""
    request = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    key = f"AWS4{keys.secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return hmac.digest(key, f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{request}".encode(), "sha256").hex()


def _request(
    address: str, method: str, path: str, headers: dict[str, str], body: bytes | None = None, seconds: float = SECONDS
) -> bytes:
    """Return the response's body. Raises ServiceError with the error code from the body if the status is not 200, and
    ServiceUnreachable if the connection fails."""
    where = urlsplit(address)
    kind = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
    connection = kind(where.netloc, timeout=seconds)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise ServiceUnreachable(str(error) or type(error).__name__) from None
    finally:
        connection.close()
    if answer.status == 200:
        return content
    if named := re.search(rb"<Code>(\w+)</Code>", content):
        message = re.search(rb"<Message>([^<]*)</Message>", content)
        raise ServiceError(named[1].decode(), message[1].decode(errors="replace") if message else "")
    try:
        found = json.loads(content)
        code = str(found.get("__type") or found["code"]).split("#")[-1]
        raise ServiceError(code, str(found.get("message") or found.get("Message") or ""))
    except (ValueError, KeyError, AttributeError):
        raise ServiceError(f"HTTP {answer.status}", "") from None
