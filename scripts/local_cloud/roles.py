"""What instance roles are given to sign with: temporary credentials that the AWS APIs and the object store both know.

A session is a token in the form SeaweedFS's own STS issues (a signed JWT; the keys follow from the session's id and
the signing key), so the object store accepts it without being told, and holds its bearer to the role's policies, which
the token carries. The same session is recorded in moto's STS, so that the APIs know who is asking; what they may ask
for is held to the role's policies before moto hears of it (permissions.py).
"""

from __future__ import annotations

import base64
import contextlib
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
from moto.sts.models import sts_backends

from local_cloud import object_store, permissions
from local_cloud.state import ACCOUNT, Allotment, Places

VALID_SECONDS = 6 * 3600
RENEW_SECONDS = 3600
"""As on EC2: credentials are good for six hours and new ones appear every hour."""


@dataclass(frozen=True)
class Session:
    access_key: str
    secret_key: str
    token: str
    issued: float
    policies: str


class Roles:
    """Sessions handed out since the daemon started, by instance and role. Call with the API lock held."""

    def __init__(self, places: Places, allotment: Allotment) -> None:
        self.region = allotment.region
        self.signing_key = object_store.signing_key(places)
        self.sessions: dict[tuple[str, str], Session] = {}
        # SeaweedFS's access keys have small letters too, which moto would not take for one
        BaseResponse.access_key_regex = re.compile(
            r"AWS.*(?P<access_key>(?<![A-Za-z0-9])[A-Za-z0-9]{20}(?![A-Za-z0-9]))[:/]"
        )

    def credentials(self, instance: str, role: Any) -> dict[str, Any]:
        """The document at iam/security-credentials/<role>; `role` is moto's record."""
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
        """Why a request made with a role's credentials is not answered; None for what the role's policies, as they
        are now, allow, and for requests with keys that do not expire, which are the account owner's."""
        access_key, token = permissions.credential_scope(environ)[0], str(environ.get("HTTP_X_AMZ_SECURITY_TOKEN", ""))
        if not token and not access_key.startswith("ASIA"):
            return None
        caller = self._caller(access_key, token)
        role = None if caller is None else _role_named(caller.split("/")[-2])
        if caller is None or role is None:
            return permissions.unknown_caller(request.service)
        return permissions.denial(request, caller, policy_documents(role))

    def _caller(self, access_key: str, token: str) -> str | None:
        """The assumed role behind credentials that are good now: a session of an instance, or one by AssumeRole."""
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
        record.access_key_id = record.access_key.access_key_id = session.access_key
        record.secret_access_key = record.access_key.secret_access_key = session.secret_key
        record.session_token = session.token
        now = time.time()
        sts.assumed_roles[:] = [known for known in sts.assumed_roles if known.expiration.timestamp() > now]
        return session


def mint(signing_key: bytes, name: str, role_arn: str, policy: str) -> Session:
    """A session as SeaweedFS 4 issues it: an HS256 JWT, and keys derived from the session's id."""
    identifier, now = uuid.uuid4().hex, time.time()
    role_name = role_arn.rpartition("/")[2]
    assumed = f"arn:aws:sts::{ACCOUNT}:assumed-role/{role_name}/{name}"
    claims = {
        "iss": object_store.ISSUER,
        "sub": identifier,
        "iat": int(now),
        "nbf": int(now),
        "exp": int(now + VALID_SECONDS),
        "sid": identifier,
        "snam": name,
        "typ": "session",
        "role": f"arn:aws:iam::{ACCOUNT}:role/{object_store.INSTANCE_ROLE}",
        "assumed": assumed,
        "principal": f"arn:aws:sts::{ACCOUNT}:assumed-role/{object_store.INSTANCE_ROLE}/{name}",
        "pol": [object_store.INSTANCE_POLICY],
        "spol": policy,
        "assumed_at": _timestamp(now),
        "max_dur": VALID_SECONDS,
    }
    signed = _encode({"alg": "HS256", "typ": "JWT"}) + b"." + _encode(claims)
    signature = _signature(signed, signing_key)
    secret = hmac.new(signing_key, f"secret-key:{identifier}".encode(), hashlib.sha256).digest()
    return Session(
        access_key=_access_key(identifier),
        secret_key=base64.b64encode(secret).decode(),
        token=(signed + b"." + _unpadded(signature)).decode(),
        issued=now,
        policies=policy,
    )


def policy_documents(role: Any) -> list[Mapping[str, Any]]:
    """A role's inline and attached policies."""
    iam: Any = iam_backends[ACCOUNT]["aws"]
    documents = [json.loads(iam.get_role_policy(role.name, name)[1]) for name in iam.list_role_policies(role.name)]
    attached, _ = iam.list_attached_role_policies(role.name)
    for policy in attached:
        version = next((v for v in policy.versions if v.is_default), None)
        document = version.document if version else policy.document
        documents.append(json.loads(document) if isinstance(document, str) else document)
    return documents


def s3_policy(documents: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One policy of the statements that speak of S3; denies everything when there is none."""
    statements = []
    for document in documents:
        found = document.get("Statement", [])
        for statement in [found] if isinstance(found, Mapping) else found:
            actions = statement.get("Action", [])
            relevant = [a for a in ([actions] if isinstance(actions, str) else actions) if a.startswith(("s3:", "*"))]
            if relevant:
                statements.append({**statement, "Action": relevant})
    if not statements:
        statements = [{"Effect": "Deny", "Action": ["s3:*"], "Resource": ["*"]}]
    return {"Version": "2012-10-17", "Statement": statements}


def _access_key(session: str) -> str:
    return "ASIA" + hashlib.sha256(f"access-key:{session}".encode()).hexdigest()[:16]


def _role_named(name: str) -> Any:
    iam: Any = iam_backends[ACCOUNT]["aws"]
    return next((role for role in iam.roles.values() if role.name == name), None)


def _verified(token: str, signing_key: bytes) -> dict[str, Any]:
    """What a token of ours claims. Raises ValueError for any other."""
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
