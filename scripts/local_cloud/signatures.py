"""Verify requests to the local cloud's APIs: check the signature and the host name, and refuse requests of web pages.

moto accepts any access key. Signatures are therefore verified before moto handles a request, as described in "Create a
signed AWS API request" (AWS Signature Version 4, IAM user guide). A page of any web site can make a browser send
requests to a port of this host. A web page's request has an Origin header, or its Host header is a DNS name that
resolves to 127.0.0.1.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from calendar import timegm
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import quote, unquote

from scripts.local_cloud import permissions
from scripts.local_cloud.permissions import Denial

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
ALGORITHM = "AWS4-HMAC-SHA256"
SKEW_SECONDS = 900
"""A signature is valid for this number of seconds before and after its time stamp, as in AWS."""

SecretOf = Callable[[str, str], "str | None"]
"""Function (access key, session token) → secret key. Returns None for an unknown access key."""


def of_a_page(environ: Mapping[str, Any], ports: Iterable[int]) -> str | None:
    """Return the reason why a request may come from a web page, or None for a program's request. A request with an
    Origin header is refused. The Host header must be a loopback name, without a port or with one of `ports`."""
    if origin := environ.get("HTTP_ORIGIN"):
        return f"the local cloud refuses requests of web pages (Origin: {origin!r}): send no Origin header"
    host = environ.get("HTTP_HOST", "")
    # pgBackRest sends a Host header without the port.
    if host not in {*LOOPBACK, *(f"{name}:{port}" for name in LOOPBACK for port in ports)}:
        return f"the local cloud does not serve the host {host!r}: use 127.0.0.1 with its port"
    return None


def problem(environ: Mapping[str, Any], body: bytes, secret_of: SecretOf, now: float | None = None) -> Denial | None:
    """Return None if a request's signature is valid. Otherwise, return the reason in AWS's wording."""
    access_key, day, region, service = permissions.credential_scope(environ)
    header = str(environ.get("HTTP_AUTHORIZATION", ""))
    if not access_key or not header.startswith(f"{ALGORITHM} "):
        return Denial("MissingAuthenticationToken", "Request is missing Authentication Token")
    secret = secret_of(access_key, str(environ.get("HTTP_X_AMZ_SECURITY_TOKEN", "")))
    if secret is None:
        return permissions.unknown_caller(service)
    stamp = str(environ.get("HTTP_X_AMZ_DATE", ""))
    if not re.fullmatch(r"\d{8}T\d{6}Z", stamp, re.ASCII) or stamp[:8] != day:
        return Denial("IncompleteSignature", "Date must be in X-Amz-Date and be the day of the credential scope")
    names = _part(header, "SignedHeaders").split(";")
    if not {"host", "x-amz-date"} <= set(names):
        return Denial("IncompleteSignature", "the headers host and x-amz-date must be signed")
    try:
        signed_at = timegm(time.strptime(stamp, "%Y%m%dT%H%M%SZ"))
    except ValueError:
        return Denial("IncompleteSignature", f"{stamp} is no time")
    if abs(signed_at - (time.time() if now is None else now)) > SKEW_SECONDS:
        return Denial("RequestExpired" if service == "ec2" else "SignatureDoesNotMatch", f"Signature expired: {stamp}")
    digest = digest_of(body)
    if environ.get("HTTP_X_AMZ_CONTENT_SHA256", digest) != digest:
        return Denial("SignatureDoesNotMatch", "the body is not the one whose digest was signed")
    scope = f"{day}/{region}/{service}/aws4_request"
    expected = signature(secret, stamp, scope, canonical_request(environ, names, digest, service))
    if not hmac.compare_digest(expected.encode(), _part(header, "Signature").encode()):
        return Denial(
            "SignatureDoesNotMatch",
            "The request signature we calculated does not match the signature you provided. Check your AWS Secret "
            "Access Key and signing method.",
        )
    return None


def signature(secret: str, stamp: str, scope: str, canonical: str) -> str:
    """Return the signature of a canonical request."""
    key = f"AWS4{secret}".encode()
    for step in scope.split("/"):
        key = hmac.digest(key, step.encode(), "sha256")
    text = f"{ALGORITHM}\n{stamp}\n{scope}\n{digest_of(canonical.encode())}"
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def digest_of(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def canonical_request(environ: Mapping[str, Any], names: Iterable[str], digest: str, service: str) -> str:
    """Return the text that the client signed. In this text, the path of an S3 request is unchanged, and the path of any
    other request is URL-encoded a second time."""
    path, _, query = str(environ["RAW_URI"]).partition("?")
    pairs = [part.partition("=")[::2] for part in query.split("&") if part]
    encoded = sorted((_encoded(unquote(name)), _encoded(unquote(value))) for name, value in pairs)
    headers = "".join(f"{name}:{' '.join(_header(environ, name).split())}\n" for name in names)
    return "\n".join(
        [
            str(environ["REQUEST_METHOD"]),
            path if service == "s3" else quote(path, safe="/-_.~"),
            "&".join(f"{name}={value}" for name, value in encoded),
            headers,
            ";".join(names),
            digest,
        ]
    )


def without_cors(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Remove CORS headers, because moto's CORS headers would allow pages of every web site to use the APIs."""
    return [(name, value) for name, value in headers if not name.lower().startswith("access-control-")]


def _encoded(text: str) -> str:
    return quote(text, safe="-_.~")


def _header(environ: Mapping[str, Any], name: str) -> str:
    key = name.upper().replace("-", "_")
    return str(environ.get(key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}", ""))


def _part(header: str, name: str) -> str:
    found = re.search(rf"[\s,]{name}=([^,\s]+)", header)
    return found[1] if found else ""
