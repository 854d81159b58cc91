"""Refuse to create a resource that exists in AWS under this stack's name, but is not in Pulumi's state.

Pulumi calls the hooks below before it creates the data volume or a parameter, in previews too. The hooks fail if the
state was lost, or if another backend, project or copy of the stack is selected.
"""

from __future__ import annotations

from collections.abc import Mapping

import pulumi

from preflight import Existing
from settings import Settings

VOLUME, BUCKET, ADDRESS, PARAMETER = (
    "aws:ebs/volume:Volume",
    "aws:s3/bucket:Bucket",
    "aws:ec2/eip:Eip",
    "aws:ssm/parameter:Parameter",
)


def refuse_second_volume(config: Settings, found: Existing) -> pulumi.ResourceHookBinding:
    """Hooks of the data volume, which fail if another volume with the stack's tags exists, or if the stack was
    renamed."""

    def before_create(arguments: pulumi.ResourceHookArgs) -> None:
        if found.volume:
            raise pulumi.RunError(_refusal(config, found, f"the data volume {found.volume.id}"))

    def before_update(arguments: pulumi.ResourceHookArgs) -> None:
        tags = (arguments.old_outputs or {}).get("tagsAll")
        former = tags.get("mlflow-ami:stack", config.stack) if isinstance(tags, Mapping) else config.stack
        if former != config.stack:
            raise pulumi.RunError(
                f"This stack was renamed: {arguments.id} and the parameters belong to the stack {former}, and they "
                f"cannot be renamed. Rename the stack back with `pulumi stack rename {former}`; nothing was changed."
            )

    return pulumi.ResourceHookBinding(
        before_create=[_hook("no-second-data-volume", before_create)],
        before_update=[_hook("no-renamed-stack", before_update)],
    )


def refuse_second_parameter(config: Settings, found: Existing, name: str) -> pulumi.ResourceHookBinding:
    """Hook of one of the stack's parameters. The hook fails if AWS already has a parameter with this name."""
    full = config.parameter(name)

    def before_create(arguments: pulumi.ResourceHookArgs) -> None:
        if full not in found.parameters:
            return
        if name == "credentials":
            raise pulumi.RunError(_refusal(config, found, f"the parameter {full}"))
        raise pulumi.RunError(
            f"The parameter {full} exists, but the selected state does not have it; nothing was changed. Select the "
            f"state that has the parameter, or import it with `{_import(config, PARAMETER, name, full)}`."
        )

    return pulumi.ResourceHookBinding(before_create=[_hook(f"no-second-{name}", before_create)])


def _hook(name: str, check: pulumi.ResourceHookFunction) -> pulumi.ResourceHook:
    return pulumi.ResourceHook(name, check, pulumi.ResourceHookOptions(on_dry_run=True))


def _refusal(config: Settings, found: Existing, what: str) -> str:
    """The error message for a resource that already exists, with the commands that import the resource."""
    commands = [f"pulumi up --target '{_provider(config)}'"]
    if found.machines:
        ids = " ".join(found.machines)
        end = f"aws ec2 {{}} --region {config.region} --instance-ids {ids}"
        commands += [end.format(each) for each in ("stop-instances", "wait instance-stopped", "terminate-instances")]
    commands += [_import(config, *each) for each in _kept(config, found)]
    unlisted = (
        ""
        if found.volume and found.volume.buckets
        else (
            f" Import the three buckets in the same way, as {BUCKET} mlflow-artifacts, mlflow-models and "
            "mlflow-backups: `aws s3 ls` lists the names of the buckets, which begin with these words."
        )
    )
    head = (
        f"{what[0].upper()}{what[1:]} belongs to the stack {config.stack} of {config.project}, but the selected state "
        "does not have it; nothing was changed. If the state is elsewhere, select it with `pulumi login` and `pulumi "
        "stack select`; if another project has a stack of this name, choose another name. If the state is lost, these "
        "commands terminate the machine and import the resources with data. `pulumi up` then creates the rest; the "
        f"former network and role remain and cost nothing.{unlisted}"
    )
    return "\n".join([head, *(f"    {command}" for command in commands)])


def _provider(config: Settings) -> str:
    return f"urn:pulumi:{config.stack}::{config.project}::pulumi:providers:aws::aws"


def _import(config: Settings, kind: str, name: str, id_: str) -> str:
    return f"pulumi import --yes --generate-code=false --provider 'aws={_provider(config)}' {kind} {name} {id_}"


def _kept(config: Settings, found: Existing) -> list[tuple[str, str, str]]:
    """The resources that outlive machines: (type, name in this program, AWS ID)."""
    volume = [(VOLUME, "data", found.volume.id)] if found.volume else []
    buckets = found.volume.buckets.items() if found.volume else []
    known = ("credentials", "admin-password", "certificate-authority", "postgres-reader", "in-service")
    return [
        *volume,
        *((BUCKET, f"mlflow-{name}", bucket) for name, bucket in buckets),
        *((ADDRESS, "server", address) for address in found.addresses),
        *((PARAMETER, name, full) for name in known if (full := config.parameter(name)) in found.parameters),
    ]
