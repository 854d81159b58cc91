"""The stack's parameters in Systems Manager: the users with their passwords, a passphrase, and the values that the
machine publishes.

The credentials are generated once and stored encrypted in Pulumi's state and in two SSM SecureStrings. The parameter
`credentials` is for the machine and contains the hash of the admin's password. The parameter `admin-password` is for
people and contains the password; the machine's role cannot read it. Pulumi writes the parameters `credentials` and
`admin-password` only when it creates the stack. Later, scripts/users.py changes the users in `credentials`. If Pulumi
wrote `credentials` at each `pulumi up`, it would restore removed users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pulumi
import pulumi_aws as aws
import pulumi_random as random

import lost_state
from mlflow_host.contract.credentials import hashed
from preflight import Existing
from settings import ADMIN, Settings

WRITTEN_ONCE = ["value", "description", "tier", "keyId"]
"""Properties whose changes Pulumi ignores after it has created the parameter. The list contains more properties than
`value`, because the provider also writes the value from Pulumi's state when any other property changes."""


@dataclass(frozen=True)
class Parameters:
    credentials: aws.ssm.Parameter
    """SecureString, JSON, format 1: users, and the passphrase with which MLflow encrypts the secrets in its
    database."""
    password: aws.ssm.Parameter
    """SecureString: the password of the user admin, for connect.py."""
    authority: aws.ssm.Parameter | None
    """String: certificate of the private certificate authority. The machine writes it. None if tls is not private."""
    reader: aws.ssm.Parameter | None
    """SecureString: password of the role that reads the database over the network. None if postgresCidrs is empty."""
    in_service: aws.ssm.Parameter
    """String: the image with which the database in service was last used. The machine writes this parameter."""

    @property
    def ready(self) -> list[pulumi.Resource]:
        """The parameters that must exist before the machine boots."""
        every = (self.credentials, self.password, self.authority, self.reader, self.in_service)
        return [parameter for parameter in every if parameter]


def build(config: Settings, found: Existing, volume: pulumi.Resource, opts: pulumi.ResourceOptions) -> Parameters:
    # Without this passphrase, the secrets in the database are unreadable, so Pulumi protects this resource from
    # deletion.
    passphrase = random.RandomPassword(
        "kek-passphrase", length=48, special=False, opts=pulumi.ResourceOptions(protect=True)
    )
    password = _given(config) or random.RandomPassword("admin-password", length=24, special=False).result
    # Pulumi's state keeps the salt, so that the hash is the same at each `up`.
    salt = random.RandomPassword("admin-salt", length=16, special=False).result
    content = {
        "format": 1,
        "kek_passphrase": passphrase.result,
        "users": {ADMIN: {"password": pulumi.Output.all(password, salt).apply(_hash), "role": "admin"}},
    }

    def parameter(
        name: str, description: str, type: str, value: Any, after: pulumi.Resource, **options: Any
    ) -> aws.ssm.Parameter:
        # A standard parameter holds 4 KiB, about 40 users. With Intelligent-Tiering, a larger parameter becomes an
        # advanced parameter.
        tier = "Intelligent-Tiering" if name == "credentials" else None
        hooks = lost_state.refuse_second_parameter(config, found, name)
        more = pulumi.ResourceOptions(hooks=hooks, depends_on=[after], **options)
        return aws.ssm.Parameter(
            name,
            name=config.parameter(name),
            description=f"MLflow server: {description}",
            type=type,
            value=value,
            tier=tier,
            opts=pulumi.ResourceOptions.merge(opts, more),
        )

    def published(name: str, description: str, value: str) -> aws.ssm.Parameter:
        """A parameter with a placeholder, whose value the machine writes later. Because Pulumi creates the parameter,
        the deletion of the stack deletes it, and the machine needs no right to create parameters."""
        return parameter(name, description, "String", value, credentials, ignore_changes=WRITTEN_ONCE)

    # Pulumi creates the parameter `credentials` after the data volume and before the other parameters. If the state is
    # lost, `pulumi up` therefore fails at one resource only.
    credentials = parameter(
        "credentials",
        "its users, and the passphrase of its key encryption key",
        "SecureString",
        pulumi.Output.json_dumps(content),
        after=volume,
        protect=True,
        ignore_changes=WRITTEN_ONCE,
    )
    return Parameters(
        credentials=credentials,
        password=parameter(
            "admin-password",
            f"password of its user {ADMIN}, for connect.py",
            "SecureString",
            password,
            after=credentials,
            ignore_changes=WRITTEN_ONCE,
        ),
        authority=published(
            "certificate-authority",
            "certificate of its private authority, which clients verify it by",
            "not published yet",
        )
        if config.tls == "private"
        else None,
        reader=parameter(
            "postgres-reader",
            "password of PostgreSQL's role mlflow_reader",
            "SecureString",
            random.RandomPassword("postgres-reader", length=32, special=False).result,
            after=credentials,
        )
        if config.postgres_cidrs
        else None,
        in_service=published("in-service", "which image's schema its data volume has", "not reported yet"),
    )


def _given(config: Settings) -> pulumi.Output[str] | None:
    return pulumi.Output.secret(config.admin_password) if config.admin_password else None


def _hash(known: Sequence[str]) -> str:
    """The hash of a password. `known` contains the password and the salt."""
    password, salt = known
    return hashed(password, salt.encode())
