"""The stack's parameters: what the machine must be told in secret, and what clients verify it by.

The credentials are generated once, kept encrypted in Pulumi's state and as an SSM SecureString, nowhere else. They
are written when the stack is made. From then on the people in them are managed in the parameter itself, so Pulumi
does not write it again: an `up` would otherwise bring removed users back.
"""

from __future__ import annotations

from dataclasses import dataclass

import pulumi
import pulumi_aws as aws
import pulumi_random as random
from settings import ADMIN, Settings

WRITTEN_ONCE = ["value", "description", "tier", "keyId"]
"""Not the value alone: to change any of the others, the provider writes the value it knows along with it."""


@dataclass(frozen=True)
class Parameters:
    credentials: aws.ssm.Parameter
    """SecureString, JSON, format 1: users, and the passphrase MLflow encrypts the secrets in its database with."""
    authority: aws.ssm.Parameter | None
    """String: certificate of the private authority, published by the machine. None without one."""
    reader: aws.ssm.Parameter | None
    """SecureString: password of the role that reads the database over the network. None while nobody may."""

    @property
    def ready(self) -> list[pulumi.Resource]:
        """What must be there before the machine boots."""
        return [parameter for parameter in (self.credentials, self.authority, self.reader) if parameter]


def build(config: Settings, opts: pulumi.ResourceOptions) -> Parameters:
    # Whoever loses the passphrase loses what it encrypts, so it is protected like the data volume.
    passphrase = random.RandomPassword(
        "kek-passphrase", length=48, special=False, opts=pulumi.ResourceOptions(protect=True)
    )
    password = _given(config) or random.RandomPassword("admin-password", length=24, special=False).result
    content = {
        "format": 1,
        "kek_passphrase": passphrase.result,
        "users": {ADMIN: {"password": password, "role": "admin"}},
    }
    credentials = aws.ssm.Parameter(
        "credentials",
        name=config.parameter("credentials"),
        description="MLflow server: its users, and the passphrase of its key encryption key",
        type="SecureString",
        # A standard parameter holds 4 KiB, some 40 users; with more it becomes an advanced one.
        tier="Intelligent-Tiering",
        value=pulumi.Output.json_dumps(content),
        opts=pulumi.ResourceOptions.merge(opts, pulumi.ResourceOptions(protect=True, ignore_changes=WRITTEN_ONCE)),
    )
    return Parameters(
        credentials,
        _authority(config, opts) if config.tls == "private" else None,
        _reader(config, opts) if config.postgres_cidrs else None,
    )


def _given(config: Settings) -> pulumi.Output[str] | None:
    return pulumi.Output.secret(config.admin_password) if config.admin_password else None


def _reader(config: Settings, opts: pulumi.ResourceOptions) -> aws.ssm.Parameter:
    return aws.ssm.Parameter(
        "postgres-reader",
        name=config.parameter("postgres-reader"),
        description="MLflow server: password of PostgreSQL's role mlflow_reader",
        type="SecureString",
        value=random.RandomPassword("postgres-reader", length=32, special=False).result,
        opts=opts,
    )


def _authority(config: Settings, opts: pulumi.ResourceOptions) -> aws.ssm.Parameter:
    """Made empty, so that it goes with the stack and the machine needs to write to this one only."""
    return aws.ssm.Parameter(
        "certificate-authority",
        name=config.parameter("certificate-authority"),
        description="MLflow server: certificate of its private authority, which clients verify it by",
        type="String",
        value="not published yet",
        opts=pulumi.ResourceOptions.merge(opts, pulumi.ResourceOptions(ignore_changes=WRITTEN_ONCE)),
    )
