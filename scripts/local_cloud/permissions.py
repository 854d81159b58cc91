"""What the policies of a role allow, asked before moto answers a request made with a role's credentials.

moto checks no resource and no condition; this does, as "Policy evaluation logic" in the IAM user guide has it: one
statement that denies outweighs all that allow, and what nothing allows is denied. Of a request this knows the action,
the resource where the action is one that this project's stack names resources for, and few condition keys. Whatever it
does not know speaks against the request: an unknown resource is matched by "*" alone, an unknown condition allows
nothing and denies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from local_cloud.state import ACCOUNT

PREFIXES = {"monitoring": "cloudwatch", "email": "ses"}
"""Where a service signs under another name than policies call it by."""

PARAMETERS = {"Name": str, "Names": list, "ResourceId": str, "Path": str}
"""By what a call to Systems Manager names parameters."""


@dataclass(frozen=True)
class Request:
    """What policies are asked about: "ssm:GetParameter", the ARNs it is for ("*" where unknown), and the context."""

    service: str
    """As it signs."""
    action: str
    resources: tuple[str, ...]
    context: Mapping[str, str]


@dataclass(frozen=True)
class Denial:
    """Why a request is refused, in AWS's words."""

    code: str
    message: str


def read(environ: Mapping[str, Any], body: bytes, action: str, parameters: Mapping[str, str]) -> Request:
    """A signed request as policies see it; `action` and `parameters` as the daemon has read them, "" for REST."""
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
    """Access key, day, region and service of the signature; empty texts for a request without one."""
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
    if prefix == "sts" and asked.get("RoleArn"):
        return (str(asked["RoleArn"]),)
    if prefix == "iam" and asked.get("RoleName"):
        return (f"arn:aws:iam::{ACCOUNT}:role/{asked['RoleName']}",)
    return ("*",)


def parameter_arn(region: str, name: str) -> str:
    """A parameter's, which has no version or label in it; a name may be one already."""
    if name.startswith("arn:"):
        return ":".join(name.split(":")[:6])
    return f"arn:aws:ssm:{region}:{ACCOUNT}:parameter/{name.partition(':')[0].lstrip('/')}"


def denial(request: Request, caller: str, documents: Iterable[Mapping[str, Any]]) -> Denial | None:
    """None when the documents of the caller's role allow the request for every resource."""
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
    """For credentials that are nobody's, or nobody's any more."""
    if service == "ec2":
        return Denial("AuthFailure", "AWS was not able to validate the provided access credentials")
    code = "InvalidClientTokenId" if service in ("sts", "iam") else "UnrecognizedClient"
    return Denial(code, "The security token included in the request is invalid.")


def applies(statement: Mapping[str, Any], request: Request, resource: str) -> bool:
    """Whether a statement speaks of this request."""
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
    """IAM's wildcards: * for any text, ? for one character, and nothing else."""
    expression = "".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in pattern)
    return re.fullmatch(expression, value, re.DOTALL | (re.IGNORECASE if ignore_case else 0)) is not None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def answer(environ: Mapping[str, Any], refused: Denial) -> tuple[str, list[tuple[str, str]], bytes]:
    """Status, headers and body of a refusal, in the protocol of the request."""
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
