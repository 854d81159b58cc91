"""Resource types of IAM: roles, role policies, instance profiles."""

from __future__ import annotations

from typing import Any

from scripts.rehearsal.resource_types import Aws, Kind, physical_name
from scripts.rehearsal.resources.tags import as_list
from scripts.rehearsal.wire import Props


def _gone(aws: Aws) -> Any:
    return aws.client("iam").exceptions.NoSuchEntityException


def _create_role(aws: Aws, inputs: Props) -> str:
    request = {
        "RoleName": inputs["name"],
        "AssumeRolePolicyDocument": inputs["assumeRolePolicy"],
        "Path": inputs.get("path", "/"),
        "Tags": as_list(inputs.get("tagsAll", {})),
    }
    if inputs.get("description"):
        request["Description"] = inputs["description"]
    aws.client("iam").create_role(**request)
    for arn in inputs.get("managedPolicyArns", []):
        aws.client("iam").attach_role_policy(RoleName=inputs["name"], PolicyArn=arn)
    for policy in inputs.get("inlinePolicies", []):
        aws.client("iam").put_role_policy(
            RoleName=inputs["name"], PolicyName=policy["name"], PolicyDocument=policy["policy"]
        )
    return str(inputs["name"])


def _read_role(aws: Aws, id_: str, inputs: Props) -> Props | None:
    try:
        role = aws.client("iam").get_role(RoleName=id_)["Role"]
    except _gone(aws):
        return None
    return {"arn": role["Arn"], "name": role["RoleName"], "uniqueId": role["RoleId"], "path": role["Path"]}


def _update_role(aws: Aws, id_: str, old: Props, new: Props) -> None:
    client = aws.client("iam")
    if old["assumeRolePolicy"] != new["assumeRolePolicy"]:
        client.update_assume_role_policy(RoleName=id_, PolicyDocument=new["assumeRolePolicy"])
    if old.get("description") != new.get("description"):
        client.update_role_description(RoleName=id_, Description=new.get("description", ""))
    before, after = set(old.get("managedPolicyArns", [])), set(new.get("managedPolicyArns", []))
    for arn in sorted(before - after):
        client.detach_role_policy(RoleName=id_, PolicyArn=arn)
    for arn in sorted(after - before):
        client.attach_role_policy(RoleName=id_, PolicyArn=arn)
    inline = {each["name"]: each["policy"] for each in new.get("inlinePolicies", [])}
    for name in {each["name"] for each in old.get("inlinePolicies", [])} - inline.keys():
        client.delete_role_policy(RoleName=id_, PolicyName=name)
    for name, policy in inline.items():
        client.put_role_policy(RoleName=id_, PolicyName=name, PolicyDocument=policy)
    if gone := sorted(old.get("tagsAll", {}).keys() - new.get("tagsAll", {}).keys()):
        client.untag_role(RoleName=id_, TagKeys=gone)
    if new.get("tagsAll"):
        client.tag_role(RoleName=id_, Tags=as_list(new["tagsAll"]))


def _delete_role(aws: Aws, id_: str, inputs: Props) -> None:
    client = aws.client("iam")
    for arn in inputs.get("managedPolicyArns", []):
        client.detach_role_policy(RoleName=id_, PolicyArn=arn)
    for policy in inputs.get("inlinePolicies", []):
        client.delete_role_policy(RoleName=id_, PolicyName=policy["name"])
    client.delete_role(RoleName=id_)


def _put_role_policy(aws: Aws, inputs: Props) -> str:
    aws.client("iam").put_role_policy(
        RoleName=inputs["role"], PolicyName=inputs["name"], PolicyDocument=inputs["policy"]
    )
    return f"{inputs['role']}:{inputs['name']}"


def _update_role_policy(aws: Aws, id_: str, old: Props, new: Props) -> None:
    _put_role_policy(aws, new)


def _read_role_policy(aws: Aws, id_: str, inputs: Props) -> Props | None:
    role, name = id_.split(":", 1)
    try:
        aws.client("iam").get_role_policy(RoleName=role, PolicyName=name)
    except _gone(aws):
        return None
    return {"name": name}


def _delete_role_policy(aws: Aws, id_: str, inputs: Props) -> None:
    role, name = id_.split(":", 1)
    aws.client("iam").delete_role_policy(RoleName=role, PolicyName=name)


def _create_profile(aws: Aws, inputs: Props) -> str:
    client = aws.client("iam")
    client.create_instance_profile(
        InstanceProfileName=inputs["name"], Path=inputs.get("path", "/"), Tags=as_list(inputs.get("tagsAll", {}))
    )
    if inputs.get("role"):
        client.add_role_to_instance_profile(InstanceProfileName=inputs["name"], RoleName=inputs["role"])
    return str(inputs["name"])


def _read_profile(aws: Aws, id_: str, inputs: Props) -> Props | None:
    try:
        profile = aws.client("iam").get_instance_profile(InstanceProfileName=id_)["InstanceProfile"]
    except _gone(aws):
        return None
    return {"arn": profile["Arn"], "name": id_, "uniqueId": profile["InstanceProfileId"]}


def _update_profile(aws: Aws, id_: str, old: Props, new: Props) -> None:
    client = aws.client("iam")
    if old.get("role") != new.get("role"):
        if old.get("role"):
            client.remove_role_from_instance_profile(InstanceProfileName=id_, RoleName=old["role"])
        if new.get("role"):
            client.add_role_to_instance_profile(InstanceProfileName=id_, RoleName=new["role"])
    if new.get("tagsAll") and old.get("tagsAll") != new["tagsAll"]:
        client.tag_instance_profile(InstanceProfileName=id_, Tags=as_list(new["tagsAll"]))


def _delete_profile(aws: Aws, id_: str, inputs: Props) -> None:
    client = aws.client("iam")
    for role in client.get_instance_profile(InstanceProfileName=id_)["InstanceProfile"]["Roles"]:
        client.remove_role_from_instance_profile(InstanceProfileName=id_, RoleName=role["RoleName"])
    client.delete_instance_profile(InstanceProfileName=id_)


KINDS = {
    "aws:iam/role:Role": Kind(
        create=_create_role,
        read=_read_role,
        update=_update_role,
        delete=_delete_role,
        recover=lambda aws, inputs: inputs["name"] if _read_role(aws, inputs["name"], inputs) else None,
        replace_on=frozenset({"name", "namePrefix", "path"}),
        generate={"name": physical_name},
        tagged=True,
    ),
    "aws:iam/rolePolicy:RolePolicy": Kind(
        create=_put_role_policy,
        read=_read_role_policy,
        update=_update_role_policy,
        delete=_delete_role_policy,
        recover=lambda aws, inputs: _put_role_policy(aws, inputs),
        replace_on=frozenset({"role", "name", "namePrefix"}),
        generate={"name": physical_name},
    ),
    "aws:iam/instanceProfile:InstanceProfile": Kind(
        create=_create_profile,
        read=_read_profile,
        update=_update_profile,
        delete=_delete_profile,
        recover=lambda aws, inputs: inputs["name"] if _read_profile(aws, inputs["name"], inputs) else None,
        replace_on=frozenset({"name", "namePrefix", "path"}),
        generate={"name": physical_name},
        tagged=True,
    ),
}
