"""Check whether a role's IAM policies allow a request with the role's credentials, before moto handles the request.

moto does not check resources and conditions. This module follows "Policy evaluation logic" in the IAM user guide: a
Deny statement overrides all Allow statements, and a request without an Allow statement is denied. This module checks
the request's action and a few condition keys. The module determines the request's resource only for some actions of
SSM, CloudWatch Logs, STS, Secrets Manager, RDS and IAM. For other actions, the resource is unknown, and only a
statement for "*" applies. An Allow statement with an unknown condition operator does not apply.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from scripts.local_cloud.layout import ACCOUNT

PREFIXES = {"monitoring": "cloudwatch", "email": "ses"}
"""Services with two names: name in signatures → name in policies."""

PARAMETERS = {"Name": str, "Names": list, "ResourceId": str, "Path": str}
"""Mapping: argument of Systems Manager's API calls that contains parameter names → type of the argument."""


@dataclass(frozen=True)
class Request:
    """A request in the terms of IAM: an action such as "ssm:GetParameter", ARNs ("*" if unknown), and the context."""

    service: str
    """The service's name in the signature."""
    action: str
    resources: tuple[str, ...]
    context: Mapping[str, str]


@dataclass(frozen=True)
class Denial:
    """The error code and message of a refused request, in AWS's wording."""

    code: str
    message: str


def read(environ: Mapping[str, Any], body: bytes, action: str, parameters: Mapping[str, str]) -> Request:
    """Convert a signed request to the terms of IAM policies. The daemon parses `action` and `parameters` from the
    request; `action` is "" for REST services."""
    _, _, region, service = credential_scope(environ)
    asked: Mapping[str, Any] = parameters
    if environ.get("HTTP_X_AMZ_TARGET"):
        try:
            asked = dict(json.loads(body or b"{}"))
        except (ValueError, TypeError):
            asked = {}
    prefix = PREFIXES.get(service, service)
    name = action or f"{environ['REQUEST_METHOD']}:{environ.get('PATH_INFO', '')}"
    context = {"aws:RequestedRegion": region, "aws:SecureTransport": "true"}
    if prefix == "cloudwatch" and isinstance(namespace := asked.get("Namespace"), str):
        context["cloudwatch:namespace"] = namespace
    return Request(service, f"{prefix}:{name}", resources(prefix, region, asked), context)


def credential_scope(environ: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Return the signature's access key, day, region and service, or empty strings if the request has no signature."""
    found = re.search(
        r"Credential=([^/,\s]+)/(\d+)/([^/,\s]+)/([^/,\s]+)/aws4_request", environ.get("HTTP_AUTHORIZATION", "")
    )
    return (found[1], found[2], found[3], found[4]) if found else ("", "", "", "")


def resources(prefix: str, region: str, asked: Mapping[str, Any]) -> tuple[str, ...]:
    if prefix == "ssm":
        given = [asked[key] for key, kind in PARAMETERS.items() if isinstance(asked.get(key), kind)]
        names = [name for each in given for name in (each if isinstance(each, list) else [each])]
        if names:
            return tuple(parameter_arn(region, str(name)) for name in names)
    if prefix == "logs" and asked.get("logGroupName"):
        stream = f":log-stream:{asked['logStreamName']}" if asked.get("logStreamName") else ""
        return (f"arn:aws:logs:{region}:{ACCOUNT}:log-group:{asked['logGroupName']}{stream}",)
    if prefix == "sts" and asked.get("RoleArn"):
        return (str(asked["RoleArn"]),)
    if prefix == "secretsmanager" and str(asked.get("SecretId")).startswith("arn:"):
        return (str(asked["SecretId"]),)
    if prefix == "rds" and asked.get("DBInstanceIdentifier"):
        return (f"arn:aws:rds:{region}:{ACCOUNT}:db:{asked['DBInstanceIdentifier']}",)
    if prefix == "iam" and asked.get("RoleName"):
        return (f"arn:aws:iam::{ACCOUNT}:role/{asked['RoleName']}",)
    return ("*",)


def parameter_arn(region: str, name: str) -> str:
    """Return a parameter's ARN, without version or label. `name` is the parameter's name or ARN."""
    if name.startswith("arn:"):
        return ":".join(name.split(":")[:6])
    return f"arn:aws:ssm:{region}:{ACCOUNT}:parameter/{name.partition(':')[0].lstrip('/')}"


def denial(request: Request, caller: str, documents: Iterable[Mapping[str, Any]]) -> Denial | None:
    """Return None if the policy documents of the caller's role allow the request for all its resources. Otherwise,
    return the denial."""
    if request.action == "sts:GetCallerIdentity":
        return None
    statements = [statement for document in documents for statement in _listed(document.get("Statement", []))]
    for resource in request.resources:
        if any(applies(each, request, resource) for each in statements if each["Effect"] == "Deny"):
            return _denial(request, caller, resource, "with an explicit deny in an identity-based policy")
        if not any(applies(each, request, resource) for each in statements if each["Effect"] == "Allow"):
            reason = f"because no identity-based policy allows the {request.action} action"
            return _denial(request, caller, resource, reason)
    return None


def _denial(request: Request, caller: str, resource: str, reason: str) -> Denial:
    on = "" if resource == "*" else f"on resource: {resource} "
    said = f"User: {caller} is not authorized to perform: {request.action} {on}{reason}"
    if request.service == "ec2":
        return Denial("UnauthorizedOperation", f"You are not authorized to perform this operation. {said}")
    return Denial("AccessDenied", said)


def unknown_caller(service: str) -> Denial:
    """Return the denial for credentials that do not exist or have expired."""
    if service == "ec2":
        return Denial("AuthFailure", "AWS was not able to validate the provided access credentials")
    code = "InvalidClientTokenId" if service in ("sts", "iam") else "UnrecognizedClient"
    return Denial(code, "The security token included in the request is invalid.")


def applies(statement: Mapping[str, Any], request: Request, resource: str) -> bool:
    """Return whether a policy statement applies to this request."""
    for key, value, ignore_case in (("Action", request.action, True), ("Resource", resource, False)):
        if key in statement and not any(matches(each, value, ignore_case) for each in _listed(statement[key])):
            return False
        excluded = _listed(statement.get(f"Not{key}", []))
        if any(matches(each, value, ignore_case) for each in excluded):
            return False
    unknown = statement["Effect"] == "Deny"
    return all(
        _holds(operator, request.context.get(name), [str(each) for each in _listed(wanted)], unknown)
        for operator, tests in statement.get("Condition", {}).items()
        for name, wanted in tests.items()
    )


OPERATORS: dict[str, Callable[[str, str], bool]] = {
    "StringEquals": lambda wanted, value: wanted == value,
    "StringEqualsIgnoreCase": lambda wanted, value: wanted.lower() == value.lower(),
    "StringLike": lambda wanted, value: matches(wanted, value),
    "ArnEquals": lambda wanted, value: matches(wanted, value),
    "ArnLike": lambda wanted, value: matches(wanted, value),
    "Bool": lambda wanted, value: wanted.lower() == value.lower(),
}


def _holds(operator: str, value: str | None, wanted: list[str], unknown: bool) -> bool:
    base, if_exists = operator.removesuffix("IfExists"), operator.endswith("IfExists")
    negated = base.replace("Not", "", 1) in OPERATORS and "Not" in base
    test = OPERATORS.get(base.replace("Not", "", 1) if negated else base)
    if test is None:
        return unknown
    if value is None:
        return if_exists or negated or unknown
    return any(test(each, value) for each in wanted) is not negated


def matches(pattern: str, value: str, ignore_case: bool = False) -> bool:
    """Return whether `value` matches IAM's pattern. IAM's only wildcards are * for any text and ? for one character."""
    expression = "".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in pattern)
    return re.fullmatch(expression, value, re.DOTALL | (re.IGNORECASE if ignore_case else 0)) is not None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def answer(environ: Mapping[str, Any], refused: Denial) -> tuple[str, list[tuple[str, str]], bytes]:
    """Return the status, headers and body of a refusal, in the protocol of the request."""
    service, identifier = credential_scope(environ)[3], "00000000-0000-0000-0000-000000000000"
    code, message = escape(refused.code), escape(refused.message)
    if environ.get("HTTP_X_AMZ_TARGET"):
        text = {"__type": f"{refused.code.removesuffix('Exception')}Exception", "message": refused.message}
        return "400 Bad Request", [("Content-Type", "application/x-amz-json-1.1")], json.dumps(text).encode()
    if service == "ec2":
        xml = f"<Response><Errors><Error><Code>{code}</Code><Message>{message}</Message></Error></Errors>"
        xml += f"<RequestID>{identifier}</RequestID></Response>"
    else:
        xml = f"<ErrorResponse><Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error>"
        xml += f"<RequestId>{identifier}</RequestId></ErrorResponse>"
    return "403 Forbidden", [("Content-Type", "text/xml")], xml.encode()
