"""Pulumi's data sources, such as `aws.ec2.get_ami`. Data sources and resources use the same AWS endpoint.

The error messages and the result fields follow the AWS provider.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from botocore.exceptions import ClientError

from scripts.rehearsal.resource_types import Aws
from scripts.rehearsal.resources.tags import as_map
from scripts.rehearsal.wire import Props

NO_RESULTS = "Your query returned no results. Please change your search criteria and try again."
TOO_MANY = "Your query returned more than one result. Please try a more specific search criteria."


def _filters(args: Props) -> list[dict[str, Any]]:
    made = [{"Name": each["name"], "Values": each["values"]} for each in args.get("filters", [])]
    made += [{"Name": f"tag:{key}", "Values": [value]} for key, value in args.get("tags", {}).items()]
    return made


def _images(aws: Aws, args: Props) -> list[Props]:
    request: Props = {"Filters": _filters(args), "IncludeDeprecated": bool(args.get("includeDeprecated"))}
    if args.get("owners"):
        request["Owners"] = args["owners"]
    try:
        images: list[Props] = aws.client("ec2").describe_images(**request)["Images"]
    except ClientError as error:
        if "NotFound" in error.response["Error"]["Code"]:
            return []
        raise
    if pattern := args.get("nameRegex"):
        images = [each for each in images if re.search(pattern, each.get("Name", ""))]
    return sorted(images, key=lambda each: str(each.get("CreationDate", "")), reverse=True)


def _get_ami(aws: Aws, args: Props) -> Props:
    images = _images(aws, args)
    if not images:
        raise ValueError(NO_RESULTS)
    if len(images) > 1 and not args.get("mostRecent"):
        raise ValueError(TOO_MANY)
    image = images[0]
    return {
        "id": image["ImageId"],
        "imageId": image["ImageId"],
        "arn": f"arn:aws:ec2:{aws.region}::image/{image['ImageId']}",
        "architecture": image.get("Architecture", ""),
        "name": image.get("Name", ""),
        "description": image.get("Description", ""),
        "creationDate": image.get("CreationDate", ""),
        "deprecationTime": image.get("DeprecationTime", ""),
        "ownerId": image.get("OwnerId", ""),
        "state": image.get("State", ""),
        "public": bool(image.get("Public")),
        "rootDeviceName": image.get("RootDeviceName", ""),
        "rootDeviceType": image.get("RootDeviceType", ""),
        "rootSnapshotId": next(
            (each["Ebs"].get("SnapshotId", "") for each in image.get("BlockDeviceMappings", []) if "Ebs" in each), ""
        ),
        "virtualizationType": image.get("VirtualizationType", ""),
        "imdsSupport": image.get("ImdsSupport", ""),
        "enaSupport": bool(image.get("EnaSupport")),
        "bootMode": image.get("BootMode", ""),
        "hypervisor": image.get("Hypervisor", ""),
        "imageType": image.get("ImageType", ""),
        "imageLocation": image.get("ImageLocation", ""),
        "platform": image.get("Platform", ""),
        "platformDetails": image.get("PlatformDetails", ""),
        "blockDeviceMappings": [
            {
                "deviceName": each.get("DeviceName", ""),
                "noDevice": "",
                "virtualName": "",
                "ebs": {_snake(key): str(value).lower() for key, value in each.get("Ebs", {}).items()},
            }
            for each in image.get("BlockDeviceMappings", [])
        ],
        "productCodes": [],
        "tags": as_map(image.get("Tags")),
    }


def _snake(name: str) -> str:
    """Convert VolumeSize to volume_size, because the provider returns this map with Terraform's names."""
    return re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower()


def _get_zones(aws: Aws, args: Props) -> Props:
    request: Props = {"Filters": _filters(args)}
    if args.get("state"):
        request["Filters"] = [*request["Filters"], {"Name": "state", "Values": [args["state"]]}]
    zones = aws.client("ec2").describe_availability_zones(**request)["AvailabilityZones"]
    zones = sorted(
        (each for each in zones if each["ZoneName"] not in args.get("excludeNames", [])),
        key=lambda each: each["ZoneName"],
    )
    return {
        "id": aws.region,
        "names": [each["ZoneName"] for each in zones],
        "zoneIds": [each.get("ZoneId", "") for each in zones],
        "groupNames": [aws.region],
    }


def _get_instance_type(aws: Aws, args: Props) -> Props:
    wanted = args["instanceType"]
    try:
        found = aws.client("ec2").describe_instance_types(InstanceTypes=[wanted])["InstanceTypes"]
    except ClientError as error:
        if error.response["Error"]["Code"].startswith("InvalidInstanceType"):
            found = []
        else:
            raise
    if not found:
        raise ValueError(f"reading EC2 Instance Type ({wanted}): couldn't find resource")
    kind = found[0]
    return {
        "id": wanted,
        "instanceType": wanted,
        "supportedArchitectures": kind.get("ProcessorInfo", {}).get("SupportedArchitectures", []),
        "defaultVcpus": kind.get("VCpuInfo", {}).get("DefaultVCpus", 0),
        "defaultCores": kind.get("VCpuInfo", {}).get("DefaultCores", 0),
        "memorySize": kind.get("MemoryInfo", {}).get("SizeInMiB", 0),
        "currentGeneration": bool(kind.get("CurrentGeneration")),
        "burstablePerformanceSupported": bool(kind.get("BurstablePerformanceSupported")),
        "bareMetal": bool(kind.get("BareMetal")),
        "hypervisor": kind.get("Hypervisor", ""),
    }


def _get_offerings(aws: Aws, args: Props) -> Props:
    request: Props = {"Filters": _filters(args)}
    if args.get("locationType"):
        request["LocationType"] = args["locationType"]
    offers = aws.client("ec2").describe_instance_type_offerings(**request)["InstanceTypeOfferings"]
    return {
        "id": aws.region,
        "instanceTypes": [each["InstanceType"] for each in offers],
        "locations": [each["Location"] for each in offers],
        "locationTypes": [each["LocationType"] for each in offers],
    }


def _get_volumes(aws: Aws, args: Props) -> Props:
    volumes = aws.client("ec2").describe_volumes(Filters=_filters(args))["Volumes"]
    return {"id": aws.region, "ids": [each["VolumeId"] for each in volumes]}


def _get_volume(aws: Aws, args: Props) -> Props:
    volumes = aws.client("ec2").describe_volumes(Filters=_filters(args))["Volumes"]
    if not volumes:
        raise ValueError(NO_RESULTS)
    if len(volumes) > 1 and not args.get("mostRecent"):
        raise ValueError(TOO_MANY)
    volume = max(volumes, key=lambda each: str(each["CreateTime"]))
    return {
        "id": volume["VolumeId"],
        "volumeId": volume["VolumeId"],
        "arn": f"arn:aws:ec2:{aws.region}::volume/{volume['VolumeId']}",
        "availabilityZone": volume["AvailabilityZone"],
        "encrypted": bool(volume.get("Encrypted")),
        "size": volume["Size"],
        "volumeType": volume.get("VolumeType", ""),
        "snapshotId": volume.get("SnapshotId", ""),
        "iops": volume.get("Iops", 0),
        "throughput": volume.get("Throughput", 0),
        "tags": as_map(volume.get("Tags")),
    }


def _get_instances(aws: Aws, args: Props) -> Props:
    filters = _filters({**args, "tags": args.get("instanceTags", {})})
    states = args.get("instanceStateNames") or ["running"]
    filters.append({"Name": "instance-state-name", "Values": states})
    pages = aws.client("ec2").get_paginator("describe_instances").paginate(Filters=filters)
    found = [each for page in pages for group in page["Reservations"] for each in group["Instances"]]
    return {
        "id": aws.region,
        "ids": [each["InstanceId"] for each in found],
        "privateIps": [each.get("PrivateIpAddress", "") for each in found],
        "publicIps": [each["PublicIpAddress"] for each in found if each.get("PublicIpAddress")],
        "ipv6Addresses": [],
    }


def _get_parameters(aws: Aws, args: Props) -> Props:
    pages = (
        aws.client("ssm")
        .get_paginator("get_parameters_by_path")
        .paginate(
            Path=args["path"],
            Recursive=bool(args.get("recursive")),
            WithDecryption=args.get("withDecryption", True),
        )
    )
    found = [each for page in pages for each in page["Parameters"]]
    return {
        "id": args["path"],
        "names": [each["Name"] for each in found],
        "arns": [each["ARN"] for each in found],
        "types": [each["Type"] for each in found],
        "values": [each["Value"] for each in found],
    }


def _get_key_pair(aws: Aws, args: Props) -> Props:
    request: Props = {"Filters": _filters(args)}
    if args.get("keyName"):
        request["KeyNames"] = [args["keyName"]]
    try:
        found = aws.client("ec2").describe_key_pairs(**request)["KeyPairs"]
    except ClientError as error:
        if "NotFound" not in error.response["Error"]["Code"]:
            raise
        found = []
    if not found:
        raise ValueError(NO_RESULTS)
    return {"id": found[0]["KeyPairId"], "keyPairId": found[0]["KeyPairId"], "keyName": found[0]["KeyName"]}


def _get_addresses(aws: Aws, args: Props) -> Props:
    found = aws.client("ec2").describe_addresses(Filters=_filters(args))["Addresses"]
    return {
        "id": aws.region,
        "allocationIds": [each["AllocationId"] for each in found if "AllocationId" in each],
        "publicIps": [each["PublicIp"] for each in found],
    }


def _get_objects(aws: Aws, args: Props) -> Props:
    request = {"Bucket": args["bucket"], "Prefix": args.get("prefix", ""), "Delimiter": args.get("delimiter", "")}
    limit = {"MaxItems": int(args.get("maxKeys") or 1000)}
    pages = list(aws.client("s3").get_paginator("list_objects_v2").paginate(**request, PaginationConfig=limit))
    return {
        "id": args["bucket"],
        "keys": [each["Key"] for page in pages for each in page.get("Contents", [])],
        "commonPrefixes": [each["Prefix"] for page in pages for each in page.get("CommonPrefixes", [])],
        "owners": [],
        "requestCharged": "",
    }


def _get_hosted_zone(aws: Aws, args: Props) -> Props:
    zone = args.get("zoneId", "")
    try:
        found = aws.client("route53").get_hosted_zone(Id=zone)["HostedZone"]
    except ClientError as error:
        if error.response["Error"]["Code"] != "NoSuchHostedZone":
            raise
        raise ValueError(NO_RESULTS) from None
    return {"id": zone, "zoneId": zone, "name": found["Name"].rstrip(".")}


LOOKUPS: dict[str, Callable[[Aws, Props], Props]] = {
    "aws:ec2/getAmi:getAmi": _get_ami,
    "aws:ec2/getEips:getEips": _get_addresses,
    "aws:ec2/getInstanceType:getInstanceType": _get_instance_type,
    "aws:ec2/getInstanceTypeOfferings:getInstanceTypeOfferings": _get_offerings,
    "aws:ec2/getInstances:getInstances": _get_instances,
    "aws:ec2/getKeyPair:getKeyPair": _get_key_pair,
    "aws:ebs/getEbsVolumes:getEbsVolumes": _get_volumes,
    "aws:ebs/getVolume:getVolume": _get_volume,
    "aws:index/getAvailabilityZones:getAvailabilityZones": _get_zones,
    "aws:route53/getZone:getZone": _get_hosted_zone,
    "aws:s3/getObjects:getObjects": _get_objects,
    "aws:ssm/getParametersByPath:getParametersByPath": _get_parameters,
}
