"""The resource types of EC2: networks, volumes, addresses and instances."""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import Callable
from typing import Any

from botocore.exceptions import ClientError

from scripts.rehearsal.errors import ApplyError
from scripts.rehearsal.resource_types import Aws, Kind, physical_name
from scripts.rehearsal.resources.tags import specification, update_ec2
from scripts.rehearsal.wire import Props

POLL_SECONDS = 0.1
WAIT_SECONDS = 300


def _find(aws: Aws, operation: str, key: str, **arguments: Any) -> Props | None:
    """Return the first item of a describe call, or None if EC2 does not find the ID."""
    try:
        found = getattr(aws.client("ec2"), operation)(**arguments)[key]
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if "NotFound" in code or code.endswith(".Malformed"):
            return None
        raise
    return found[0] if found else None


def _await(what: str, reached: Callable[[], bool]) -> None:
    """Poll until `reached` returns True. The waiters of boto3 are not used, because they sleep 15 s between polls. A
    whole boot in the local cloud takes no longer."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not reached():
        if time.monotonic() > deadline:
            raise ApplyError(f"{what} did not happen within {WAIT_SECONDS} s")
        time.sleep(POLL_SECONDS)


def _retag(aws: Aws, id_: str, old: Props, new: Props) -> None:
    update_ec2(aws, id_, old.get("tagsAll"), new.get("tagsAll"))


# Networks


def _create_vpc(aws: Aws, inputs: Props) -> str:
    client = aws.client("ec2")
    id_ = client.create_vpc(
        CidrBlock=inputs["cidrBlock"],
        InstanceTenancy=inputs.get("instanceTenancy", "default"),
        TagSpecifications=specification("vpc", inputs.get("tagsAll")),
    )["Vpc"]["VpcId"]
    _set_vpc_attributes(aws, id_, {}, inputs)
    return str(id_)


def _set_vpc_attributes(aws: Aws, id_: str, old: Props, new: Props) -> None:
    for name, default in {"enableDnsSupport": True, "enableDnsHostnames": False}.items():
        if new.get(name, default) != old.get(name, default):
            argument = {name[0].upper() + name[1:]: {"Value": bool(new.get(name, default))}}
            aws.client("ec2").modify_vpc_attribute(VpcId=id_, **argument)
    _retag(aws, id_, old, new)


def _read_vpc(aws: Aws, id_: str, inputs: Props) -> Props | None:
    vpc = _find(aws, "describe_vpcs", "Vpcs", VpcIds=[id_])
    if vpc is None:
        return None
    filters = [{"Name": "vpc-id", "Values": [id_]}]
    group = _find(
        aws,
        "describe_security_groups",
        "SecurityGroups",
        Filters=[*filters, {"Name": "group-name", "Values": ["default"]}],
    )
    table = _find(
        aws,
        "describe_route_tables",
        "RouteTables",
        Filters=[*filters, {"Name": "association.main", "Values": ["true"]}],
    )
    acl = _find(
        aws, "describe_network_acls", "NetworkAcls", Filters=[*filters, {"Name": "default", "Values": ["true"]}]
    )
    return {
        "arn": f"arn:aws:ec2:{aws.region}:{vpc.get('OwnerId', '')}:vpc/{id_}",
        "cidrBlock": vpc["CidrBlock"],
        "ownerId": vpc.get("OwnerId", ""),
        "defaultSecurityGroupId": group["GroupId"] if group else "",
        "defaultRouteTableId": table["RouteTableId"] if table else "",
        "mainRouteTableId": table["RouteTableId"] if table else "",
        "defaultNetworkAclId": acl["NetworkAclId"] if acl else "",
    }


def _create_subnet(aws: Aws, inputs: Props) -> str:
    request = {"VpcId": inputs["vpcId"], "CidrBlock": inputs["cidrBlock"]}
    for name, key in {"availabilityZone": "AvailabilityZone", "availabilityZoneId": "AvailabilityZoneId"}.items():
        if inputs.get(name):
            request[key] = inputs[name]
    made = aws.client("ec2").create_subnet(**request, TagSpecifications=specification("subnet", inputs.get("tagsAll")))
    id_ = str(made["Subnet"]["SubnetId"])
    _update_subnet(aws, id_, {"tagsAll": inputs.get("tagsAll")}, inputs)
    return id_


def _update_subnet(aws: Aws, id_: str, old: Props, new: Props) -> None:
    public = bool(new.get("mapPublicIpOnLaunch"))
    if public != bool(old.get("mapPublicIpOnLaunch")):
        aws.client("ec2").modify_subnet_attribute(SubnetId=id_, MapPublicIpOnLaunch={"Value": public})
    _retag(aws, id_, old, new)


def _read_subnet(aws: Aws, id_: str, inputs: Props) -> Props | None:
    subnet = _find(aws, "describe_subnets", "Subnets", SubnetIds=[id_])
    if subnet is None:
        return None
    return {
        "arn": subnet.get("SubnetArn", ""),
        "availabilityZone": subnet["AvailabilityZone"],
        "availabilityZoneId": subnet.get("AvailabilityZoneId", ""),
        "cidrBlock": subnet["CidrBlock"],
        "ownerId": subnet.get("OwnerId", ""),
    }


def _create_gateway(aws: Aws, inputs: Props) -> str:
    client = aws.client("ec2")
    made = client.create_internet_gateway(TagSpecifications=specification("internet-gateway", inputs.get("tagsAll")))
    id_ = str(made["InternetGateway"]["InternetGatewayId"])
    if inputs.get("vpcId"):
        client.attach_internet_gateway(InternetGatewayId=id_, VpcId=inputs["vpcId"])
    return id_


def _read_gateway(aws: Aws, id_: str, inputs: Props) -> Props | None:
    gateway = _find(aws, "describe_internet_gateways", "InternetGateways", InternetGatewayIds=[id_])
    if gateway is None:
        return None
    owner = gateway.get("OwnerId", "")
    return {"arn": f"arn:aws:ec2:{aws.region}:{owner}:internet-gateway/{id_}", "ownerId": owner}


def _update_gateway(aws: Aws, id_: str, old: Props, new: Props) -> None:
    client = aws.client("ec2")
    if old.get("vpcId") != new.get("vpcId"):
        if old.get("vpcId"):
            client.detach_internet_gateway(InternetGatewayId=id_, VpcId=old["vpcId"])
        if new.get("vpcId"):
            client.attach_internet_gateway(InternetGatewayId=id_, VpcId=new["vpcId"])
    _retag(aws, id_, old, new)


def _delete_gateway(aws: Aws, id_: str, inputs: Props) -> None:
    client = aws.client("ec2")
    if inputs.get("vpcId"):
        client.detach_internet_gateway(InternetGatewayId=id_, VpcId=inputs["vpcId"])
    client.delete_internet_gateway(InternetGatewayId=id_)


TARGETS = {
    "gatewayId": "GatewayId",
    "natGatewayId": "NatGatewayId",
    "networkInterfaceId": "NetworkInterfaceId",
    "vpcEndpointId": "VpcEndpointId",
    "transitGatewayId": "TransitGatewayId",
}


def _route(route: Props) -> Props:
    """Convert a route to CreateRoute's arguments. A route in a RouteTable has `cidrBlock`. A Route resource has
    `destinationCidrBlock`."""
    request = {key: route[name] for name, key in TARGETS.items() if route.get(name)}
    if cidr := route.get("cidrBlock") or route.get("destinationCidrBlock"):
        request["DestinationCidrBlock"] = cidr
    if cidr := route.get("ipv6CidrBlock") or route.get("destinationIpv6CidrBlock"):
        request["DestinationIpv6CidrBlock"] = cidr
    return request


def _destination(route: Props) -> Props:
    return {key: value for key, value in _route(route).items() if key.startswith("Destination")}


def _create_table(aws: Aws, inputs: Props) -> str:
    client = aws.client("ec2")
    made = client.create_route_table(
        VpcId=inputs["vpcId"], TagSpecifications=specification("route-table", inputs.get("tagsAll"))
    )
    id_ = str(made["RouteTable"]["RouteTableId"])
    for route in inputs.get("routes", []):
        client.create_route(RouteTableId=id_, **_route(route))
    return id_


def _read_table(aws: Aws, id_: str, inputs: Props) -> Props | None:
    table = _find(aws, "describe_route_tables", "RouteTables", RouteTableIds=[id_])
    if table is None:
        return None
    owner = table.get("OwnerId", "")
    return {"arn": f"arn:aws:ec2:{aws.region}:{owner}:route-table/{id_}", "ownerId": owner}


def _update_table(aws: Aws, id_: str, old: Props, new: Props) -> None:
    client = aws.client("ec2")
    before, after = old.get("routes", []), new.get("routes", [])
    for route in before:
        if route not in after:
            client.delete_route(RouteTableId=id_, **_destination(route))
    for route in after:
        if route not in before:
            client.create_route(RouteTableId=id_, **_route(route))
    _retag(aws, id_, old, new)


def _create_route(aws: Aws, inputs: Props) -> str:
    aws.client("ec2").create_route(RouteTableId=inputs["routeTableId"], **_route(inputs))
    return f"r-{inputs['routeTableId']}-{next(iter(_destination(inputs).values()))}"


def _read_route(aws: Aws, id_: str, inputs: Props) -> Props | None:
    table = _find(aws, "describe_route_tables", "RouteTables", RouteTableIds=[inputs["routeTableId"]])
    wanted = _destination(inputs).items()
    found = next((each for each in (table or {}).get("Routes", []) if wanted <= each.items()), None)
    return None if found is None else {"state": found.get("State", "active"), "origin": found.get("Origin", "")}


def _update_route(aws: Aws, id_: str, old: Props, new: Props) -> None:
    aws.client("ec2").replace_route(RouteTableId=new["routeTableId"], **_route(new))


def _delete_route(aws: Aws, id_: str, inputs: Props) -> None:
    aws.client("ec2").delete_route(RouteTableId=inputs["routeTableId"], **_destination(inputs))


def _associate_table(aws: Aws, inputs: Props) -> str:
    target = {"SubnetId": inputs["subnetId"]} if inputs.get("subnetId") else {"GatewayId": inputs["gatewayId"]}
    return str(aws.client("ec2").associate_route_table(RouteTableId=inputs["routeTableId"], **target)["AssociationId"])


def _read_table_association(aws: Aws, id_: str, inputs: Props) -> Props | None:
    table = _find(aws, "describe_route_tables", "RouteTables", RouteTableIds=[inputs["routeTableId"]])
    associations = (table or {}).get("Associations", [])
    return {} if any(each["RouteTableAssociationId"] == id_ for each in associations) else None


def _create_endpoint(aws: Aws, inputs: Props) -> str:
    request: Props = {
        "VpcId": inputs["vpcId"],
        "ServiceName": inputs["serviceName"],
        "VpcEndpointType": inputs.get("vpcEndpointType", "Gateway"),
    }
    lists = {"routeTableIds": "RouteTableIds", "subnetIds": "SubnetIds", "securityGroupIds": "SecurityGroupIds"}
    for name, key in lists.items():
        if inputs.get(name):
            request[key] = inputs[name]
    if inputs.get("policy"):
        request["PolicyDocument"] = inputs["policy"]
    if "privateDnsEnabled" in inputs:
        request["PrivateDnsEnabled"] = inputs["privateDnsEnabled"]
    made = aws.client("ec2").create_vpc_endpoint(
        **request, TagSpecifications=specification("vpc-endpoint", inputs.get("tagsAll"))
    )
    return str(made["VpcEndpoint"]["VpcEndpointId"])


def _read_endpoint(aws: Aws, id_: str, inputs: Props) -> Props | None:
    endpoint = _find(aws, "describe_vpc_endpoints", "VpcEndpoints", VpcEndpointIds=[id_])
    if endpoint is None or endpoint.get("State", "").lower() in ("deleting", "deleted"):
        return None
    owner = endpoint.get("OwnerId", "")
    return {
        "arn": f"arn:aws:ec2:{aws.region}:{owner}:vpc-endpoint/{id_}",
        "state": endpoint.get("State", "available"),
        "dnsEntries": [
            {"dnsName": each.get("DnsName", ""), "hostedZoneId": each.get("HostedZoneId", "")}
            for each in endpoint.get("DnsEntries", [])
        ],
    }


def _update_endpoint(aws: Aws, id_: str, old: Props, new: Props) -> None:
    changes: Props = {}
    for name, key in {"routeTableIds": "RouteTableIds", "subnetIds": "SubnetIds"}.items():
        before, after = set(old.get(name, [])), set(new.get(name, []))
        if after - before:
            changes["Add" + key] = sorted(after - before)
        if before - after:
            changes["Remove" + key] = sorted(before - after)
    if new.get("policy") != old.get("policy"):
        changes |= {"PolicyDocument": new["policy"]} if new.get("policy") else {"ResetPolicy": True}
    if changes:
        aws.client("ec2").modify_vpc_endpoint(VpcEndpointId=id_, **changes)
    _retag(aws, id_, old, new)


# Security groups


def _create_group(aws: Aws, inputs: Props) -> str:
    client = aws.client("ec2")
    made = client.create_security_group(
        GroupName=inputs["name"],
        Description=inputs.get("description", "Managed by Pulumi"),
        VpcId=inputs["vpcId"],
        TagSpecifications=specification("security-group", inputs.get("tagsAll")),
    )
    id_ = str(made["GroupId"])
    # Like the provider, remove AWS's default egress rule from every new group, so that only declared rules apply.
    client.revoke_security_group_egress(
        GroupId=id_, IpPermissions=[_permission({"ipProtocol": "-1", "cidrIpv4": "0.0.0.0/0"})]
    )
    _set_inline_rules(aws, id_, {}, inputs)
    return id_


def _set_inline_rules(aws: Aws, id_: str, old: Props, new: Props) -> None:
    client = aws.client("ec2")
    for direction in ("ingress", "egress"):
        before, after = old.get(direction, []), new.get(direction, [])
        for rule in before:
            if rule not in after:
                getattr(client, f"revoke_security_group_{direction}")(GroupId=id_, IpPermissions=[_inline(id_, rule)])
        for rule in after:
            if rule not in before:
                getattr(client, f"authorize_security_group_{direction}")(
                    GroupId=id_, IpPermissions=[_inline(id_, rule)]
                )


def _inline(group: str, rule: Props) -> Props:
    note = {"Description": rule["description"]} if rule.get("description") else {}
    groups = [*rule.get("securityGroups", []), *([group] if rule.get("self") else [])]
    made: Props = {"IpProtocol": str(rule["protocol"])}
    if made["IpProtocol"] != "-1":
        made |= {"FromPort": int(rule["fromPort"]), "ToPort": int(rule["toPort"])}
    made["IpRanges"] = [{"CidrIp": each, **note} for each in rule.get("cidrBlocks", [])]
    made["Ipv6Ranges"] = [{"CidrIpv6": each, **note} for each in rule.get("ipv6CidrBlocks", [])]
    made["PrefixListIds"] = [{"PrefixListId": each, **note} for each in rule.get("prefixListIds", [])]
    made["UserIdGroupPairs"] = [{"GroupId": each, **note} for each in groups]
    return {key: value for key, value in made.items() if value != []}


def _read_group(aws: Aws, id_: str, inputs: Props) -> Props | None:
    group = _find(aws, "describe_security_groups", "SecurityGroups", GroupIds=[id_])
    if group is None:
        return None
    owner = group.get("OwnerId", "")
    return {
        "arn": f"arn:aws:ec2:{aws.region}:{owner}:security-group/{id_}",
        "name": group["GroupName"],
        "ownerId": owner,
        "vpcId": group.get("VpcId", ""),
    }


def _update_group(aws: Aws, id_: str, old: Props, new: Props) -> None:
    _set_inline_rules(aws, id_, old, new)
    _retag(aws, id_, old, new)


def _permission(rule: Props) -> Props:
    """Convert a SecurityGroupIngressRule or a SecurityGroupEgressRule to an IpPermission."""
    note = {"Description": rule["description"]} if rule.get("description") else {}
    made: Props = {"IpProtocol": str(rule["ipProtocol"])}
    if made["IpProtocol"] != "-1":
        made |= {"FromPort": int(rule["fromPort"]), "ToPort": int(rule["toPort"])}
    if rule.get("cidrIpv4"):
        made["IpRanges"] = [{"CidrIp": rule["cidrIpv4"], **note}]
    if rule.get("cidrIpv6"):
        made["Ipv6Ranges"] = [{"CidrIpv6": rule["cidrIpv6"], **note}]
    if rule.get("prefixListId"):
        made["PrefixListIds"] = [{"PrefixListId": rule["prefixListId"], **note}]
    if rule.get("referencedSecurityGroupId"):
        made["UserIdGroupPairs"] = [{"GroupId": rule["referencedSecurityGroupId"], **note}]
    return made


def _rule(direction: str) -> Kind:
    def create(aws: Aws, inputs: Props) -> str:
        authorize = getattr(aws.client("ec2"), f"authorize_security_group_{direction}")
        made = authorize(
            GroupId=inputs["securityGroupId"],
            IpPermissions=[_permission(inputs)],
            TagSpecifications=specification("security-group-rule", inputs.get("tagsAll")),
        )
        return str(made["SecurityGroupRules"][0]["SecurityGroupRuleId"])

    def read(aws: Aws, id_: str, inputs: Props) -> Props | None:
        rule = _find(aws, "describe_security_group_rules", "SecurityGroupRules", SecurityGroupRuleIds=[id_])
        return None if rule is None else {"securityGroupRuleId": id_}

    def update(aws: Aws, id_: str, old: Props, new: Props) -> None:
        wanted: Props = {"IpProtocol": str(new["ipProtocol"])}
        if wanted["IpProtocol"] != "-1":
            wanted |= {"FromPort": int(new["fromPort"]), "ToPort": int(new["toPort"])}
        for name, key in {
            "cidrIpv4": "CidrIpv4",
            "cidrIpv6": "CidrIpv6",
            "prefixListId": "PrefixListId",
            "referencedSecurityGroupId": "ReferencedGroupId",
            "description": "Description",
        }.items():
            if new.get(name):
                wanted[key] = new[name]
        aws.client("ec2").modify_security_group_rules(
            GroupId=new["securityGroupId"],
            SecurityGroupRules=[{"SecurityGroupRuleId": id_, "SecurityGroupRule": wanted}],
        )
        _retag(aws, id_, old, new)

    def delete(aws: Aws, id_: str, inputs: Props) -> None:
        revoke = getattr(aws.client("ec2"), f"revoke_security_group_{direction}")
        revoke(GroupId=inputs["securityGroupId"], SecurityGroupRuleIds=[id_])

    return Kind(
        create=create,
        read=read,
        update=update,
        delete=delete,
        replace_on=frozenset({"securityGroupId"}),
        tagged=True,
    )


# Volumes and addresses


def _create_volume(aws: Aws, inputs: Props) -> str:
    request: Props = {"AvailabilityZone": inputs["availabilityZone"], "VolumeType": inputs.get("type", "gp2")}
    for name, key in {
        "size": "Size",
        "iops": "Iops",
        "throughput": "Throughput",
        "encrypted": "Encrypted",
        "kmsKeyId": "KmsKeyId",
        "snapshotId": "SnapshotId",
    }.items():
        if inputs.get(name) is not None:
            request[key] = inputs[name]
    made = aws.client("ec2").create_volume(**request, TagSpecifications=specification("volume", inputs.get("tagsAll")))
    id_ = str(made["VolumeId"])
    _await(f"volume {id_} becoming available", lambda: _volume_state(aws, id_) in ("available", "in-use"))
    return id_


def _volume_state(aws: Aws, id_: str) -> str:
    volume = _find(aws, "describe_volumes", "Volumes", VolumeIds=[id_])
    return str(volume["State"]) if volume else "deleted"


def _read_volume(aws: Aws, id_: str, inputs: Props) -> Props | None:
    volume = _find(aws, "describe_volumes", "Volumes", VolumeIds=[id_])
    if volume is None or volume["State"] in ("deleting", "deleted"):
        return None
    found = {
        "arn": f"arn:aws:ec2:{aws.region}::volume/{id_}",
        "size": volume["Size"],
        "type": volume.get("VolumeType", inputs.get("type", "gp2")),
        "availabilityZone": volume["AvailabilityZone"],
        "encrypted": bool(volume.get("Encrypted")),
    }
    return found


def _update_volume(aws: Aws, id_: str, old: Props, new: Props) -> None:
    names = {"size": "Size", "type": "VolumeType", "iops": "Iops", "throughput": "Throughput"}
    changes = {key: new[name] for name, key in names.items() if new.get(name) and new.get(name) != old.get(name)}
    if changes:
        aws.client("ec2").modify_volume(VolumeId=id_, **changes)
    _retag(aws, id_, old, new)


def _delete_volume(aws: Aws, id_: str, inputs: Props) -> None:
    if inputs.get("finalSnapshot"):
        snapshot = aws.client("ec2").create_snapshot(
            VolumeId=id_, TagSpecifications=specification("snapshot", inputs.get("tagsAll"))
        )
        aws.note(f"kept a final snapshot of {id_}: {snapshot['SnapshotId']}")
    aws.client("ec2").delete_volume(VolumeId=id_)


def _attach(aws: Aws, inputs: Props) -> str:
    volume, instance = inputs["volumeId"], inputs["instanceId"]
    aws.client("ec2").attach_volume(VolumeId=volume, InstanceId=instance, Device=inputs["deviceName"])
    _await(f"volume {volume} being attached to {instance}", lambda: _attachment(aws, inputs) == "attached")
    return f"vai-{volume}-{instance}"


def _attachment(aws: Aws, inputs: Props) -> str | None:
    volume = _find(aws, "describe_volumes", "Volumes", VolumeIds=[inputs["volumeId"]])
    for each in (volume or {}).get("Attachments", []):
        if each["InstanceId"] == inputs["instanceId"]:
            return str(each["State"])
    return None


def _read_attachment(aws: Aws, id_: str, inputs: Props) -> Props | None:
    return {} if _attachment(aws, inputs) in ("attached", "attaching") else None


def _detach(aws: Aws, id_: str, inputs: Props) -> None:
    """Detach the volume. Like the provider, stop the instance first if `stopInstanceBeforeDetaching` is set."""
    if _attachment(aws, inputs) is None or inputs.get("skipDestroy"):
        return
    if inputs.get("stopInstanceBeforeDetaching") and instance_state(aws, inputs["instanceId"]) == "running":
        _stop(aws, inputs["instanceId"])
    aws.client("ec2").detach_volume(
        VolumeId=inputs["volumeId"],
        InstanceId=inputs["instanceId"],
        Device=inputs["deviceName"],
        Force=bool(inputs.get("forceDetach")),
    )
    _await(f"volume {inputs['volumeId']} being detached", lambda: _attachment(aws, inputs) is None)


def _create_address(aws: Aws, inputs: Props) -> str:
    made = aws.client("ec2").allocate_address(
        Domain="vpc", TagSpecifications=specification("elastic-ip", inputs.get("tagsAll"))
    )
    if inputs.get("instance"):
        aws.client("ec2").associate_address(AllocationId=made["AllocationId"], InstanceId=inputs["instance"])
    return str(made["AllocationId"])


def _read_address(aws: Aws, id_: str, inputs: Props) -> Props | None:
    address = _find(aws, "describe_addresses", "Addresses", AllocationIds=[id_])
    if address is None:
        return None
    dashed = address["PublicIp"].replace(".", "-")
    return {
        "allocationId": id_,
        "arn": f"arn:aws:ec2:{aws.region}::elastic-ip/{id_}",
        "publicIp": address["PublicIp"],
        "publicDns": f"ec2-{dashed}.{aws.region}.compute.amazonaws.com",
        "domain": "vpc",
    }


def _update_address(aws: Aws, id_: str, old: Props, new: Props) -> None:
    if new.get("instance") and new.get("instance") != old.get("instance"):
        aws.client("ec2").associate_address(AllocationId=id_, InstanceId=new["instance"])
    _retag(aws, id_, old, new)


def _associate_address(aws: Aws, inputs: Props) -> str:
    target = (
        {"InstanceId": inputs["instanceId"]}
        if inputs.get("instanceId")
        else {"NetworkInterfaceId": inputs["networkInterfaceId"]}
    )
    made = aws.client("ec2").associate_address(
        AllocationId=inputs["allocationId"], AllowReassociation=bool(inputs.get("allowReassociation", True)), **target
    )
    return str(made["AssociationId"])


def _read_address_association(aws: Aws, id_: str, inputs: Props) -> Props | None:
    address = _find(aws, "describe_addresses", "Addresses", AllocationIds=[inputs["allocationId"]])
    if address is None or address.get("AssociationId") != id_:
        return None
    found = {"publicIp": address["PublicIp"]}
    if address.get("PrivateIpAddress"):
        found["privateIpAddress"] = address["PrivateIpAddress"]
    return found


def _dissociate_address(aws: Aws, id_: str, inputs: Props) -> None:
    if _read_address_association(aws, id_, inputs) is not None:
        aws.client("ec2").disassociate_address(AssociationId=id_)


# Instances


def _create_instance(aws: Aws, inputs: Props) -> str:
    request: Props = {
        "ImageId": inputs["ami"],
        "InstanceType": inputs["instanceType"],
        "MinCount": 1,
        "MaxCount": 1,
        "ClientToken": inputs["clientToken"],
    }
    for name, key in {
        "subnetId": "SubnetId",
        "keyName": "KeyName",
        "ebsOptimized": "EbsOptimized",
        "privateIp": "PrivateIpAddress",
        "disableApiTermination": "DisableApiTermination",
        "instanceInitiatedShutdownBehavior": "InstanceInitiatedShutdownBehavior",
    }.items():
        if inputs.get(name) is not None:
            request[key] = inputs[name]
    if inputs.get("availabilityZone"):
        request["Placement"] = {"AvailabilityZone": inputs["availabilityZone"]}
    if inputs.get("vpcSecurityGroupIds"):
        request["SecurityGroupIds"] = inputs["vpcSecurityGroupIds"]
    if inputs.get("iamInstanceProfile"):
        request["IamInstanceProfile"] = {"Name": inputs["iamInstanceProfile"]}
    if inputs.get("monitoring") is not None:
        request["Monitoring"] = {"Enabled": inputs["monitoring"]}
    if options := _metadata_options(inputs):
        request["MetadataOptions"] = options
    if user_data := _user_data(inputs):
        request["UserData"] = user_data
    if root := inputs.get("rootBlockDevice"):
        request["BlockDeviceMappings"] = [_root_device(aws, inputs["ami"], root)]
    if credits_ := inputs.get("creditSpecification", {}).get("cpuCredits"):
        request["CreditSpecification"] = {"CpuCredits": credits_}
    tags = specification("instance", inputs.get("tagsAll"))
    volume_tags = inputs.get("volumeTags") or inputs.get("rootBlockDevice", {}).get("tags")
    tags += specification("volume", volume_tags)
    made = aws.client("ec2").run_instances(**request, TagSpecifications=tags)
    id_ = str(made["Instances"][0]["InstanceId"])
    _await(f"instance {id_} running", lambda: instance_state(aws, id_) != "pending")
    return id_


def _user_data(inputs: Props) -> str | bytes:
    """Return the user-data in decoded form, because boto3 encodes user-data with Base64."""
    if encoded := inputs.get("userDataBase64"):
        return base64.b64decode(encoded)
    return str(inputs.get("userData", ""))


def _metadata_options(inputs: Props) -> Props:
    names = {
        "httpEndpoint": "HttpEndpoint",
        "httpTokens": "HttpTokens",
        "httpPutResponseHopLimit": "HttpPutResponseHopLimit",
        "instanceMetadataTags": "InstanceMetadataTags",
        "httpProtocolIpv6": "HttpProtocolIpv6",
    }
    options = inputs.get("metadataOptions", {})
    return {key: options[name] for name, key in names.items() if options.get(name) is not None}


def _root_device(aws: Aws, ami: str, root: Props) -> Props:
    image = _find(aws, "describe_images", "Images", ImageIds=[ami])
    names = {
        "volumeSize": "VolumeSize",
        "volumeType": "VolumeType",
        "encrypted": "Encrypted",
        "deleteOnTermination": "DeleteOnTermination",
        "iops": "Iops",
        "throughput": "Throughput",
        "kmsKeyId": "KmsKeyId",
    }
    ebs = {key: root[name] for name, key in names.items() if root.get(name) is not None}
    return {"DeviceName": (image or {}).get("RootDeviceName") or "/dev/sda1", "Ebs": ebs}


def describe_instance(aws: Aws, id_: str) -> Props | None:
    """Return EC2's description of the instance, or None if the instance does not exist."""
    reservation = _find(aws, "describe_instances", "Reservations", InstanceIds=[id_])
    return reservation["Instances"][0] if reservation else None


def instance_state(aws: Aws, id_: str) -> str:
    """Return the state: pending, running, stopping, stopped, shutting-down or terminated. For an unknown instance,
    return terminated."""
    instance = describe_instance(aws, id_)
    return str(instance["State"]["Name"]) if instance else "terminated"


def _read_instance(aws: Aws, id_: str, inputs: Props) -> Props | None:
    instance = describe_instance(aws, id_)
    if instance is None or instance["State"]["Name"] in ("terminated", "shutting-down"):
        return None
    return {
        "arn": f"arn:aws:ec2:{aws.region}::instance/{id_}",
        "instanceState": instance["State"]["Name"],
        "availabilityZone": instance["Placement"]["AvailabilityZone"],
        "privateIp": instance.get("PrivateIpAddress", ""),
        "privateDns": instance.get("PrivateDnsName", ""),
        "publicIp": instance.get("PublicIpAddress", ""),
        "publicDns": instance.get("PublicDnsName", ""),
        "subnetId": instance.get("SubnetId", ""),
        "primaryNetworkInterfaceId": next(
            (each["NetworkInterfaceId"] for each in instance.get("NetworkInterfaces", [])), ""
        ),
    }


def _update_instance(aws: Aws, id_: str, old: Props, new: Props) -> None:
    client = aws.client("ec2")
    if old.get("vpcSecurityGroupIds") != new.get("vpcSecurityGroupIds"):
        client.modify_instance_attribute(InstanceId=id_, Groups=new["vpcSecurityGroupIds"])
    if _metadata_options(old) != _metadata_options(new):
        client.modify_instance_metadata_options(InstanceId=id_, **_metadata_options(new))
    if old.get("disableApiTermination") != new.get("disableApiTermination"):
        client.modify_instance_attribute(
            InstanceId=id_, DisableApiTermination={"Value": bool(new.get("disableApiTermination"))}
        )
    if old.get("iamInstanceProfile") != new.get("iamInstanceProfile"):
        _change_profile(aws, id_, new.get("iamInstanceProfile"))
    # Like the provider, stop the instance to change its type or user-data, and then start it.
    while_stopped: list[Props] = []
    if old["instanceType"] != new["instanceType"]:
        while_stopped.append({"InstanceType": {"Value": new["instanceType"]}})
    if _user_data(old) != _user_data(new):
        data = _user_data(new)
        while_stopped.append({"UserData": {"Value": data.encode() if isinstance(data, str) else data}})
    if while_stopped:
        _stop(aws, id_)
        for change in while_stopped:
            client.modify_instance_attribute(InstanceId=id_, **change)
        start_instance(aws, id_)
    if old.get("rootBlockDevice", {}) != new.get("rootBlockDevice", {}):
        _change_root(aws, id_, old.get("rootBlockDevice", {}), new.get("rootBlockDevice", {}))
    _retag(aws, id_, old, new)


def _change_profile(aws: Aws, id_: str, profile: str | None) -> None:
    client = aws.client("ec2")
    filters = [{"Name": "instance-id", "Values": [id_]}]
    found = client.describe_iam_instance_profile_associations(Filters=filters)["IamInstanceProfileAssociations"]
    current = found[0]["AssociationId"] if found else None
    if profile and current:
        client.replace_iam_instance_profile_association(AssociationId=current, IamInstanceProfile={"Name": profile})
    elif profile:
        client.associate_iam_instance_profile(InstanceId=id_, IamInstanceProfile={"Name": profile})
    elif current:
        client.disassociate_iam_instance_profile(AssociationId=current)


def _change_root(aws: Aws, id_: str, old: Props, new: Props) -> None:
    names = {"volumeSize": "Size", "volumeType": "VolumeType", "iops": "Iops", "throughput": "Throughput"}
    changes = {key: new[name] for name, key in names.items() if new.get(name) and new.get(name) != old.get(name)}
    instance = describe_instance(aws, id_)
    if not changes or instance is None:
        return
    root = next(
        each["Ebs"]["VolumeId"]
        for each in instance["BlockDeviceMappings"]
        if each["DeviceName"] == instance["RootDeviceName"]
    )
    aws.client("ec2").modify_volume(VolumeId=root, **changes)


def _stop(aws: Aws, id_: str) -> None:
    aws.client("ec2").stop_instances(InstanceIds=[id_])
    _await(f"instance {id_} stopping", lambda: instance_state(aws, id_) in ("stopped", "terminated"))


def start_instance(aws: Aws, id_: str) -> None:
    """Start a stopped instance and wait until it is running."""
    aws.client("ec2").start_instances(InstanceIds=[id_])
    _await(f"instance {id_} running", lambda: instance_state(aws, id_) == "running")


def _terminate(aws: Aws, id_: str, inputs: Props) -> None:
    client = aws.client("ec2")
    if inputs.get("disableApiTermination"):
        client.modify_instance_attribute(InstanceId=id_, DisableApiTermination={"Value": False})
    client.terminate_instances(InstanceIds=[id_])
    _await(f"instance {id_} terminating", lambda: instance_state(aws, id_) == "terminated")


def _recover_instance(aws: Aws, inputs: Props) -> str | None:
    filters = [{"Name": "client-token", "Values": [inputs["clientToken"]]}]
    for reservation in aws.client("ec2").describe_instances(Filters=filters)["Reservations"]:
        for instance in reservation["Instances"]:
            same = instance.get("ClientToken") == inputs["clientToken"]
            if same and instance["State"]["Name"] not in ("terminated", "shutting-down"):
                return str(instance["InstanceId"])
    return None


def _instance_replacements(changed: set[str], old: Props, new: Props) -> set[str]:
    """Return the changed inputs that require a replacement only under a condition. New user-data requires a replacement
    only if the program sets user_data_replace_on_change."""
    replaces = set()
    if new.get("userDataReplaceOnChange"):
        replaces |= changed & {"userData", "userDataBase64"}
    if "rootBlockDevice" in changed:
        before, after = old.get("rootBlockDevice", {}), new.get("rootBlockDevice", {})
        if any(before.get(name) != after.get(name) for name in ("encrypted", "kmsKeyId")):
            replaces.add("rootBlockDevice")
    return replaces


def _delete(operation: str, argument: str) -> Callable[[Aws, str, Props], None]:
    """Return a function that deletes a resource with one API call. The call's only argument is the resource's ID."""

    def delete(aws: Aws, id_: str, inputs: Props) -> None:
        getattr(aws.client("ec2"), operation)(**{argument: [id_] if argument.endswith("Ids") else id_})

    return delete


def _create_tag(aws: Aws, inputs: Props) -> str:
    tag = {"Key": inputs["key"], "Value": inputs["value"]}
    aws.client("ec2").create_tags(Resources=[inputs["resourceId"]], Tags=[tag])
    return f"{inputs['resourceId']},{inputs['key']}"


def _read_tag(aws: Aws, id_: str, inputs: Props) -> Props | None:
    resource, _, key = id_.partition(",")
    filters = [{"Name": "resource-id", "Values": [resource]}, {"Name": "key", "Values": [key]}]
    found = aws.client("ec2").describe_tags(Filters=filters)["Tags"]
    return {"value": found[0]["Value"]} if found else None


def _update_tag(aws: Aws, id_: str, old: Props, new: Props) -> None:
    _create_tag(aws, new)


def _delete_tag(aws: Aws, id_: str, inputs: Props) -> None:
    resource, _, key = id_.partition(",")
    aws.client("ec2").delete_tags(Resources=[resource], Tags=[{"Key": key}])


KINDS = {
    "aws:ec2/tag:Tag": Kind(
        create=_create_tag,
        read=_read_tag,
        update=_update_tag,
        delete=_delete_tag,
        replace_on=frozenset({"resourceId", "key"}),
    ),
    "aws:ec2/vpc:Vpc": Kind(
        create=_create_vpc,
        read=_read_vpc,
        update=_set_vpc_attributes,
        delete=_delete("delete_vpc", "VpcId"),
        replace_on=frozenset({"cidrBlock", "ipv4IpamPoolId"}),
        tagged=True,
    ),
    "aws:ec2/subnet:Subnet": Kind(
        create=_create_subnet,
        read=_read_subnet,
        update=_update_subnet,
        delete=_delete("delete_subnet", "SubnetId"),
        replace_on=frozenset({"availabilityZone", "availabilityZoneId", "cidrBlock", "vpcId"}),
        tagged=True,
    ),
    "aws:ec2/internetGateway:InternetGateway": Kind(
        create=_create_gateway,
        read=_read_gateway,
        update=_update_gateway,
        delete=_delete_gateway,
        tagged=True,
    ),
    "aws:ec2/routeTable:RouteTable": Kind(
        create=_create_table,
        read=_read_table,
        update=_update_table,
        delete=_delete("delete_route_table", "RouteTableId"),
        replace_on=frozenset({"vpcId"}),
        tagged=True,
    ),
    "aws:ec2/route:Route": Kind(
        create=_create_route,
        read=_read_route,
        update=_update_route,
        delete=_delete_route,
        replace_on=frozenset(
            {"routeTableId", "destinationCidrBlock", "destinationIpv6CidrBlock", "destinationPrefixListId"}
        ),
    ),
    "aws:ec2/routeTableAssociation:RouteTableAssociation": Kind(
        create=_associate_table,
        read=_read_table_association,
        delete=_delete("disassociate_route_table", "AssociationId"),
    ),
    "aws:ec2/vpcEndpoint:VpcEndpoint": Kind(
        create=_create_endpoint,
        read=_read_endpoint,
        update=_update_endpoint,
        delete=_delete("delete_vpc_endpoints", "VpcEndpointIds"),
        replace_on=frozenset({"vpcId", "serviceName", "vpcEndpointType"}),
        tagged=True,
    ),
    "aws:ec2/securityGroup:SecurityGroup": Kind(
        create=_create_group,
        read=_read_group,
        update=_update_group,
        delete=_delete("delete_security_group", "GroupId"),
        replace_on=frozenset({"name", "namePrefix", "description", "vpcId"}),
        generate={"name": physical_name},
        tagged=True,
    ),
    "aws:vpc/securityGroupIngressRule:SecurityGroupIngressRule": _rule("ingress"),
    "aws:vpc/securityGroupEgressRule:SecurityGroupEgressRule": _rule("egress"),
    "aws:ebs/volume:Volume": Kind(
        create=_create_volume,
        read=_read_volume,
        update=_update_volume,
        delete=_delete_volume,
        replace_on=frozenset({"availabilityZone", "encrypted", "kmsKeyId", "snapshotId", "multiAttachEnabled"}),
        tagged=True,
    ),
    "aws:ec2/volumeAttachment:VolumeAttachment": Kind(
        create=_attach,
        read=_read_attachment,
        update=lambda aws, id_, old, new: None,
        delete=_detach,
        replace_on=frozenset({"deviceName", "instanceId", "volumeId"}),
    ),
    "aws:ec2/eip:Eip": Kind(
        create=_create_address,
        read=_read_address,
        update=_update_address,
        delete=_delete("release_address", "AllocationId"),
        replace_on=frozenset({"domain", "publicIpv4Pool", "networkBorderGroup"}),
        tagged=True,
    ),
    "aws:ec2/eipAssociation:EipAssociation": Kind(
        create=_associate_address,
        read=_read_address_association,
        delete=_dissociate_address,
    ),
    "aws:ec2/instance:Instance": Kind(
        create=_create_instance,
        read=_read_instance,
        update=_update_instance,
        delete=_terminate,
        recover=_recover_instance,
        replaces=_instance_replacements,
        replace_on=frozenset(
            {"ami", "availabilityZone", "subnetId", "keyName", "privateIp", "placementGroup", "tenancy", "hostId"}
        ),
        tokens={"clientToken": lambda inputs: secrets.token_hex(16)},
        tagged=True,
    ),
}
