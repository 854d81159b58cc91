"""The resource type of Systems Manager: parameters."""

from __future__ import annotations

from typing import Any

from botocore.exceptions import ClientError

from scripts.rehearsal.resource_types import Aws, Kind, physical_name
from scripts.rehearsal.resources.tags import as_list
from scripts.rehearsal.wire import Props


def _put(aws: Aws, inputs: Props, *, overwrite: bool) -> str:
    request: dict[str, Any] = {"Name": inputs["name"], "Type": inputs["type"], "Value": inputs["value"]}
    for name, key in {"description": "Description", "keyId": "KeyId", "tier": "Tier"}.items():
        if inputs.get(name):
            request[key] = inputs[name]
    if overwrite:
        request["Overwrite"] = True
    elif inputs.get("tagsAll"):
        request["Tags"] = as_list(inputs["tagsAll"])
    aws.client("ssm").put_parameter(**request)
    return str(inputs["name"])


def _read(aws: Aws, id_: str, inputs: Props) -> Props | None:
    try:
        found = aws.client("ssm").get_parameter(Name=id_, WithDecryption=True)["Parameter"]
    except aws.client("ssm").exceptions.ParameterNotFound:
        return None
    return {"name": found["Name"], "arn": found["ARN"], "version": found["Version"], "value": found["Value"]}


def _update(aws: Aws, id_: str, old: Props, new: Props) -> None:
    # Like the provider, do not write the value if only tags changed. Another program may have changed the value.
    if any(old.get(name) != new.get(name) for name in ("type", "value", "description", "keyId", "tier")):
        _put(aws, new, overwrite=True)
    client = aws.client("ssm")
    before, after = old.get("tagsAll", {}), new.get("tagsAll", {})
    if gone := sorted(before.keys() - after.keys()):
        client.remove_tags_from_resource(ResourceType="Parameter", ResourceId=id_, TagKeys=gone)
    if after != before and after:
        client.add_tags_to_resource(ResourceType="Parameter", ResourceId=id_, Tags=as_list(after))


def _delete(aws: Aws, id_: str, inputs: Props) -> None:
    try:
        aws.client("ssm").delete_parameter(Name=id_)
    except ClientError as error:
        if error.response["Error"]["Code"] != "ParameterNotFound":
            raise


def _recover(aws: Aws, inputs: Props) -> str | None:
    return str(inputs["name"]) if _read(aws, inputs["name"], inputs) else None


KINDS = {
    "aws:ssm/parameter:Parameter": Kind(
        create=lambda aws, inputs: _put(aws, inputs, overwrite=False),
        read=_read,
        update=_update,
        delete=_delete,
        recover=_recover,
        replace_on=frozenset({"name", "dataType"}),
        generate={"name": physical_name},
        tagged=True,
        secret_outputs=frozenset({"value"}),
    )
}
