"""The stack's secrets: generated once, kept encrypted in Pulumi's state and as SSM SecureStrings, nowhere else.

The credentials parameter is written when the stack is made. From then on the people in it are managed in the
parameter itself, so Pulumi does not write it again: an `up` would otherwise bring removed users back.
"""

from __future__ import annotations

from dataclasses import dataclass

import pulumi
import pulumi_aws as aws
import pulumi_random as random

from settings import ADMIN, Settings


@dataclass(frozen=True)
class Credentials:
    parameter: aws.ssm.Parameter
    """JSON, format 1: the KEK passphrase and the users."""
    postgres_reader: aws.ssm.Parameter | None
    """Password of PostgreSQL's read-only role; None unless postgresCidrs names a network."""

    @property
    def parameters(self) -> list[aws.ssm.Parameter]:
        """All that the machine may read."""
        return [parameter for parameter in (self.parameter, self.postgres_reader) if parameter]


def build(config: Settings, opts: pulumi.ResourceOptions) -> Credentials:
    """The parameters with the passphrase MLflow encrypts its own secrets with, the first user and the reader."""
    # Without this passphrase MLflow cannot read the secrets it keeps in its database.
    passphrase = random.RandomPassword(
        "kek-passphrase", length=48, special=False, opts=pulumi.ResourceOptions(protect=True)
    )
    password = config.admin_password or random.RandomPassword("admin-password", length=24, special=False).result
    users = {ADMIN: {"password": password, "role": "admin"}}
    content = {"format": 1, "kek_passphrase": passphrase.result, "users": users}
    parameter = aws.ssm.Parameter(
        "credentials",
        name=f"{config.parameter_path}/credentials",
        description="MLflow server: users and the passphrase of its key encryption key",
        type="SecureString",
        tier="Intelligent-Tiering",
        value=pulumi.Output.secret(pulumi.Output.json_dumps(content)),
        opts=pulumi.ResourceOptions.merge(opts, pulumi.ResourceOptions(protect=True, ignore_changes=["value"])),
    )
    return Credentials(parameter, _postgres_reader(config, opts) if config.postgres_cidrs else None)


def _postgres_reader(config: Settings, opts: pulumi.ResourceOptions) -> aws.ssm.Parameter:
    password = random.RandomPassword("postgres-reader", length=32, special=False)
    return aws.ssm.Parameter(
        "postgres-reader",
        name=f"{config.parameter_path}/postgres-reader",
        description="MLflow server: password of PostgreSQL's read-only role",
        type="SecureString",
        value=pulumi.Output.secret(password.result),
        opts=opts,
    )
