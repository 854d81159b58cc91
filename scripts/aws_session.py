"""The AWS session of a script: choose the profile and the region, and convert AWS errors to sentences.

The profile is the argument `profile`, else the value of AWS_PROFILE, else the profile `default`. The region is the
argument `region`, else AWS_REGION, else AWS_DEFAULT_REGION, else the region of the profile, else DEFAULT_REGION.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import boto3
import botocore.session
from botocore import exceptions
from botocore.parsers import ResponseParserError

DEFAULT_REGION = "eu-central-1"
WHERE = f"AWS_REGION, AWS_DEFAULT_REGION or the profile's, else {DEFAULT_REGION}"

ERRORS = (exceptions.BotoCoreError, exceptions.ClientError, ResponseParserError)
"""The exceptions of a call to AWS: AWS refused the call or cannot be reached, or the response cannot be parsed."""

BAD_CREDENTIALS = {
    "AuthFailure", "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidClientTokenId",
    "RequestExpired", "SignatureDoesNotMatch", "UnrecognizedClientException",
}  # fmt: skip
NO_RIGHT = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation"}
NO_LOGIN = (exceptions.SSOError, exceptions.TokenRetrievalError)
NO_CONNECTION = (exceptions.HTTPClientError, exceptions.ConnectionError)


def choose(region: str | None = None, profile: str | None = None) -> boto3.Session:
    """A session that has a profile and a region. Raises botocore's ProfileNotFound."""
    found = boto3.Session(profile_name=profile, region_name=region or region_of_environment())
    return found if found.region_name else boto3.Session(profile_name=profile, region_name=DEFAULT_REGION)


def region_of_environment() -> str | None:
    """The value of AWS_REGION, else the value of AWS_DEFAULT_REGION. boto3 itself does not read AWS_REGION."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None


@functools.cache
def isolated() -> boto3.Session:
    """A session without the user's AWS profiles and configuration. The local cloud has its own access keys."""
    nothing: tuple[None, None, str | None, None] = (None, None, None, None)
    variables = {"profile": nothing, "config_file": (None, None, os.devnull, None)}
    variables["credentials_file"] = variables["config_file"]
    return boto3.Session(botocore_session=botocore.session.Session(session_vars=variables))


def explain(error: Exception, region: str | None = None) -> str:
    """One sentence for an exception of the types in `ERRORS`, with the fault and, if possible, the remedy."""
    if isinstance(error, exceptions.ProfileNotFound):
        known = ", ".join(botocore.session.Session().available_profiles)
        yours = f"choose one of your profiles with AWS_PROFILE or a stack's aws:profile ({known})"
        return f"{brief(error)}: {yours if known else 'you have no profile, so run aws configure'}"
    if isinstance(error, exceptions.NoCredentialsError):
        return "there are no AWS credentials: run aws configure, or set AWS_PROFILE"
    if isinstance(error, NO_LOGIN):
        return f"the SSO login has ended ({brief(error)}): run aws sso login"
    if isinstance(error, exceptions.InvalidRegionError):
        return f"{region!r} is not a region such as {DEFAULT_REGION}"
    if isinstance(error, NO_CONNECTION):
        if region and region not in regions():
            return f"{region} is not a known region ({brief(error)}): correct it, for example to {DEFAULT_REGION}"
        return f"AWS cannot be reached ({brief(error)}): check the network and its proxy settings"
    code = error.response["Error"]["Code"] if isinstance(error, exceptions.ClientError) else ""
    if code in BAD_CREDENTIALS:
        return (
            f"AWS does not accept the credentials ({brief(error)}): check them with aws sts get-caller-identity, and "
            f"check whether {region or 'the region'} is enabled in the account"
        )
    if code in NO_RIGHT:
        return f"the credentials lack a right ({brief(error)}): infra/README.md lists all rights under AWS rights"
    return brief(error)


def brief(error: Exception) -> str:
    """The text of an exception on one line, cut to 300 characters."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) < 300 else f"{text[:300]}…"


@functools.cache
def regions() -> frozenset[str]:
    """The AWS regions that the installed botocore lists for EC2."""
    session: Any = boto3.Session(region_name=DEFAULT_REGION)
    return frozenset(
        name for part in session.get_available_partitions() for name in session.get_available_regions("ec2", part)
    )
