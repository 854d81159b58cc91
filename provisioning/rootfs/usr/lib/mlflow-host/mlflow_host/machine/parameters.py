"""Read the stack's secrets from Parameter Store with the instance's role."""

from __future__ import annotations

import time
from collections.abc import Callable

from mlflow_host.contract.credentials import Credentials, CredentialsError, parse
from mlflow_host.contract.launch import LaunchDocument
from mlflow_host.machine import aws
from mlflow_host.machine.status import StepFailed

PATIENCE_SECONDS = 180
"""Seconds for which a failed read of a parameter is repeated. The role's policy, the route to SSM and the parameter may
be created after the machine."""


def fetch(document: LaunchDocument, say: Callable[[str], None], patience: float = PATIENCE_SECONDS) -> Credentials:
    """Read and parse the parameter with the credentials. Raises StepFailed after `patience` seconds."""
    parameter = document.credentials.parameter
    text = _parameter(document, parameter, say, patience)
    try:
        return parse(text)
    except CredentialsError as error:
        raise StepFailed(f"the parameter {parameter} cannot be used: {error}; correct it and restart") from None


def secret(document: LaunchDocument, parameter: str) -> str:
    """Read a parameter that consists of one secret. Raises StepFailed."""
    return _parameter(document, parameter, lambda message: None, PATIENCE_SECONDS)


def _parameter(document: LaunchDocument, name: str, say: Callable[[str], None], patience: float) -> str:
    give_up = time.monotonic() + patience
    pause = 0.1
    while True:
        try:
            return aws.get_parameter(document, name, aws.role_keys())
        except aws.NoRole:
            reason = "the instance has no role yet: give it the stack's instance profile"
        except aws.ServiceUnreachable as error:
            reason = f"{aws.ssm_address(document)} cannot be reached ({error}): add a route or an interface endpoint"
        except aws.ServiceError as error:
            if error.code == "ParameterNotFound":
                reason = (
                    f"the parameter {name} does not exist in {document.stack.region}: create it, or correct its name"
                )
            elif error.code in ("AccessDeniedException", "AccessDenied"):
                reason = f"the role cannot read the parameter {name}: allow ssm:GetParameter and use of its KMS key"
            else:
                reason = f"SSM does not return the parameter {name} ({error})"
        if time.monotonic() + pause > give_up:
            raise StepFailed(f"{reason} (tried for {patience:.0f} s)")
        say(f"{reason}; trying again")
        time.sleep(pause)
        pause = min(pause * 2, 5)
