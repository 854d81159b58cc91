"""Read a stack of infra/ with the Pulumi CLI, and connect to AWS with the provider configuration of this stack."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
import botocore.config
import botocore.session

from scripts import aws_session

PROGRAM = Path(__file__).resolve().parent.parent / "infra"
PASSPHRASE = ("passphrase must be set", "incorrect passphrase")
"""Parts of the messages that Pulumi prints if it cannot decrypt a state or a configuration."""

ROLE_ARGUMENTS = {
    "roleArn": "RoleArn",
    "sessionName": "RoleSessionName",
    "externalId": "ExternalId",
    "policy": "Policy",
    "sourceIdentity": "SourceIdentity",
    "transitiveTagKeys": "TransitiveTagKeys",
}
"""Mapping: key in aws:assumeRoles → argument of STS. `_arguments` converts the keys with a different format in STS."""


class PulumiError(Exception):
    """The stack cannot be read, or its provider configuration cannot be used. The message contains the remedy."""


def run(*arguments: str, stack: str | None = None) -> dict[str, Any]:
    """Run a Pulumi command and return its JSON output. If the command fails, raises PulumiError with Pulumi's
    message."""
    if shutil.which("pulumi") is None:
        raise PulumiError(
            "there is no rehearsal here and no pulumi on PATH: launch a server with `scripts/rehearse.py up`, or "
            "install Pulumi (https://www.pulumi.com/docs/install/) to read a stack's outputs"
        )
    command = ["pulumi", *arguments, *(["--stack", stack] if stack else [])]
    done = subprocess.run(command, cwd=PROGRAM, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        if any(sign in said for sign in PASSPHRASE):
            raise PulumiError(
                f"Pulumi cannot decrypt the stack {stack or 'that is selected'} ({said.splitlines()[-1]}): its secrets "
                "are encrypted with the passphrase that was chosen at `pulumi stack init`. Set the variable "
                "PULUMI_CONFIG_PASSPHRASE to the passphrase, or PULUMI_CONFIG_PASSPHRASE_FILE to a file with it"
            )
        raise PulumiError(f"pulumi {' '.join(arguments)} failed: {said}")
    return dict(json.loads(done.stdout or "{}"))


def provider_settings(stack: str | None) -> dict[str, Any]:
    """Return the stack's configuration of the AWS provider, without the prefix `aws:` in the keys. Raises
    PulumiError."""
    config = run("config", "--json", stack=stack)
    if any(key.startswith("aws:") and entry.get("secret") for key, entry in config.items()):
        config = run("config", "--json", "--show-secrets", stack=stack)
    return {key.removeprefix("aws:"): _value(entry) for key, entry in config.items() if key.startswith("aws:")}


def _value(entry: Mapping[str, Any]) -> Any:
    """Return a configuration value. Pulumi stores lists and objects as JSON text if they were not set with --path."""
    if "objectValue" in entry:
        return entry["objectValue"]
    text = entry.get("value", "")
    return json.loads(text) if text[:1] in ("[", "{") else text


def client(service: str, settings: Mapping[str, Any]) -> Any:
    """Return a client of an AWS service with the region, credentials, roles and endpoints of a stack's provider.

    Raises PulumiError if the settings cannot be used, and an error of botocore if the credentials cannot be used.
    """
    session = _session(settings)
    if web := settings.get("assumeRoleWithWebIdentity"):
        session = _assume_with_token(session, settings, _one(web))
    for role in settings.get("assumeRoles") or []:
        session = _assume(session, settings, role)
    return _client(session, service, settings)


def _session(settings: Mapping[str, Any]) -> boto3.Session:
    files = {"config_file": "sharedConfigFiles", "credentials_file": "sharedCredentialsFiles"}
    core = botocore.session.Session()
    for variable, name in files.items():
        paths = settings.get(name) or []
        if len(paths) > 1:
            raise PulumiError(f"aws:{name} lists {len(paths)} files, but boto3 reads only one: merge the files")
        if paths:
            core.set_config_variable(variable, paths[0])
    profile = settings.get("profile")
    if profile and profile not in core.available_profiles:
        known = ", ".join(core.available_profiles) or "none"
        raise PulumiError(
            f"the stack's aws:profile is {profile!r}, but this machine has only these AWS profiles: {known}. Add the "
            f"profile with `aws configure --profile {profile}`"
        )
    return boto3.Session(
        aws_access_key_id=settings.get("accessKey"),
        aws_secret_access_key=settings.get("secretKey"),
        aws_session_token=settings.get("token"),
        profile_name=profile,
        region_name=settings.get("region") or aws_session.region_of_environment(),
        botocore_session=core,
    )


def _client(session: boto3.Session, service: str, settings: Mapping[str, Any], region: str | None = None) -> Any:
    endpoints = {name: url for each in settings.get("endpoints") or [] for name, url in each.items()}
    switches: dict[str, Any] = {
        name: str(settings[key]).lower() == "true"
        for name, key in {
            "use_fips_endpoint": "useFipsEndpoint",
            "use_dualstack_endpoint": "useDualstackEndpoint",
        }.items()
        if key in settings
    }
    return session.client(
        service,  # type: ignore[call-overload]
        region_name=region,
        endpoint_url=endpoints.get(service),
        verify=settings.get("customCaBundle"),
        config=botocore.config.Config(**switches),
    )


def _assume(session: boto3.Session, settings: Mapping[str, Any], role: Mapping[str, Any]) -> boto3.Session:
    sts = _client(session, "sts", settings, settings.get("stsRegion"))
    return _with(sts.assume_role(**_arguments(role)), session)


def _assume_with_token(session: boto3.Session, settings: Mapping[str, Any], role: Mapping[str, Any]) -> boto3.Session:
    sts = _client(session, "sts", settings, settings.get("stsRegion"))
    token = role.get("webIdentityToken") or Path(role["webIdentityTokenFile"]).read_text().strip()
    return _with(sts.assume_role_with_web_identity(**_arguments(role), WebIdentityToken=token), session)


def _arguments(role: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {theirs: role[ours] for ours, theirs in ROLE_ARGUMENTS.items() if role.get(ours)}
    made.setdefault("RoleSessionName", "mlflow-ami")
    if role.get("duration"):
        made["DurationSeconds"] = _seconds(role["duration"])
    if role.get("policyArns"):
        made["PolicyArns"] = [{"arn": arn} for arn in role["policyArns"]]
    if role.get("tags"):
        made["Tags"] = [{"Key": key, "Value": value} for key, value in role["tags"].items()]
    return made


def _with(answer: Mapping[str, Any], session: boto3.Session) -> boto3.Session:
    given = answer["Credentials"]
    return boto3.Session(
        given["AccessKeyId"], given["SecretAccessKey"], given["SessionToken"], region_name=session.region_name
    )


def _seconds(duration: str) -> int:
    """Convert a duration in the provider's format, such as 1h, 30m or 1h15m30s, to seconds."""
    units = {"h": 3600, "m": 60, "s": 1}
    if not re.fullmatch(r"(\d+[hms])+", duration):
        raise PulumiError(f"the duration {duration!r} of an assumed role is invalid: use a format such as 1h or 30m")
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([hms])", duration))


def _one(value: Any) -> Mapping[str, Any]:
    return dict(value[0] if isinstance(value, list) else value)
