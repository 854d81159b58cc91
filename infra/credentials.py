"""The stack's secrets: generated once, kept encrypted in Pulumi's state and as an SSM SecureString, nowhere else.

The credentials parameter is written when the stack is made. From then on the people in it are managed in the
parameter itself, so Pulumi does not write it again: an `up` would otherwise bring removed users back.
"""

from __future__ import annotations

import pulumi
import pulumi_aws as aws
import pulumi_random as random
from settings import ADMIN, Settings


def build(config: Settings, opts: pulumi.ResourceOptions) -> aws.ssm.Parameter:
    """JSON, format 1: the first user, and the passphrase MLflow encrypts the secrets in its database with."""
    # Whoever loses the passphrase loses those secrets, so it is protected like the data volume.
    passphrase = random.RandomPassword(
        "kek-passphrase", length=48, special=False, opts=pulumi.ResourceOptions(protect=True)
    )
    password = _given(config) or random.RandomPassword("admin-password", length=24, special=False).result
    content = {
        "format": 1,
        "kek_passphrase": passphrase.result,
        "users": {ADMIN: {"password": password, "role": "admin"}},
    }
    return aws.ssm.Parameter(
        "credentials",
        name=f"/mlflow-ami/{config.stack}/credentials",
        description="MLflow server: its users, and the passphrase of its key encryption key",
        type="SecureString",
        # A standard parameter holds 4 KiB, some 40 users; with more it becomes an advanced one.
        tier="Intelligent-Tiering",
        value=pulumi.Output.json_dumps(content),
        opts=pulumi.ResourceOptions.merge(opts, pulumi.ResourceOptions(protect=True, ignore_changes=["value"])),
    )


def _given(config: Settings) -> pulumi.Output[str] | None:
    return pulumi.Output.secret(config.admin_password) if config.admin_password else None
