"""Temporary credentials of instance roles, valid for the AWS APIs and the object store.

A session's token is a signed JWT in the form of SeaweedFS's own STS. The access key and the secret key are derived from
the session's ID and the signing key. The token contains the role's policies, so the object store enforces the policies
and needs no registration of the session. moto's STS also records the session, so that the APIs identify the caller.
permissions.py enforces the role's policies before moto handles a request.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import hmac
import json
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moto.core.responses import BaseResponse
from moto.iam.models import iam_backends
from moto.sts.models import STSBackend, sts_backends

from scripts.local_cloud import object_store, permissions
from scripts.local_cloud.layout import ACCOUNT, Allotment, Places

VALID_SECONDS = 6 * 3600
RENEW_SECONDS = 3600
"""Credentials are valid for six hours and renewed every hour, as on EC2."""


@dataclass(frozen=True)
class Session:
    access_key: str
    secret_key: str
    token: str
    issued: float
    policies: str


class Roles:
    """The sessions of instance roles that this daemon created. Callers of these methods must hold the API lock."""

    def __init__(self, places: Places, allotment: Allotment) -> None:
        self.region = allotment.region
        self.account = (allotment.access_key, allotment.secret_key)
        self.signing_key = object_store.signing_key(places)
        self.sessions: dict[tuple[str, str], Session] = {}
        answer_assume_role(self.signing_key)
        # The access keys of sessions contain lower-case letters, which moto's own pattern does not accept.
        BaseResponse.access_key_regex = re.compile(
            r"AWS.*(?P<access_key>(?<![A-Za-z0-9])[A-Za-z0-9]{20}(?![A-Za-z0-9]))[:/]"
        )

    def credentials(self, instance: str, role: Any) -> dict[str, Any]:
        """Return the metadata document iam/security-credentials/<role>. `role` is moto's record of the role."""
        policies = json.dumps(s3_policy(policy_documents(role)))
        session = self.sessions.get((instance, role.name))
        if session is None or session.issued < time.time() - RENEW_SECONDS or session.policies != policies:
            session = self._open(instance, role, policies)
            self.sessions[instance, role.name] = session
        return {
            "Code": "Success",
            "LastUpdated": _timestamp(session.issued),
            "Type": "AWS-HMAC",
            "AccessKeyId": session.access_key,
            "SecretAccessKey": session.secret_key,
            "Token": session.token,
            "Expiration": _timestamp(session.issued + VALID_SECONDS),
        }

    def refusal(self, environ: Mapping[str, Any], request: permissions.Request) -> permissions.Denial | None:
        """Return the denial of a request with a role's credentials, or None if the role's current policies allow the
        request. Requests with permanent keys are allowed, because these keys belong to the account owner."""
        access_key, token = permissions.credential_scope(environ)[0], str(environ.get("HTTP_X_AMZ_SECURITY_TOKEN", ""))
        if not token and not access_key.startswith("ASIA"):
            return None
        caller = self._caller(access_key, token)
        role = None if caller is None else _role_named(caller.split("/")[-2])
        if caller is None or role is None:
            return permissions.unknown_caller(request.service)
        return permissions.denial(request, caller, policy_documents(role)) or untrusted(request, role.arn, caller)

    def secret(self, access_key: str, token: str) -> str | None:
        """Return the secret key of the account's own access key or of a session. Returns None for an unknown access
        key, and for a session's access key without the session's token."""
        if not token:
            return self.account[1] if hmac.compare_digest(access_key.encode(), self.account[0].encode()) else None
        with contextlib.suppress(ValueError, KeyError):
            claims = _verified(token, self.signing_key)
            return _secret_key(claims["sid"], self.signing_key) if access_key == _access_key(claims["sid"]) else None
        sts: Any = sts_backends[ACCOUNT]["aws"]
        record = sts.get_assumed_role_from_access_key(access_key)
        return str(record.secret_access_key) if record is not None and record.session_token == token else None

    def _caller(self, access_key: str, token: str) -> str | None:
        """Return the ARN of the assumed role for valid credentials of an instance or of AssumeRole, otherwise None."""
        with contextlib.suppress(ValueError, KeyError):
            claims = _verified(token, self.signing_key)
            good = claims["nbf"] <= time.time() < claims["exp"] and access_key == _access_key(claims["sid"])
            return str(claims["assumed"]) if good else None
        sts: Any = sts_backends[ACCOUNT]["aws"]
        record = sts.get_assumed_role_from_access_key(access_key)
        return str(record.arn) if record is not None and record.session_token == token else None

    def _open(self, instance: str, role: Any, policies: str) -> Session:
        session = mint(self.signing_key, instance, role.arn, policies)
        sts: Any = sts_backends[ACCOUNT]["aws"]
        record = sts.assume_role(self.region, instance, role.arn, "", VALID_SECONDS, "")
        give(record, session)
        now = time.time()
        sts.assumed_roles[:] = [known for known in sts.assumed_roles if known.expiration.timestamp() > now]
        return session


def give(record: Any, session: Session) -> None:
    """Write the session's keys and token to moto's record of an assumed role."""
    record.access_key_id = record.access_key.access_key_id = session.access_key
    record.secret_access_key = record.access_key.secret_access_key = session.secret_key
    record.session_token = session.token


def answer_assume_role(signing_key: bytes) -> None:
    """Change moto's AssumeRole to return sessions of `mint`. The object store also accepts these sessions."""
    assume_role = getattr(STSBackend.assume_role, "__wrapped__", STSBackend.assume_role)

    @functools.wraps(assume_role)
    def with_session(self: Any, *arguments: Any, **options: Any) -> Any:
        record = assume_role(self, *arguments, **options)
        role = _role_named(record.role_arn.rpartition("/")[2])
        if role is not None:
            policies = json.dumps(s3_policy(policy_documents(role)))
            seconds = round(record.expiration.timestamp() - time.time())
            give(record, mint(signing_key, record.session_name, role.arn, policies, seconds))
        return record

    STSBackend.assume_role = with_session  # type: ignore[method-assign]


def untrusted(request: permissions.Request, caller_role: str, caller: str) -> permissions.Denial | None:
    """Return a denial if the role in an AssumeRole request does not trust the caller's role, otherwise None. For other
    actions, return None."""
    if request.action != "sts:AssumeRole":
        return None
    (wanted,) = request.resources
    role = _role_named(wanted.rpartition("/")[2])
    document = json.loads(role.assume_role_policy_document) if role is not None else {"Statement": []}
    found = document["Statement"]
    for statement in [found] if isinstance(found, Mapping) else found:
        principals = statement.get("Principal", {}).get("AWS", [])
        trusted = [principals] if isinstance(principals, str) else principals
        if statement["Effect"] == "Allow" and caller_role in trusted:
            return None
    return permissions.Denial(
        "AccessDenied", f"User: {caller} is not authorized to perform: sts:AssumeRole on resource: {wanted}"
    )


def mint(signing_key: bytes, name: str, role_arn: str, policy: str, seconds: int = VALID_SECONDS) -> Session:
    """Create a session in the form of SeaweedFS 4: an HS256 JWT, and keys that are derived from the session's ID."""
    identifier, now = uuid.uuid4().hex, time.time()
    role_name = role_arn.rpartition("/")[2]
    assumed = f"arn:aws:sts::{ACCOUNT}:assumed-role/{role_name}/{name}"
    claims = {
        "iss": object_store.ISSUER,
        "sub": identifier,
        "iat": int(now),
        "nbf": int(now),
        "exp": int(now + seconds),
        "sid": identifier,
        "snam": name,
        "typ": "session",
        "role": f"arn:aws:iam::{ACCOUNT}:role/{object_store.INSTANCE_ROLE}",
        "assumed": assumed,
        "principal": f"arn:aws:sts::{ACCOUNT}:assumed-role/{object_store.INSTANCE_ROLE}/{name}",
        "pol": [object_store.INSTANCE_POLICY],
        "spol": policy,
        "assumed_at": _timestamp(now),
        "max_dur": seconds,
    }
    signed = _encode({"alg": "HS256", "typ": "JWT"}) + b"." + _encode(claims)
    signature = _signature(signed, signing_key)
    return Session(
        access_key=_access_key(identifier),
        secret_key=_secret_key(identifier, signing_key),
        token=(signed + b"." + _unpadded(signature)).decode(),
        issued=now,
        policies=policy,
    )


def policy_documents(role: Any) -> list[Mapping[str, Any]]:
    """Return a role's inline policies and attached policies."""
    iam: Any = iam_backends[ACCOUNT]["aws"]
    documents = [json.loads(iam.get_role_policy(role.name, name)[1]) for name in iam.list_role_policies(role.name)]
    attached, _ = iam.list_attached_role_policies(role.name)
    for policy in attached:
        version = next((v for v in policy.versions if v.is_default), None)
        document = version.document if version else policy.document
        documents.append(json.loads(document) if isinstance(document, str) else document)
    return documents


def s3_policy(documents: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one policy with all statements about S3. If `documents` has no such statement, the policy denies all
    requests."""
    statements = []
    for document in documents:
        found = document.get("Statement", [])
        for statement in [found] if isinstance(found, Mapping) else found:
            actions = statement.get("Action", [])
            relevant = [a for a in ([actions] if isinstance(actions, str) else actions) if a.startswith(("s3:", "*"))]
            if relevant:
                statements.append({**statement, "Action": relevant, **_renamed(statement.get("Condition", {}))})
    if not statements:
        statements = [{"Effect": "Deny", "Action": ["s3:*"], "Resource": ["*"]}]
    return {"Version": "2012-10-17", "Statement": statements}


def _renamed(condition: Mapping[str, Any]) -> dict[str, Any]:
    """Return the condition with the key s3:if-none-match renamed to `referer`. store_front.py copies the header
    If-None-Match to the header Referer."""
    tests = {
        operator: {"referer" if key == "s3:if-none-match" else key: wanted for key, wanted in keys.items()}
        for operator, keys in condition.items()
    }
    return {"Condition": tests} if tests else {}


def _access_key(session: str) -> str:
    return "ASIA" + hashlib.sha256(f"access-key:{session}".encode()).hexdigest()[:16]


def _secret_key(session: str, signing_key: bytes) -> str:
    return base64.b64encode(hmac.digest(signing_key, f"secret-key:{session}".encode(), "sha256")).decode()


def _role_named(name: str) -> Any:
    iam: Any = iam_backends[ACCOUNT]["aws"]
    return next((role for role in iam.roles.values() if role.name == name), None)


def _verified(token: str, signing_key: bytes) -> dict[str, Any]:
    """Return the claims in a session's token. Raises ValueError if this cloud did not sign the token."""
    signed, _, signature = token.encode().rpartition(b".")
    if not hmac.compare_digest(_unpadded(_signature(signed, signing_key)), signature):
        raise ValueError("not signed here")
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(signed.partition(b".")[2] + b"=="))
    return claims


def _signature(signed: bytes, signing_key: bytes) -> bytes:
    return hmac.new(signing_key, signed, hashlib.sha256).digest()


def _encode(value: Mapping[str, Any]) -> bytes:
    return _unpadded(json.dumps(value, separators=(",", ":")).encode())


def _unpadded(value: bytes) -> bytes:
    return base64.urlsafe_b64encode(value).rstrip(b"=")


def _timestamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
