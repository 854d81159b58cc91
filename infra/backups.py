"""Check that the backup in the setting restoreFrom exists, before Pulumi creates the machine that restores it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pulumi
import pulumi_aws as aws

from contract import restore_request
from preflight import Existing
from settings import Settings

KEYS = 10_000
"""This program reads at most this number of S3 keys below dumps/. Each dump has two keys: the dump and its digest."""


def restore_from(
    config: Settings, found: Existing, bucket: pulumi.Output[str], opts: pulumi.ResourceOptions
) -> pulumi.Output[str]:
    """The setting restoreFrom, as an output that Pulumi resolves after the backup was found. Pulumi creates resources
    that depend on this output only after it has found the backup. The output fails with pulumi.RunError if the backup
    does not exist.

    A value that an earlier `pulumi up` has checked is not checked again: the machine restores each value only once, and
    the backup may have expired after the restore.
    """
    if not config.restore_from or (found.volume and found.volume.restore_from == config.restore_from):
        return pulumi.Output.from_input(config.restore_from)
    asked = pulumi.InvokeOptions(provider=opts.provider)

    async def look(name: str) -> str:
        try:
            dumps, labels = await _dumps(name, asked), await _labels(name, asked)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise pulumi.RunError(f"restoreFrom: the backups bucket {name} could not be listed: {reason}") from None
        if wrong := restore_request.missing(config.restore_from, dumps, labels, datetime.now(UTC)):
            raise pulumi.RunError(f"restoreFrom: {wrong}; nothing was changed.")
        return config.restore_from

    return bucket.apply(look)


async def _dumps(bucket: str, asked: pulumi.InvokeOptions) -> list[str]:
    """S3 keys of the dumps, oldest first."""
    there = await _objects(asked, bucket=bucket, prefix=restore_request.DUMPS, max_keys=KEYS)
    return sorted(key for key in there.keys if restore_request.is_dump(key))


async def _labels(bucket: str, asked: pulumi.InvokeOptions) -> list[str]:
    """Labels of the base backups in all pgBackRest histories, oldest first."""
    folders = {"bucket": bucket, "delimiter": "/"}
    stanzas = (await _objects(asked, prefix=restore_request.BASE_BACKUPS, **folders)).common_prefixes
    inside = [(await _objects(asked, prefix=stanza, **folders)).common_prefixes for stanza in stanzas]
    names = [folder.rstrip("/").rsplit("/", 1)[-1] for folders in inside for folder in folders]
    return sorted(filter(restore_request.is_label, names), key=restore_request.made)


async def _objects(asked: pulumi.InvokeOptions, **arguments: Any) -> aws.s3.GetObjectsResult:
    there = await aws.s3.get_objects_output(**arguments, opts=asked).future()
    assert there is not None  # a Pulumi data source always returns a result or raises
    return there
